"""An ordinary Equinox transformer for one sequence, with unrolled or stacked layers."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.random as jr

import eqx_lorax as lorax


POLICIES: dict[str, Callable[..., bool]] = {
    "checkpoint": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "policy": lorax.checkpoint_policy(),
    "policy without attention": lorax.checkpoint_policy(attention=False),
}
"""What blocks keep for the backward pass. Without a policy they keep everything."""


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, heads: int, key: Any):
        keys = jr.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(shape=width) for _ in range(2)]
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x: Any) -> Any:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        hidden = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(hidden))


def checkpointed(block: Any, policy: str) -> Any:
    """The block, with the policy of this name. `""` is none."""
    if not policy:
        return block
    return eqx.filter_checkpoint(block, policy=POLICIES[policy])


class Unrolled(eqx.Module):
    blocks: list[Block]
    policy: str = eqx.field(static=True, default="")

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = checkpointed(block, self.policy)(x)
        return x


class Scanned(eqx.Module):
    blocks: Block
    """All of them, stacked."""
    policy: str = eqx.field(static=True, default="")

    def __call__(self, x: Any) -> Any:
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x: Any, arrays: Any) -> Any:
            return checkpointed(eqx.combine(arrays, rest), self.policy)(x), None

        return lax.scan(body, x, arrays)[0]


FORMS = ("unrolled", "scanned")


def make_transformer(
    form: str, layers: int, width: int, heads: int, policy: str = ""
) -> Any:
    """A transformer with unrolled or stacked blocks."""
    keys = jr.split(jr.key(0), layers)
    if form == "scanned":
        blocks = eqx.filter_vmap(lambda key: Block(width, heads, key))(keys)
        return Scanned(blocks, policy)
    return Unrolled([Block(width, heads, key) for key in keys], policy)

"""An ordinary Equinox transformer for one sequence, with unrolled or stacked layers."""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.random as jr


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


class Unrolled(eqx.Module):
    blocks: list[Block]
    checkpoint: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = (eqx.filter_checkpoint(block) if self.checkpoint else block)(x)
        return x


class Scanned(eqx.Module):
    blocks: Block
    """All of them, stacked."""
    checkpoint: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Any) -> Any:
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x: Any, arrays: Any) -> Any:
            block = eqx.combine(arrays, rest)
            return (eqx.filter_checkpoint(block) if self.checkpoint else block)(x), None

        return lax.scan(body, x, arrays)[0]


FORMS = ("unrolled", "scanned")


def make_transformer(form: str, layers: int, width: int, heads: int) -> Any:
    """A transformer with unrolled or stacked blocks."""
    keys = jr.split(jr.key(0), layers)
    if form == "scanned":
        return Scanned(eqx.filter_vmap(lambda key: Block(width, heads, key))(keys))
    return Unrolled([Block(width, heads, key) for key in keys])

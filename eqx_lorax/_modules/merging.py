"""Merging adapters: adding updates to their bases."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array

from .._methods import AbstractLoraWeight, base_of
from .._shared import known_sharding, list_some
from .._trees import Place


def merge_weights(model: Any, weights: Sequence[Place], *, donate: bool) -> list[Array]:
    """Merges the weights of a model. Each result has the sharding of its base.

    **Arguments:**

    - `donate`: Whether each result is written over its base, unless that is also
        elsewhere in the model.

    **Raises:**

    `ValueError` if any result is not finite. Inside `jax.jit` that is an error at run
    time.
    """
    dotted = [place.dotted for place in weights]
    nodes = [place.node for place in weights]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(nodes)):
        arrays = [node.materialise() for node in nodes]
        return [
            eqx.error_if(array, ~jnp.isfinite(array).all(), _explain_not_finite([path]))
            for path, array in zip(dotted, arrays)
        ]
    if donate:
        _check_finite(dotted, [_is_merge_finite(node) for node in nodes])
        # A base that is also elsewhere, such as a tied embedding, is kept.
        uses = collections.Counter(id(x) for x in jax.tree.leaves(model))
        return [_merge(node, uses[id(base_of(node))] == 1) for node in nodes]
    arrays = [_merge(node, False) for node in nodes]
    _check_finite(dotted, [jnp.isfinite(array).all() for array in arrays])
    return arrays


def _merge(weight: AbstractLoraWeight, donate: bool) -> Array:
    base = base_of(weight)
    is_base = jax.tree.map(lambda x: x is base, weight)
    return _compile_merge(known_sharding(base), donate)(*eqx.partition(weight, is_base))


@functools.lru_cache(maxsize=1024)
def _compile_merge(sharding: Sharding | None, donate: bool) -> Callable[..., Array]:
    return jax.jit(
        lambda base, others: eqx.combine(base, others).materialise(),
        donate_argnums=0 if donate else (),
        out_shardings=sharding,
    )


@jax.jit
def _is_merge_finite(weight: AbstractLoraWeight) -> Array:
    return jnp.isfinite(weight.materialise()).all()


def _check_finite(dotted: Sequence[str], flags: Sequence[Array]) -> None:
    bad = [path for path, flag in zip(dotted, flags) if not bool(jax.device_get(flag))]
    if bad:
        raise ValueError(_explain_not_finite(bad))


def _explain_not_finite(dotted: Sequence[str]) -> str:
    return (
        f"Merging gives values that are not finite in {list_some(dotted)}; "
        "nothing was merged. Look for NaN in the factors or for overflow of the "
        "base's dtype, or drop the adapters with "
        "`lorax.unloraify(model, merge=False)`."
    )

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

from .._bases import is_quantised, quantise_like
from .._factored import stands_for_array
from .._methods import AbstractLoraWeight, base_of
from .._shared import is_traced, known_sharding, list_some
from .._trees import Place


def check_can_requantise(weights: Sequence[Place], *, merge: bool) -> None:
    """**Raises:**

    `ValueError` if no merged weight, or none of a kind that is known, can be quantised
    again as its base is.
    """
    if not merge:
        raise ValueError(
            "`requantise=True` quantises merged weights, and `merge=False` merges none "
            "and gives the quantised bases back as they are. Leave out one of them."
        )
    bases = [(place, base_of(place.node)) for place in weights]
    others = [
        f"{place.dotted}, a {type(base).__name__},"
        for place, base in bases
        if stands_for_array(base) and not is_quantised(base)
    ]
    if others:
        raise ValueError(
            f"`requantise=True` cannot make the base of {list_some(others)} again, "
            "which is of another package. Merge into arrays, and quantise these there."
        )
    if not any(is_quantised(base) for _, base in bases):
        raise ValueError(
            "`requantise=True` is for quantised bases, and no adapter here has one. "
            "Leave it out, or call `lorax.quantise` on the merged model."
        )


def merge_weights(
    model: Any, weights: Sequence[Place], *, donate: bool, requantise: bool = False
) -> list[Any]:
    """Merges the weights of a model. Each result has the sharding of its base.

    **Arguments:**

    - `donate`: Whether each result is written over its base, unless that is also
        elsewhere in the model.
    - `requantise`: Whether what is merged into quantised bases is quantised as they
        are.

    **Raises:**

    `ValueError` if any result is not finite. Inside `jax.jit` that is an error at run
    time.
    """
    arrays = _merge_all(model, weights, donate)
    if not requantise:
        return arrays
    bases = [base_of(place.node) for place in weights]
    return [
        quantise_like(array, base, place.dotted) if is_quantised(base) else array
        for array, base, place in zip(arrays, bases, weights)
    ]


def _merge_all(model: Any, weights: Sequence[Place], donate: bool) -> list[Array]:
    dotted = [place.dotted for place in weights]
    nodes = [place.node for place in weights]
    if is_traced(nodes):
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

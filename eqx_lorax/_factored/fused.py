"""A product with a whole weight, with the derivatives of base and branch apart."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .._shared import accumulation_dtype


def multiplied(
    separate: Callable[..., Array],
    merged: Callable[[Array, Any], Array],
    x: Array,
    weight: Any,
    low_rank_x: Array | None,
) -> Array:
    """`separate(x, weight, low_rank_x)`, with base and branch apart, or what equals it,
    `merged(x, weight)`, where the weight asks for that and it can be done.

    What is differentiated is the former, so that no gradient has a whole weight's
    shape.
    """
    # What is cast to a narrow dtype on the way would lose small updates.
    if (
        not weight.is_merged
        or low_rank_x is not None
        or x.dtype != accumulation_dtype(x.dtype)
    ):
        return separate(x, weight, low_rank_x)
    leaves, treedef = jax.tree.flatten((x, weight))

    @jax.custom_jvp
    def ruled(*leaves):
        return merged(*treedef.unflatten(leaves))

    def jvp(primals, tangents):
        is_active = [not isinstance(t, SymbolicZero) for t in tangents]

        def picked(values):
            return [value for on, value in zip(is_active, values) if on]

        def of_active(*active):
            rest = iter(active)
            leaves = [next(rest) if on else x for on, x in zip(is_active, primals)]
            return separate(*treedef.unflatten(leaves))

        _, tangent = jax.jvp(of_active, picked(primals), picked(tangents))
        return ruled(*primals), tangent

    ruled.defjvp(jvp, symbolic_zeros=True)
    return ruled(*leaves)

"""A product with a whole weight, with the derivatives of base and branch apart."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


def merged_product(
    separate: Callable[[Array, Any], Array],
    merged: Callable[[Array, Any], Array],
    x: Array,
    weight: Any,
) -> Array:
    """`merged(x, weight)`, which is to equal `separate(x, weight)`. What is
    differentiated is the latter, so that no gradient has a whole weight's shape."""

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

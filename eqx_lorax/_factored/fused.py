"""A product with the sum of base and update, with the derivatives of the two apart."""

from collections.abc import Callable

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .._shared import accumulation_dtype
from .form import Factored


def can_fuse(weight: Factored, x: Array) -> bool:
    """Whether products with `x` are to form the sum once. Cast to a narrow dtype it
    would lose small updates."""
    return weight.fuses_forward and x.dtype == accumulation_dtype(x.dtype)


def fuse_forward(
    multiply_separately: Callable[[Factored, Array], Array],
    multiply_fused: Callable[[Factored, Array], Array],
    weight: Factored,
    x: Array,
) -> Array:
    """`multiply_fused(weight, x)`, with the derivatives of `multiply_separately`, which
    equals it, so that no gradient has the shape of the whole weight."""
    leaves, treedef = jax.tree.flatten((weight, x))

    @jax.custom_jvp
    def ruled(*leaves):
        return multiply_fused(*treedef.unflatten(leaves))

    def jvp(primals, tangents):
        is_active = [not isinstance(t, SymbolicZero) for t in tangents]

        def pick(values):
            return [value for on, value in zip(is_active, values) if on]

        def of_active(*active):
            rest = iter(active)
            leaves = [next(rest) if on else x for on, x in zip(is_active, primals)]
            return multiply_separately(*treedef.unflatten(leaves))

        _, tangent = jax.jvp(of_active, pick(primals), pick(tangents))
        return ruled(*primals), tangent

    ruled.defjvp(jvp, symbolic_zeros=True)
    return ruled(*leaves)

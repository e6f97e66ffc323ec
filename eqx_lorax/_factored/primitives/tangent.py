"""The tangent of a product in its trained factor, whose transpose is the gradient.

This is `jax.lax.dot_general` but for its transpose in the second operand, the gradient
`(columns, rows)`, a sum over all tokens. JAX always multiplies the cotangent from the
left, and below two `vmap`s, over sequences and over tokens, sums over two axes. XLA on
the CPU then transposes the whole cotangent, computing it once more, and multiplies in
the slow order. Here the tokens are one axis and the smaller operand comes first.
"""

import functools
import math
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ..._shared import has_typed_mesh


def product_with_factor(x: Array, factor: Array, *, precision: Any = None) -> Array:
    """The sum of `x (*tokens, columns)` and `factor (rows, columns)` over the columns,
    of shape `(*tokens, rows)`."""
    # On meshes that types speak of, JAX knows best.
    if has_typed_mesh(x, factor):
        return _plain(x, factor, precision=precision)
    return _product.bind(x, factor, precision=precision)


def _plain(x: Array, factor: Array, *, precision: Any) -> Array:
    dimension_numbers = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, factor, dimension_numbers, precision=precision)


def _gradient_in_x(cotangent: Array, x: Any, factor: Array, *, precision: Any) -> Array:
    dimension_numbers = (((cotangent.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(cotangent, factor, dimension_numbers, precision=precision)


def _gradient_in_factor(
    cotangent: Array, x: Array, factor: Any, *, precision: Any
) -> Array:
    small, large = x, cotangent
    is_rows_first = cotangent.shape[-1] < x.shape[-1]
    if is_rows_first:
        small, large = large, small
    tokens = math.prod(x.shape[:-1])
    gradient = lax.dot_general(
        small.reshape(tokens, small.shape[-1]),
        large.reshape(tokens, large.shape[-1]),
        (((0,), (0,)), ((), ())),
        precision=precision,
    )
    # Without the barrier XLA would fold the transpose below, and what follows it, into
    # a product the other way round.
    gradient = lax.optimization_barrier(gradient)
    return gradient if is_rows_first else gradient.T


def _batched(
    operands: tuple[Array, Array], dims: tuple[Any, Any], *, precision: Any
) -> tuple[Array, int]:
    (x, factor), (x_dim, factor_dim) = operands, dims
    if factor_dim is None:
        x = jnp.moveaxis(x, x_dim, 0)
        return product_with_factor(x, factor, precision=precision), 0
    plain = functools.partial(_plain, precision=precision)
    return jax.vmap(plain, [x_dim, factor_dim])(x, factor), 0


_product = Primitive("lorax_product_with_factor")
_product.def_impl(jax.jit(_plain, static_argnames="precision"))
_product.def_abstract_eval(
    lambda x, factor, precision: x.update(
        shape=(*x.shape[:-1], factor.shape[0]), weak_type=False
    )
)
ad.defbilinear(_product, _gradient_in_x, _gradient_in_factor)
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))

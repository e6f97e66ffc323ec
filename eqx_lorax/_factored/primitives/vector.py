"""Products of one vector with a small matrix.

XLA's compiler for the CPU writes machine code of its own for each product of a matrix
with a vector, which takes a hundredth of a second. An adapted layer has three of them
in the place of one. Here such a product is a primitive that becomes a sum of products
of entries on the CPU, which compiles at once. Where matrices are large that runs slower
than the matrix product, so it is for small ones. Below `vmap` it is that product again.
"""

import functools
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ..._shared import accumulation_dtype, has_typed_mesh


_MOST_ENTRIES = 64 * 64


def is_small_product(x: Array, matrix: Array) -> bool:
    """Whether `multiply_vector` is for these operands."""
    return (
        (x.ndim, matrix.ndim) == (1, 2)
        and matrix.size <= _MOST_ENTRIES
        and jnp.issubdtype(x.dtype, jnp.floating)
        and accumulation_dtype(x.dtype) == x.dtype == matrix.dtype
        # On meshes that types speak of, JAX knows best.
        and not has_typed_mesh(x, matrix)
    )


def multiply_vector(x: Array, matrix: Array, axis: int, precision: Any) -> Array:
    """The sum of `x (n,)` times `matrix` over this axis of the matrix. The parameters
    of the primitive are those of `jax.lax.dot_general`."""
    dimension_numbers = (((0,), (axis,)), ((), ()))
    return _multiply.bind(
        x, matrix, dimension_numbers=dimension_numbers, precision=precision
    )


def _find_axis(params: dict[str, Any]) -> int:
    (_, (axis,)), _ = params["dimension_numbers"]
    return axis


def _sum_entries(x: Array, matrix: Array, **params: Any) -> Array:
    axis = _find_axis(params)
    return jnp.sum(lax.broadcast_in_dim(x, matrix.shape, [axis]) * matrix, axis)


def _gradient_in_x(cotangent: Array, x: Any, matrix: Array, **params: Any) -> Array:
    return multiply_vector(
        cotangent, matrix, 1 - _find_axis(params), params["precision"]
    )


def _gradient_in_matrix(
    cotangent: Array, x: Array, matrix: Any, **params: Any
) -> Array:
    rows, columns = (x, cotangent) if _find_axis(params) == 0 else (cotangent, x)
    # With nothing to sum over, the compiler makes it a product of entries by itself.
    return lax.dot_general(rows, columns, (((), ()), ((), ())))


def _batched(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    plain = functools.partial(lax.dot_general, **params)
    return jax.vmap(plain, dims)(*operands), 0


_multiply = Primitive("lorax_multiply_vector")
_multiply.def_impl(
    jax.jit(lax.dot_general, static_argnames=("dimension_numbers", "precision"))
)
_multiply.def_abstract_eval(
    lambda x, matrix, **params: x.update(
        shape=(matrix.shape[1 - _find_axis(params)],), weak_type=False
    )
)
ad.defbilinear(_multiply, _gradient_in_x, _gradient_in_matrix)
batching.primitive_batchers[_multiply] = _batched
mlir.register_lowering(_multiply, mlir.lower_fun(lax.dot_general, False))
mlir.register_lowering(_multiply, mlir.lower_fun(_sum_entries, False), platform="cpu")

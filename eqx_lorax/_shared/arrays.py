"""Kinds of arrays, and the dtypes in which products are computed."""

from typing import Any, TYPE_CHECKING, TypeAlias, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike


# Any tree. The one of jaxtyping is unknown to type checkers, and in strict mode they
# say so of every call. What is in the brackets is checked at run time alone.
if TYPE_CHECKING:
    from typing_extensions import TypeAliasType, TypeVar

    _Leaf = TypeVar("_Leaf", default=Any)
    PyTree = TypeAliasType("PyTree", Any, type_params=(_Leaf,))
else:
    from jaxtyping import PyTree as PyTree


# An array to type checkers. At run time it may also be NumPy's, as in models just read
# from a file, or only its shape and dtype, as in abstract models.
if TYPE_CHECKING:
    AnyArray: TypeAlias = Array
else:
    AnyArray: TypeAlias = Array | np.ndarray | jax.ShapeDtypeStruct


def is_array(x: Any) -> TypeGuard[Array]:
    """Whether `x` is an array of JAX or NumPy, or a `jax.ShapeDtypeStruct`."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def is_abstract(tree: Any) -> bool:
    """Whether there are shapes and dtypes alone, `jax.ShapeDtypeStruct`, in an array or
    in what stands for one."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def is_traced(tree: Any) -> bool:
    """Whether there are tracers in an array or in what stands for one."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def axes_from_end(ndim: int) -> range:
    """The axes of an array, counted from its end: `-ndim, ..., -1`."""
    return range(-ndim, 0)


def count_bits(dtype: DTypeLike) -> int:
    """The number of bits of an entry. Some dtypes have fewer than a byte."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def is_inexact(x: Any) -> TypeGuard[Array]:
    """Whether `x` is an array of floating or complex dtype."""
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The common dtype. This also works where `jax_numpy_dtype_promotion` is
    `"strict"`, since the promotion is meant."""
    if len({jnp.dtype(x) for x in dtypes}) > 1:
        # In JAX, floats of eight bits and fewer have no common dtype with any other.
        # bfloat16 has all of their values.
        dtypes = tuple(jnp.bfloat16 if _is_tiny(x) else x for x in dtypes)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _is_tiny(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which sums of products of `dtype` are accumulated: at least float32
    for floats."""
    dtype = jnp.dtype(dtype)
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def as_array(x: Any, dtype: DTypeLike | None = None) -> Array:
    """Like `jax.numpy.asarray`, but transfers from the host are explicit, so that
    `jax.transfer_guard("disallow")` allows them."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        return jnp.asarray(x, dtype)
    # A Python number keeps its weak type.
    is_number = dtype is None and isinstance(x, bool | int | float | complex)
    return jax.device_put(x if is_number else np.asarray(x, dtype))


zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))
"""Like `jax.numpy.zeros`, but made on the device."""


def multiply(x: Array, number: ArrayLike) -> Array:
    """`x` times one or several numbers, in a dtype that is wide enough for both. The
    caller rounds."""
    number = as_array(number)
    dtype = promote(accumulation_dtype(x.dtype), number.dtype)
    return x.astype(dtype) * number.astype(dtype)


def check_real(name: str, numbers: ArrayLike, what: str, dtype: DTypeLike) -> None:
    """Checks that `numbers` can scale an array of `dtype`.

    **Raises:**

    `ValueError` if the numbers are complex and the dtype is not.
    """
    if jnp.iscomplexobj(numbers) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` is complex, but {what} is real, of dtype {jnp.dtype(dtype)}. "
            f"Pass real numbers, such as `{name}.real`."
        )

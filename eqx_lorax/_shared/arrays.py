"""What counts as an array, and which dtypes products are computed in."""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike


def is_array(x: Any) -> TypeGuard[Array]:
    """Whether `x` is an array: JAX's, NumPy's, or only its shape and dtype."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def axes_from_end(ndim: int) -> range:
    """The axes of an array, counted from its end: `-ndim, ..., -1`."""
    return range(-ndim, 0)


def count_bits(dtype: DTypeLike) -> int:
    """How many bits an entry has, which for some dtypes are fewer than a byte."""
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
    """The common dtype, also where `jax_numpy_dtype_promotion` is `"strict"`: widths
    are chosen here on purpose."""
    if len({jnp.dtype(x) for x in dtypes}) > 1:
        # Those of eight bits and fewer have no common dtype with any other in JAX;
        # bfloat16 has all of their values.
        dtypes = tuple(jnp.bfloat16 if _is_tiny(x) else x for x in dtypes)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _is_tiny(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which sums of products of `dtype` are accumulated."""
    dtype = jnp.dtype(dtype)
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def as_array(x: Any, dtype: DTypeLike | None = None) -> Array:
    """As `jax.numpy.asarray`. What comes from the host is transferred explicitly, which
    `jax.transfer_guard("disallow")` lets pass."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        return jnp.asarray(x, dtype)
    # A Python number stays one of weak type.
    is_number = dtype is None and isinstance(x, bool | int | float | complex)
    return jax.device_put(x if is_number else np.asarray(x, dtype))


zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))
"""As `jax.numpy.zeros`, made on the device."""


def multiply(x: Array, number: ArrayLike) -> Array:
    """`x` times one or several numbers, not yet rounded: in a dtype that is wide enough
    for both."""
    number = as_array(number)
    dtype = promote(accumulation_dtype(x.dtype), number.dtype)
    return x.astype(dtype) * number.astype(dtype)


def check_real(name: str, numbers: ArrayLike, what: str, dtype: DTypeLike) -> None:
    """**Raises:**

    `ValueError` if the `numbers` are complex, and what they are to scale is not.
    """
    if jnp.iscomplexobj(numbers) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` is complex, but {what} is real, of dtype {jnp.dtype(dtype)}. "
            f"Pass real numbers, such as `{name}.real`."
        )

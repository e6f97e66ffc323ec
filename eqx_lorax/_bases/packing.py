"""Codes of a few bits, several in a byte: the first has the highest bits."""

from collections.abc import Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._shared import AnyArray
from .formats import Format


def pack(codes: Array | np.ndarray, format: Format) -> tuple[AnyArray, ...]:
    """**Arguments:**

    - `codes`: Whole numbers, uint8 of shape `(..., block)`.

    **Returns:**

    For each plane of the format an array uint8 of shape `(..., block * bits / 8)`.
    """
    planes, shift = [], 0
    for bits in format.bits:
        count = 8 // bits
        plane = (codes >> shift) & (2**bits - 1)
        parts = plane.reshape(*plane.shape[:-1], plane.shape[-1] // count, count)
        packed: Any = sum(parts[..., i] << (8 - bits * (i + 1)) for i in range(count))
        planes.append(packed.astype(jnp.uint8))
        shift += bits
    return tuple(planes)


def unpack_values(planes: Sequence[Array], format: Format) -> Array:
    """The value of each code, without its scale: float32 of shape `(..., block)`.

    A table with the values of all bytes is faster than shifts: XLA makes one loop of
    the lookup and whatever follows it.
    """
    if format.bits == (8,) and format.codebook is None:
        return planes[0].astype(jnp.float32) - format.zero
    if len(format.bits) == 1:
        (plane,), (bits,) = planes, format.bits
        tables = [format.values[codes] for codes in _split_bytes(bits)]
        return _interleave([_look_up(table, plane) for table in tables])
    codes: Any = 0
    shift = 0
    for plane, bits in zip(planes, format.bits):
        tables = _split_bytes(bits) << shift
        codes = codes + _interleave([_look_up(table, plane) for table in tables])
        shift += bits
    if format.codebook is not None:
        return _look_up(format.values, codes.astype(jnp.uint8))
    return codes.astype(jnp.float32) - format.zero


def _split_bytes(bits: int) -> np.ndarray:
    """The codes in each byte, int32 of shape `(8 / bits, 256)`."""
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.int32)
    return (np.arange(256, dtype=np.int32) >> shifts[:, None]) & (2**bits - 1)


def _look_up(table: Shaped[np.ndarray, " values"], codes: Array) -> Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _interleave(parts: Sequence[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    stacked = jnp.stack(parts, -1)
    return stacked.reshape(*stacked.shape[:-2], -1)


def round_apart(product: Array) -> Array:
    """A product in float32 to which something is added, rounded before that. The
    compiler for the CPU would multiply and add at once, and round once. It does so
    across a barrier too, but not where bits are set in between, even if only in what is
    not a number anyway."""
    bit = jnp.isnan(product).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(product, jnp.uint32) | bit
    return lax.bitcast_convert_type(bits, jnp.float32)

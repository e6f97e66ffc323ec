"""From the entries of a block to codes, and the scale and offset that they share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .formats import Format, SCALES
from .packing import round_apart


def encode_blocks(
    blocks: Array, format: Format, scale_dtype: Any
) -> tuple[Array, Array, Array | None]:
    """Codes, scales and offsets of blocks, which are the last axis."""

    def narrow(scales: Array) -> Array:
        # The codes are for the scales as they are stored.
        return scales.astype(scale_dtype).astype(jnp.float32)

    # XLA's maximum on the CPU passes over what is not a number.
    is_finite = jnp.isfinite(blocks).all(-1)
    largest = jnp.where(is_finite, jnp.max(jnp.abs(blocks), -1), jnp.nan)
    if format.has_offset:
        least, most = narrow(jnp.min(blocks, -1)), jnp.max(blocks, -1)
        steps = 2 ** sum(format.bits) - 1
        # With few bits, so that `scale * code` is exact and is rounded no differently
        # where the compiler multiplies and adds at once.
        scales = jax.lax.reduce_precision((most - least) / steps, 8, 18)
        scales = narrow(jnp.where(is_finite, scales, jnp.nan))
        shifted = blocks - least[..., None]
        codes = jnp.round(divide(shifted, scales)).clip(0, steps)
        stored = scales.astype(scale_dtype), least.astype(scale_dtype)
        return codes.astype(jnp.uint8), *stored
    if format.codebook is None:
        most = 2 ** sum(format.bits) - 1 - format.zero
        scales = narrow(largest / most)
        codes = jnp.round(divide(blocks, scales)).clip(-most, most) + format.zero
        return codes.astype(jnp.uint8), scales.astype(scale_dtype), None
    largest = narrow(largest)
    codes = _find_nearest(divide(blocks, largest), format)
    return codes, largest.astype(scale_dtype), None


def divide(blocks: Array, scales: Array) -> Array:
    """The quotient, which is zero in blocks of zeros."""
    scales = scales[..., None]
    return jnp.where(scales == 0, 0, blocks / jnp.where(scales == 0, 1, scales))


def _find_nearest(x: Array, format: Format) -> Array:
    """The code with the nearest value."""
    order = np.argsort(format.values, kind="stable")
    middles = _find_middles(format.values[order]).astype(np.float32)
    # Steps from each code to the next: on meshes with explicit axes there is no lookup.
    codes: Any = int(order[0])
    for middle, step in zip(middles, np.diff(order)):
        codes = codes + int(step) * (x > middle).astype(jnp.int32)
    return codes.astype(jnp.uint8)


def _find_middles(values: np.ndarray) -> np.ndarray:
    """The numbers half-way between neighbours, float64."""
    values = values.astype(np.float64)
    return (values[1:] + values[:-1]) / 2


@functools.lru_cache
def _make_table() -> np.ndarray:
    """The nearest code of `SCALES` for each of 65,536 even steps from -1 to 1."""
    steps = np.arange(65536) / 32767.5 - 1
    return np.searchsorted(_find_middles(SCALES.values), steps).astype(np.uint8)


def look_up_nearest(x: Array) -> Array:
    """The code of `SCALES` with the nearest value, as bitsandbytes looks it up on the
    CPU: for the nearest of 65,536 steps."""
    steps = jnp.floor(round_apart((x + 1) * 32767.5) + 0.5).astype(jnp.int32)
    return jnp.asarray(_make_table())[steps]

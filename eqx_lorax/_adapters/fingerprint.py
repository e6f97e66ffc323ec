"""Telling one base from another: a digest of every bit of the arrays that an adapter
was trained on top of.

It is a sum of mixed words modulo 2⁶⁴, in no particular order, so that it is the same on
any device and for any sharding, and nothing is gathered or copied. It finds other
weights and damaged ones; against forgery it is no help.
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from .._methods import is_weight
from .._shared import as_array, count_bits, is_array, replicate
from .._trees import join_path, Places


def fingerprint_base(
    places: Places, without: Collection[tuple[str, ...]]
) -> dict[str, str]:
    """A digest of every array of a model that is frozen, by its path in the plain
    model: all but the factors of adapters, and but those at `without`."""
    return {
        join_path(path): fingerprint(array)
        for path, array in _find_frozen(places)
        if path not in without
    }


def fingerprint(array: Any) -> str:
    """16 hexadecimal digits that depend on the dtype, the shape and every bit."""
    words = np.asarray(jax.device_get(replicate(_mix(_bits(array)))), np.uint64)
    kind = f"{array.dtype} {tuple(array.shape)}".encode()
    salt = np.frombuffer(kind + bytes(-len(kind) % 4), np.uint32)
    high, low = (int(word) for word in words)
    for word in salt:
        high = (high ^ int(word)) * 0x9E3779B1 & 0xFFFFFFFF
        low = (low + int(word)) * 0x85EBCA77 & 0xFFFFFFFF
    return f"{high:08x}{low:08x}"


def hash_content(content: Any) -> str:
    """A digest of an array of NumPy, of text, or of bytes."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, np.ndarray):
        content = content.reshape(-1).view(np.uint8).data
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _find_frozen(places: Places) -> Iterator[tuple[tuple[str, ...], Any]]:
    for place in places.all:
        if is_array(place.node):
            yield place.path, place.node
        elif is_weight(place.node):
            # One array, or several if the base is a weight in its turn.
            for keys, array in jax.tree_util.tree_leaves_with_path(place.node.w):
                yield (*place.path, *(key.name for key in keys)), array


def _bits(x: Any) -> Array:
    """The bits of `x` as unsigned integers of at most 32 bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)])
    if x.dtype == bool:
        return as_array(x, jnp.uint8)
    if count_bits(x.dtype) < 8:
        return as_array(to_bits(x))
    unsigned = np.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    if isinstance(x, np.ndarray):
        # Not by way of JAX, which would round what has 64 bits.
        words = (x.dtype.itemsize // 4,) * (x.dtype.itemsize > 4)
        return as_array(
            np.ascontiguousarray(x).view(unsigned).reshape(*x.shape, *words)
        )
    return lax.bitcast_convert_type(x, unsigned)


def to_bits(x: Any) -> Any:
    """The bits of entries of at most a byte, in a byte each."""
    count = count_bits(x.dtype)
    if isinstance(x, np.ndarray | np.generic):
        # NumPy's bits above these are whatever they are.
        return np.array(x, order="C").view(np.uint8) & np.uint8(2**count - 1)
    return lax.bitcast_convert_type(x, f"uint{count}").astype(jnp.uint8)


def from_bits(x: Any, dtype: DTypeLike) -> Any:
    """The array of `dtype` of which `bits` gives `x`."""
    count = count_bits(dtype)
    if not isinstance(x, np.ndarray):
        return lax.bitcast_convert_type(x.astype(f"uint{count}"), dtype)
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        return x.view(dtype)
    sign = 2 ** (count - 1)
    return ((x ^ sign).astype(np.int8) - np.int8(sign)).astype(dtype)


@jax.jit
def _mix(to_bits: Array) -> Array:
    """Two sums of words that are mixed with their positions."""
    position = jnp.zeros(to_bits.shape, jnp.uint32)
    for axis, size in enumerate(to_bits.shape):
        along = lax.broadcasted_iota(jnp.uint32, to_bits.shape, axis)
        position = position * jnp.uint32(size % 2**32) + along
    word = to_bits.astype(jnp.uint32)
    seeds = (0x9E3779B9, 0x7F4A7C15)
    mixed = [_scramble(word ^ _scramble(position + jnp.uint32(s))) for s in seeds]
    return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in mixed])


def _scramble(word: Array) -> Array:
    """MurmurHash3's finaliser."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)

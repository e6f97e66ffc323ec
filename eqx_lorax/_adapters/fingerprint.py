"""Two ways to tell one content from another, both over every bit.

A *fingerprint* is of an array, wherever it is: a sum of mixed words modulo 2⁶⁴. A sum
has no order, so it is the same on any device and for any sharding, and nothing is
gathered or copied. It tells other weights and damaged ones, but does not withstand
forgery. A *hash*, BLAKE2b, is of the bytes of a file.
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

from .._bases import is_quantised
from .._factored import stands_for_array
from .._methods import is_packed, is_weight
from .._shared import as_array, count_bits, is_array, replicate
from .._trees import join_path, Places


def fingerprint_base(
    places: Places, without: Collection[tuple[str, ...]]
) -> dict[str, str]:
    """A fingerprint of every frozen array of a model, by its path in the plain model:
    of all arrays but the factors of adapters and those at the paths in `without`. That
    of a quantised array begins with its format, as in `"nf4 ..."`."""
    return {
        join_path(path): _fingerprint_bits(x) if is_packed(x) else fingerprint(x)
        for path, x in _find_frozen(places)
        if path not in without
    }


def read_format(fingerprint: str) -> str | None:
    """The format of the quantised array with this fingerprint; `None` of arrays."""
    *format, _ = fingerprint.rsplit(" ", 1)
    return format[0] if format else None


def _fingerprint_bits(x: Any) -> str:
    """A fingerprint of what is stored, and of what that stands for."""
    parts = [fingerprint(array) for array in jax.tree.leaves(x)]
    name = type(x).__name__
    if is_quantised(x):
        name, layout = x.format.name, (x.block, x.inner, x.permutation)
        # The codes of nested scales have a single format.
        parts.append(f"{layout} {x.format.values.tolist()}")
    parts.append(f"{name} {jnp.dtype(x.dtype)} {tuple(x.shape)}")
    return f"{name} {hash_content(' '.join(parts))[:16]}"


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
    """A hash of an array of NumPy, of text, or of bytes."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, np.ndarray):
        content = content.reshape(-1).view(np.uint8).data
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _find_frozen(places: Places) -> Iterator[tuple[tuple[str, ...], Any]]:
    for place in places.all:
        if is_array(place.node):
            yield place.path, place.node
        elif stands_for_array(place.node):
            # One array, or several if the base is itself a weight.
            base = place.node.w if is_weight(place.node) else place.node
            for keys, x in jax.tree_util.tree_leaves_with_path(base, is_packed):
                yield (*place.path, *map(_name_key, keys)), x


def _name_key(key: Any) -> str:
    return str(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.name)


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
        # JAX would round entries of 64 bits.
        words = (x.dtype.itemsize // 4,) * (x.dtype.itemsize > 4)
        return as_array(
            np.ascontiguousarray(x).view(unsigned).reshape(*x.shape, *words)
        )
    return lax.bitcast_convert_type(x, unsigned)


def to_bits(x: Any) -> Any:
    """The bits of `x`, whose entries have at most a byte, in one byte for each."""
    count = count_bits(x.dtype)
    if isinstance(x, np.ndarray | np.generic):
        # NumPy leaves the other bits of each byte undefined.
        return np.array(x, order="C").view(np.uint8) & np.uint8(2**count - 1)
    return lax.bitcast_convert_type(x, f"uint{count}").astype(jnp.uint8)


def from_bits(x: Any, dtype: DTypeLike) -> Any:
    """The inverse of `to_bits`."""
    count = count_bits(dtype)
    if not isinstance(x, np.ndarray):
        return lax.bitcast_convert_type(x.astype(f"uint{count}"), dtype)
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        return x.view(dtype)
    sign = 2 ** (count - 1)
    return ((x ^ sign).astype(np.int8) - np.int8(sign)).astype(dtype)


@jax.jit
def _mix(bits: Array) -> Array:
    """Two sums of words, each mixed with its position."""
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size % 2**32) + along
    word = bits.astype(jnp.uint32)
    seeds = (0x9E3779B9, 0x7F4A7C15)
    mixed = [_scramble(word ^ _scramble(position + jnp.uint32(s))) for s in seeds]
    return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in mixed])


def _scramble(word: Array) -> Array:
    """MurmurHash3's finaliser."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)

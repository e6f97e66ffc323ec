"""Tensors of GGUF files, the format of llama.cpp."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from ..._shared import as_array
from ..array import QuantisedArray
from ..formats import Format
from ..packing import pack


Blocks: TypeAlias = np.ndarray
"""uint8 of shape `(*leading, blocks, bytes)`."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How the blocks of one kind of tensor are stored."""

    entries: int
    """The number of entries in a block."""
    bytes: int
    """The number of bytes of a block."""
    parse: Callable[[Blocks], QuantisedArray]
    """From blocks to a quantised array, of which `inner` is one axis."""


def from_gguf(tensor: Any, *, dtype: DTypeLike = jnp.float32) -> QuantisedArray | Array:
    """A tensor of a GGUF file, with the bits that it has there.

    !!! example

        ```python
        tensors = {x.name: x for x in gguf.GGUFReader(path).tensors}
        weight = lorax.quantised.from_gguf(tensors["blk.0.ffn_up.weight"])
        ```

    **Arguments:**

    - `tensor`: A `gguf.ReaderTensor`.
    - `dtype`: The dtype that it dequantises to.

    **Returns:**

    A `lorax.QuantisedArray` for the kinds Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q6_K,
    or, for F32, F16 and BF16, an array of that dtype. The shape is in the order of JAX,
    `(out, in)` for a linear layer; files have it reversed. Blocks lie along the last
    axis. Scales are float16 as in the file; those of Q4_K and Q6_K are nested.

    **Raises:**

    `ValueError` if the tensor is of another kind, or incomplete.
    """
    name, kind = str(tensor.name), str(getattr(tensor.tensor_type, "name", "?"))
    shape = tuple(int(size) for size in reversed(tensor.shape))
    data = np.asarray(tensor.data)
    if kind in _FLOATS:
        floats = np.dtype(_FLOATS[kind])
        _check_size(name, kind, data, math.prod(shape) * floats.itemsize)
        return as_array(np.ascontiguousarray(data).view(floats).reshape(shape))
    if kind not in _KINDS:
        raise ValueError(
            f"{name} is of the kind {kind}, which is not read. Read are "
            f"{', '.join([*_KINDS, *_FLOATS])}: convert the file to one of these, such "
            "as by `llama-quantize model.gguf new.gguf Q4_K`."
        )
    stored = _KINDS[kind]
    if shape[-1] % stored.entries:
        raise ValueError(
            f"{name}, of shape {shape}, is no tensor of the kind {kind}: blocks of "
            f"{stored.entries} entries do not divide its last axis. It is damaged."
        )
    count = shape[-1] // stored.entries
    _check_size(name, kind, data, math.prod(shape[:-1]) * count * stored.bytes)
    bytes_ = np.ascontiguousarray(data).view(np.uint8)
    array = stored.parse(bytes_.reshape(*shape[:-1], count, stored.bytes))
    return array.astype(dtype)


def _check_size(name: str, kind: str, data: np.ndarray, wanted: int) -> None:
    if data.nbytes != wanted:
        raise ValueError(
            f"{name}, of the kind {kind}, has {data.nbytes:,} bytes in the place of "
            f"{wanted:,}: the file is incomplete. Load it down again."
        )


def _halves(bytes_: Blocks) -> np.ndarray:
    """Numbers of 16 bits, little endian."""
    return np.ascontiguousarray(bytes_).view("<f2").astype(np.float16)


def _nibbles(bytes_: Blocks) -> Blocks:
    """The lower four bits of all bytes, and then the higher ones."""
    return np.concatenate([bytes_ & 15, bytes_ >> 4], -1)


def _make(
    format: Format, codes: Blocks, scales: Any, offsets: Any = None
) -> QuantisedArray:
    blocks, block = codes.shape[-2:]
    return QuantisedArray(
        tuple(map(as_array, pack(codes, format))),
        as_array(scales) if isinstance(scales, np.ndarray) else scales,
        as_array(offsets) if isinstance(offsets, np.ndarray) else offsets,
        format,
        (blocks * block,),
        np.dtype(np.float32),
    )


_Q4_0 = Format("q4_0", zero=8)
_Q4_1 = Format("q4_1", has_offset=True)
_Q5_0 = Format("q5_0", (4, 1), zero=16)
_Q5_1 = Format("q5_1", (4, 1), has_offset=True)
_Q8_0 = Format("q8_0", (8,), zero=128)
_Q4_K = Format("q4_k", has_offset=True)
_Q4_K_SCALES = Format("q4_k scales", (4, 2))
_Q6_K = Format("q6_k", (4, 2), zero=32)
_Q6_K_SCALES = Format("q6_k scales", (8,), zero=128)


def _parse_q4_0(blocks: Blocks) -> QuantisedArray:
    return _make(_Q4_0, _nibbles(blocks[..., 2:]), _halves(blocks[..., :2])[..., 0])


def _parse_q4_1(blocks: Blocks) -> QuantisedArray:
    scale_and_offset = _halves(blocks[..., :4])
    codes = _nibbles(blocks[..., 4:])
    return _make(_Q4_1, codes, scale_and_offset[..., 0], scale_and_offset[..., 1])


def _join_fifth_bits(bits: Blocks, nibbles: Blocks) -> Blocks:
    """Codes of five bits, whose highest ones are in four bytes of their own."""
    fifth = np.unpackbits(bits, axis=-1, bitorder="little")
    return _nibbles(nibbles) | fifth << 4


def _parse_q5_0(blocks: Blocks) -> QuantisedArray:
    codes = _join_fifth_bits(blocks[..., 2:6], blocks[..., 6:])
    return _make(_Q5_0, codes, _halves(blocks[..., :2])[..., 0])


def _parse_q5_1(blocks: Blocks) -> QuantisedArray:
    scale_and_offset = _halves(blocks[..., :4])
    codes = _join_fifth_bits(blocks[..., 4:8], blocks[..., 8:])
    return _make(_Q5_1, codes, scale_and_offset[..., 0], scale_and_offset[..., 1])


def _parse_q8_0(blocks: Blocks) -> QuantisedArray:
    # From two's complement to an offset of 128.
    codes = blocks[..., 2:] ^ 128
    return _make(_Q8_0, codes, _halves(blocks[..., :2])[..., 0])


def _parse_q4_k(blocks: Blocks) -> QuantisedArray:
    """Eight blocks of 32, whose scales and offsets are multiples, of six bits, of two
    numbers that they share."""
    scale, offset = np.moveaxis(_halves(blocks[..., :4]), -1, 0)
    first, second, third = np.split(blocks[..., 4:16], 3, -1)
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    offsets = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)
    bytes_ = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    codes = _nibbles(bytes_).reshape(*blocks.shape[:-2], -1, 32)
    return _make(
        _Q4_K,
        codes,
        _make(_Q4_K_SCALES, scales, scale),
        _make(_Q4_K_SCALES, offsets, -offset),
    )


def _parse_q6_k(blocks: Blocks) -> QuantisedArray:
    """Sixteen blocks of 16, whose scales are multiples, of eight bits, of one number
    that they share."""
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 64)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    # The higher two bits of four runs of 32 entries are in the same bytes.
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (high >> shifts & 3).reshape(*shape, 2, 128)
    codes = (_nibbles(low) | high << 4).reshape(*blocks.shape[:-2], -1, 16)
    scales = _make(
        _Q6_K_SCALES, blocks[..., 192:208] ^ 128, _halves(blocks[..., 208:])[..., 0]
    )
    return _make(_Q6_K, codes, scales)


_FLOATS: dict[str, DTypeLike] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}

_KINDS = {
    "Q4_0": _Kind(32, 18, _parse_q4_0),
    "Q4_1": _Kind(32, 20, _parse_q4_1),
    "Q5_0": _Kind(32, 22, _parse_q5_0),
    "Q5_1": _Kind(32, 24, _parse_q5_1),
    "Q8_0": _Kind(32, 34, _parse_q8_0),
    "Q4_K": _Kind(256, 144, _parse_q4_k),
    "Q6_K": _Kind(256, 210, _parse_q6_k),
}

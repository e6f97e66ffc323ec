"""Layers that bitsandbytes has quantised, as safetensors files hold them."""

import dataclasses
import json
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..._shared import as_array, list_some
from ..array import QuantisedArray
from ..formats import Format, FORMATS, SCALES


_STATE = "quant_state.bitsandbytes__"
_BENEATH = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""What belongs to a weight of four bits, by the names after its own."""
_BESIDE = ("SCB", "weight_format")
"""What belongs to the `weight` of a layer of eight bits, by the names in its place."""


def from_bitsandbytes(
    tensors: Mapping[str, Any], prefix: str, *, dtype: DTypeLike | None = None
) -> QuantisedArray:
    """The weight of a layer that bitsandbytes has quantised, with the bits that it has
    there.

    !!! example

        ```python
        tensors = safetensors.numpy.load_file("model.safetensors")
        weight = lorax.quantised.from_bitsandbytes(tensors, "layers.0.mlp.up_proj")
        ```

    **Arguments:**

    - `tensors`: The tensors of a file by their names, as arrays of NumPy or JAX. Those
        of four bits may be of any dtype (`bnb_4bit_quant_storage`).
    - `prefix`: The name of the layer, without `.weight`.
    - `dtype`: The dtype that it dequantises to. Defaults to the one that the file
        names, and to float32 for LLM.int8, where it names none.

    **Returns:**

    A `lorax.QuantisedArray` of shape `(out, in)`, in NF4 or FP4, with plain or nested
    scales, or with eight bits and a scale for each output. It stands for what the
    layers of bitsandbytes multiply with, bit for bit. For eight bits that is
    `weight * (SCB * (1 / 127))`; the function `int8_vectorwise_dequant` rounds in
    another order, to a last bit that may differ.

    Where blocks divide the rows, leading axes lead the codes and plain scales. Nested
    scales are in blocks of 256 over the ends of rows.

    **Raises:**

    `ValueError` if there is no such weight, or if what belongs to it is missing or has
    the wrong size.
    """
    weight = _join(prefix, "weight")
    if weight not in tensors:
        near = [x for x in tensors if x.endswith("weight")]
        raise ValueError(
            f"There is no tensor {weight!r}. Weights are {list_some(near)}: pass the "
            "name of one without `.weight`."
        )
    array = open_bitsandbytes(tensors, weight).read(dtype)
    # Copies: JAX may take the memory of arrays of NumPy over.
    return jax.tree.map(lambda x: as_array(np.array(x)), array)


@runtime_checkable
class StoredWeight(Protocol):
    """A weight as a file has it. All that belongs to it is there and has the right
    size; no bits of it have been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        ...

    @property
    def layout(self) -> "StoredLayout":
        """How it is stored."""
        ...

    def read(self, dtype: DTypeLike | None = None) -> QuantisedArray:
        """The quantised array, whose parts are arrays of NumPy."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredLayout:
    """What has to be the same in weights that are stacked."""

    format: Format
    block: int | None
    """The number of entries in a block; `None` if each output has one scale."""
    nested: tuple[Format, int] | None
    """The format and the blocks of the scales, if these are nested."""

    def __str__(self) -> str:
        if self.block is None:
            return self.format.name
        text = f"{self.format.name} in blocks of {self.block}"
        if self.nested is None:
            return text
        return f"{text} with scales in blocks of {self.nested[1]}"


def open_bitsandbytes(tensors: Mapping[str, Any], weight: str) -> StoredWeight:
    """The weight of this name, which may be any parameter of four bits, or the `weight`
    of a layer of LLM.int8.

    **Raises:**

    `ValueError` as `from_bitsandbytes`.
    """
    if _beside(weight, "SCB") in tensors:
        return _open_eight_bits(tensors, weight)
    for kind in ("nf4", "fp4"):
        if f"{weight}.{_STATE}{kind}" in tensors:
            return _open_four_bits(tensors, weight, FORMATS[kind])
    raise ValueError(
        f"{weight} comes with neither `{_STATE}nf4`, `{_STATE}fp4` nor `SCB`: it is "
        "not quantised by bitsandbytes, or the file is not whole. Its dtype is "
        f"{np.asarray(tensors[weight]).dtype}."
    )


def find_companions(names: Collection[str]) -> dict[str, list[str]]:
    """The weights among `names` that bitsandbytes has quantised, each with the names of
    what belongs to it and is there."""
    found: dict[str, list[str]] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if last in _BESIDE:
            weight = f"{owner}.weight" if owner else "weight"
        elif last.startswith("bitsandbytes__"):
            weight = owner.removesuffix(".quant_state")
        elif last in _BENEATH:
            weight = owner
        else:
            continue
        if weight in names:
            found.setdefault(weight, []).append(name)
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _beside(weight: str, name: str) -> str:
    return _join(weight.rpartition(".")[0], name)


@dataclasses.dataclass(frozen=True)
class _Nested:
    """Scales that are quantised."""

    format: Format
    block: int
    scales: np.ndarray
    offset: float


@dataclasses.dataclass(frozen=True)
class _FourBits:
    shape: tuple[int, ...]
    format: Format
    block: int
    dtype: np.dtype
    packed: np.ndarray
    absmax: np.ndarray
    nested: _Nested | None

    @property
    def layout(self) -> StoredLayout:
        nested = self.nested
        return StoredLayout(
            self.format,
            self.block,
            None if nested is None else (nested.format, nested.block),
        )

    def read(self, dtype: DTypeLike | None = None) -> QuantisedArray:
        shape, block = self.shape, self.block
        # Blocks go over the ends of rows where they do not divide them.
        inner = shape[-1:] if shape[-1] % block == 0 else shape
        leading = shape[: len(shape) - len(inner)]
        per_row = len(self.absmax) // math.prod(leading)
        packed = _pad(self.packed, len(self.absmax) * block // 2)
        return QuantisedArray(
            (packed.reshape(*leading, per_row, block // 2),),
            self._read_scales((*leading, per_row)),
            None,
            self.format,
            inner,
            jnp.dtype(self.dtype if dtype is None else dtype),
        )

    def _read_scales(self, shape: tuple[int, ...]) -> Any:
        if self.nested is None:
            return self.absmax.reshape(shape).astype(np.float32)
        blocks, block = len(self.nested.scales), self.nested.block
        return QuantisedArray(
            (_pad(self.absmax, blocks * block).reshape(blocks, block),),
            self.nested.scales,
            np.full(blocks, np.float32(self.nested.offset)),
            self.nested.format,
            shape,
            np.dtype(np.float32),
        )


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, (0, size - len(x))) if len(x) < size else x


def _open_four_bits(
    tensors: Mapping[str, Any], weight: str, format: Format
) -> _FourBits:
    state = _read_state(tensors, f"{weight}.{_STATE}{format.name}")
    size = math.prod(state.shape)
    packed = _take_bytes(tensors, weight, -(-size // 2))
    codebook = _take(tensors, f"{weight}.quant_map", np.float32, 16)
    nested, count = None, -(-size // state.block)
    if state.nested_offset is not None:
        block = min(state.nested_block, count)
        name = f"{weight}.nested_quant_map"
        nested = _Nested(
            _with_codebook(SCALES, _take(tensors, name, np.float32, 256)),
            block,
            _take(tensors, f"{weight}.nested_absmax", np.float32, -(-count // block)),
            state.nested_offset,
        )
    name, dtype = f"{weight}.absmax", np.dtype(np.uint8)
    if nested is None:
        dtype = _find_scale_dtype(tensors, name)
    return _FourBits(
        state.shape,
        _with_codebook(format, codebook),
        state.block,
        state.dtype,
        packed,
        _take(tensors, name, dtype, count),
        nested,
    )


def _find_scale_dtype(tensors: Mapping[str, Any], name: str) -> np.dtype:
    """The dtype in which plain scales have to be. It is bfloat16 in models that have
    run on a CPU before they were saved, and float32 in others."""
    found = np.asarray(tensors[name]).dtype if name in tensors else None
    return jnp.dtype(jnp.bfloat16 if found == jnp.bfloat16 else jnp.float32)


@dataclasses.dataclass(frozen=True)
class _State:
    """What a file says of a weight of four bits."""

    shape: tuple[int, ...]
    block: int
    dtype: np.dtype
    nested_block: int
    """The number of scales in a block, if they are nested."""
    nested_offset: float | None
    """What is added to nested scales; `None` if they are plain."""


def _read_state(tensors: Mapping[str, Any], name: str) -> _State:
    try:
        state = json.loads(np.asarray(tensors[name]).tobytes())
        shape = tuple(map(operator.index, state["shape"]))
        block = operator.index(state["blocksize"])
        if not shape or min(shape) < 1 or block < 2 or block % 2:
            raise ValueError(f"blocks of {block} in an array of shape {shape}")
        return _State(
            shape,
            block,
            jnp.dtype(state["dtype"]),
            operator.index(state.get("nested_blocksize", 256)),
            float(state["nested_offset"]) if "nested_offset" in state else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} does not say how the weight is quantised "
            f"({type(error).__name__}: {error}): the file is damaged. Get it again, or "
            "save the model again."
        ) from error


def _with_codebook(format: Format, values: np.ndarray) -> Format:
    """The format, with the codebook of the file if that is another one."""
    if np.array_equal(format.values, values):
        return format
    return Format(
        format.name,
        format.bits,
        tuple(values.tolist()),
        has_offset=format.has_offset,
    )


@dataclasses.dataclass(frozen=True)
class _EightBits:
    codes: np.ndarray
    largest: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def layout(self) -> StoredLayout:
        return StoredLayout(FORMATS["int8"], None, None)

    def read(self, dtype: DTypeLike | None = None) -> QuantisedArray:
        # From two's complement to an offset of 128.
        return QuantisedArray(
            (self.codes.view(np.uint8)[:, None] ^ np.uint8(128),),
            (self.largest * np.float32(1 / 127))[:, None],
            None,
            FORMATS["int8"],
            self.shape[1:],
            jnp.dtype(np.float32 if dtype is None else dtype),
        )


def _open_eight_bits(tensors: Mapping[str, Any], weight: str) -> _EightBits:
    order = tensors.get(_beside(weight, "weight_format"))
    if order is not None and int(np.asarray(order)) != 0:
        raise ValueError(
            f"{weight} is stored in the order of tiles of a GPU, "
            f"`weight_format={int(np.asarray(order))}`. Save the model again by a "
            "newer bitsandbytes, which stores rows."
        )
    shape = np.asarray(tensors[weight]).shape
    if len(shape) != 2:
        raise _wrong_size(weight, np.asarray(tensors[weight]), "a matrix")
    codes = _take(tensors, weight, np.int8, math.prod(shape)).reshape(shape)
    largest = _take(tensors, _beside(weight, "SCB"), np.float32, shape[0])
    return _EightBits(codes, largest)


def _take(
    tensors: Mapping[str, Any], name: str, dtype: DTypeLike, size: int
) -> np.ndarray:
    """A tensor as one row, of which dtype and size are known."""
    if name not in tensors:
        raise ValueError(
            f"There is no tensor {name!r}, without which the weight cannot be read. "
            "Pass all tensors of the file, or of all files of the model."
        )
    array = np.asarray(tensors[name])
    if array.dtype != dtype or array.size != size:
        raise _wrong_size(name, array, f"{size:,} of {np.dtype(dtype)}")
    return np.ascontiguousarray(array).reshape(-1)


def _take_bytes(tensors: Mapping[str, Any], name: str, size: int) -> np.ndarray:
    """The bytes of a tensor, whose dtype says nothing: it is `bnb_4bit_quant_storage`
    of the configuration, such as bfloat16 where FSDP is to divide all tensors alike."""
    array = np.asarray(tensors[name])
    if array.nbytes != size:
        raise _wrong_size(name, array, f"{size:,} bytes")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _wrong_size(name: str, array: np.ndarray, wanted: str) -> ValueError:
    return ValueError(
        f"{name} has {array.size:,} entries of {array.dtype} in the place of {wanted}: "
        "the file is damaged, or of a format that is not known here. Get it again, or "
        "save the model again."
    )

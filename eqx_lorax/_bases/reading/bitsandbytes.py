"""Layers that bitsandbytes has quantised, as safetensors files hold them."""

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..._shared import as_array, list_some
from ..array import QuantisedArray
from ..formats import Format, FORMATS, SCALES


_STATE = "quant_state.bitsandbytes__"


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
    if _join(prefix, "SCB") in tensors:
        return _read_eight_bits(tensors, prefix, dtype)
    for kind in ("nf4", "fp4"):
        if f"{weight}.{_STATE}{kind}" in tensors:
            return _read_four_bits(tensors, weight, FORMATS[kind], dtype)
    raise ValueError(
        f"{weight} comes with neither `{_STATE}nf4`, `{_STATE}fp4` nor `SCB`: it is "
        "not quantised by bitsandbytes, or the file is not whole. Its dtype is "
        f"{np.asarray(tensors[weight]).dtype}."
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _read_four_bits(
    tensors: Mapping[str, Any], weight: str, format: Format, dtype: DTypeLike | None
) -> QuantisedArray:
    state = _read_state(tensors, f"{weight}.{_STATE}{format.name}")
    shape, block = state.shape, state.block
    size = math.prod(shape)
    blocks = -(-size // block)
    packed = _take_bytes(tensors, weight, -(-size // 2))
    # Blocks go over the ends of rows where they do not divide them.
    inner = shape[-1:] if shape[-1] % block == 0 else shape
    leading = shape[: len(shape) - len(inner)]
    per_row = blocks // math.prod(leading)
    packed = np.pad(packed, (0, blocks * block // 2 - len(packed)))
    codebook = _take(tensors, f"{weight}.quant_map", np.float32, 16)
    return QuantisedArray(
        (as_array(packed.reshape(*leading, per_row, block // 2)),),
        _read_scales(tensors, weight, state, (*leading, per_row)),
        None,
        _with_codebook(format, codebook),
        inner,
        jnp.dtype(state.dtype if dtype is None else dtype),
    )


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


def _read_scales(
    tensors: Mapping[str, Any],
    weight: str,
    state: _State,
    shape: tuple[int, ...],
) -> Any:
    name, count = f"{weight}.absmax", math.prod(shape)
    if state.nested_offset is None:
        return as_array(_take(tensors, name, np.float32, count).reshape(shape))
    block = min(state.nested_block, count)
    blocks = -(-count // block)
    codes = _take(tensors, name, np.uint8, count)
    codebook = _take(tensors, f"{weight}.nested_quant_map", np.float32, 256)
    scales = _take(tensors, f"{weight}.nested_absmax", np.float32, blocks)
    offset = np.float32(state.nested_offset)
    return QuantisedArray(
        (as_array(np.pad(codes, (0, blocks * block - count)).reshape(blocks, block)),),
        as_array(scales),
        as_array(np.full(blocks, offset)),
        _with_codebook(SCALES, codebook),
        shape,
        np.dtype(np.float32),
    )


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


def _read_eight_bits(
    tensors: Mapping[str, Any], prefix: str, dtype: DTypeLike | None
) -> QuantisedArray:
    name = _join(prefix, "weight")
    order = tensors.get(_join(prefix, "weight_format"))
    if order is not None and int(np.asarray(order)) != 0:
        raise ValueError(
            f"{name} is stored in the order of tiles of a GPU, "
            f"`weight_format={int(np.asarray(order))}`. Save the model again by a "
            "newer bitsandbytes, which stores rows."
        )
    shape = np.asarray(tensors[name]).shape
    codes = _take(tensors, name, np.int8, math.prod(shape)).reshape(shape)
    largest = _take(tensors, _join(prefix, "SCB"), np.float32, shape[0])
    # From two's complement to an offset of 128.
    return QuantisedArray(
        (as_array(codes.view(np.uint8)[:, None] ^ np.uint8(128)),),
        as_array((largest * np.float32(1 / 127))[:, None]),
        None,
        FORMATS["int8"],
        shape[1:],
        jnp.dtype(np.float32 if dtype is None else dtype),
    )


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

"""From arrays to quantised ones: blocks along the last axes, each with its scale."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .._shared import axes_from_end, known_sharding
from .array import is_quantised, QuantisedArray
from .blocks import divide, encode_blocks, look_up_nearest
from .formats import Format, FORMATS, SCALES
from .packing import pack


_NESTED_BLOCK = 256

_FIX = (
    'Shard another axis, take a smaller `block` (of the format `"int8"`, which has one '
    'for each channel, `"int8-block"`), or leave it out with `exclude`.'
)


@dataclasses.dataclass(frozen=True)
class Axes:
    """What the axes of an array are, counted from the end."""

    outputs: tuple[int, ...]
    """Those of the outputs, which have a scale each where scales are per channel."""

    batch: tuple[int, ...] = ()
    """Those along which arrays are stacked. No block goes along them."""


def find_format(name: str | Format) -> Format:
    """The format of this name.

    **Raises:**

    `ValueError` if there is none.
    """
    if isinstance(name, Format):
        return name
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name), FORMATS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"There is no `format={name!r}`: it has to be one of "
        f"{', '.join(map(repr, FORMATS))}.{hint}"
    )


def quantise_array(
    w: Any,
    format: str | Format = "nf4",
    *,
    block: int = 64,
    nested: bool = False,
    axes: Axes | None = None,
    name: str = "the array",
) -> QuantisedArray:
    """An array in another format.

    **Arguments:**

    - `w`: An array of float64, float32, bfloat16 or float16, or a
        `jax.ShapeDtypeStruct`.
    - `format`, `block`, `nested`: As in `lorax.quantise`.
    - `axes`: What its axes are. By default the outputs are the second to last axis,
        and there is no batch.
    - `name`: For error messages.

    **Returns:**

    A `QuantisedArray` with the sharding of `w`. The scales of entries that are not
    finite are not finite.

    **Raises:**

    `ValueError` or `TypeError` if the dtype is another one, if the block does not
    divide, or if a block would be in several shards.
    """
    format = find_format(format)
    _check_dtype(name, w)
    layout = _lay_out(name, tuple(w.shape), format, block, axes or Axes((-2,)))
    return _quantise(w, layout, format, nested, name)


def quantise_like(w: Any, like: QuantisedArray, name: str = "the array") -> Any:
    """An array in the format of another one of its shape, with the same blocks.

    Scales have the dtype of those of `like`. If these are nested as in `lorax.quantise`
    so are the new ones; nested scales of GGUF's formats become float32.

    **Arguments:**

    - `w`, `name`: As in `quantise_array`.
    - `like`: An array of the shape of `w`.
    """
    _check_dtype(name, w)
    scales = like.scales
    is_nested = is_quantised(scales)
    dtype = jnp.dtype(jnp.float32 if is_nested else scales.dtype)
    nested = is_nested and scales.format.name == SCALES.name
    return _quantise(w, _find_layout(like), like.format, nested, name, dtype)


def _quantise(
    w: Any,
    layout: "_Layout",
    format: Format,
    nested: bool,
    name: str,
    scale_dtype: Any = np.dtype(np.float32),
) -> QuantisedArray:
    placed = _Shards(name, w, layout)
    encode = functools.partial(
        _encode, layout=layout, format=format, scale_dtype=scale_dtype
    )
    if isinstance(w, jax.ShapeDtypeStruct):
        array = jax.eval_shape(encode, jax.ShapeDtypeStruct(w.shape, w.dtype))
        array = jax.eval_shape(_nest, array, layout) if nested else array
        return placed.mark(array)
    if isinstance(w, jax.core.Tracer) or placed.sharding is None:
        array = encode(jnp.asarray(w))
        return _nest(array, layout) if nested else array
    like = jax.eval_shape(encode, jax.ShapeDtypeStruct(w.shape, w.dtype))
    shardings = placed.find_shardings(like)
    array = jax.jit(encode, out_shardings=shardings)(w)
    return _nest(placed.gather_scales(array), layout) if nested else array


def find_shardings(array: QuantisedArray, sharding: Any, name: str) -> Any:
    """The sharding of each part of a quantised array that is to have this sharding
    itself.

    **Arguments:**

    - `name`: For error messages.

    **Raises:**

    `ValueError` if a block would be in several shards.
    """
    like = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    fix = "Shard another axis, or leave it whole on each device."
    return _Shards(name, like, _find_layout(array), fix).find_shardings(array)


def check_block(block: Any) -> None:
    """**Raises:**

    `ValueError` if `block` cannot be the size of a block.
    """
    if isinstance(block, bool) or not isinstance(block, int | np.integer) or block < 2:
        raise ValueError(f"`block={block!r}` must be an even number, such as 64.")
    if block % 2:
        raise ValueError(
            f"`block={block}` is odd, and two entries of four bits share a byte. Pass "
            f"{block + 1}."
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the entries of an array are stored."""

    order: tuple[int, ...]
    """The axes of the array, counted from the end, in the order of storage."""
    inner: tuple[int, ...]
    block: int
    batch: int
    """How many of the first axes are batch axes."""

    @property
    def leading(self) -> int:
        return len(self.order) - len(self.inner)

    @property
    def permutation(self) -> tuple[int, ...] | None:
        ndim = len(self.order)
        if self.order == tuple(axes_from_end(ndim)):
            return None
        return _invert(self.order)


def _invert(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of a permutation, both of axes counted from the end."""
    ndim = len(axes)
    return tuple(axes.index(axis) - ndim for axis in axes_from_end(ndim))


def _find_layout(array: QuantisedArray) -> _Layout:
    """How the entries of a quantised array are stored."""
    scales = array.scales
    batch = scales.codes[0].ndim - 2 if is_quantised(scales) else 0
    return _Layout(_invert(array.stored_axes), array.inner, array.block, batch)


def _lay_out(
    name: str, shape: tuple[int, ...], format: Format, block: int, axes: Axes
) -> _Layout:
    ndim = len(shape)
    every = axes_from_end(ndim)
    batch = [axis for axis in every if axis in axes.batch]
    if format.name == "int8":
        outputs = [axis for axis in every if axis in axes.outputs]
        inner = [axis for axis in every if axis not in (*batch, *outputs)]
        sizes = tuple(shape[axis] for axis in inner)
        return _Layout((*batch, *outputs, *inner), sizes, math.prod(sizes), len(batch))
    check_block(block)
    inner, most = 0, ndim - (1 + max((x + ndim for x in batch), default=-1))
    count = 1
    while inner < most and (inner == 0 or count % block):
        inner += 1
        count *= shape[-inner]
    if count % block or not count:
        fitting = [x for x in (128, 64, 32, 16, 8, 4, 2) if x < block]
        fits = [x for x in fitting if math.prod(shape[ndim - most :]) % x == 0]
        fix = (
            f"Pass `block={fits[0]}` or a divisor of it, or leave" if fits else "Leave"
        )
        raise ValueError(
            f"`block={block}` does not divide the {math.prod(shape[ndim - most :])} "
            f"entries of {name}, of shape {shape}. {fix} it out with `exclude`."
        )
    return _Layout(tuple(every), shape[ndim - inner :], block, len(batch))


def _check_dtype(name: str, w: Any) -> None:
    dtype = jnp.dtype(w.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} is of dtype {dtype}, and only floats can be quantised: leave it "
            "out with `exclude`."
        )
    if dtype.itemsize < 2:
        raise TypeError(
            f"{name} is of dtype {dtype}, which has few bits already. Leave it out "
            "with `exclude`, or cast it to bfloat16 first if that is meant."
        )


@functools.partial(jax.jit, static_argnames=("layout", "format", "scale_dtype"))
def _encode(
    w: Array, *, layout: _Layout, format: Format, scale_dtype: Any
) -> QuantisedArray:
    dtype = w.dtype
    w = w.transpose([axis % w.ndim for axis in layout.order]).astype(jnp.float32)
    if missing := -math.prod(layout.inner) % layout.block:
        # As in files of others, where the last block may be padded.
        w = w.reshape(*w.shape[: layout.leading], -1)
        w = jnp.pad(w, [(0, 0)] * layout.leading + [(0, missing)])
    blocks = w.reshape(*w.shape[: layout.leading], -1, layout.block)
    codes, scales, offsets = encode_blocks(blocks, format, scale_dtype)
    return QuantisedArray(
        pack(codes, format),
        scales,
        offsets,
        format,
        layout.inner,
        dtype,
        layout.permutation,
    )


@functools.partial(jax.jit, static_argnames="layout")
def _nest(array: QuantisedArray, layout: _Layout) -> QuantisedArray:
    """The array with scales and offsets that are quantised in turn, as in QLoRA's
    double quantisation."""
    offsets = array.offsets
    return array.replace(
        scales=_nest_scales(array.scales, layout),
        offsets=None if offsets is None else _nest_scales(offsets, layout),
    )


def _nest_scales(scales: Array, layout: _Layout) -> QuantisedArray:
    shape = scales.shape[layout.batch :]
    count = math.prod(shape)
    block = min(_NESTED_BLOCK, count)
    flat = scales.reshape(*scales.shape[: layout.batch], count)
    offset = jnp.mean(flat, -1, keepdims=True)
    padding = [(0, 0)] * layout.batch + [(0, -count % block)]
    blocks = jnp.pad(flat - offset, padding)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, block)
    largest = jnp.max(jnp.abs(blocks), -1)
    codes = look_up_nearest(divide(blocks, largest))
    offsets = jnp.broadcast_to(offset, largest.shape)
    return QuantisedArray(
        pack(codes, SCALES), largest, offsets, SCALES, shape, scales.dtype
    )


class _Shards:
    """The sharding of an array, and those of the parts of its quantised form."""

    def __init__(self, name: str, w: Any, layout: _Layout, fix: str = _FIX):
        sharding = known_sharding(w)
        self.sharding = sharding
        self.layout = layout
        if not isinstance(sharding, NamedSharding):
            return
        spec = [*sharding.spec, *(None,) * (len(w.shape) - len(sharding.spec))]
        stored = [spec[axis] for axis in layout.order]
        shape = sharding.shard_shape(tuple(w.shape))
        local = [shape[axis] for axis in layout.order][layout.leading :]
        is_split = tuple(local) != layout.inner
        if is_split and (
            math.prod(local) % layout.block or tuple(local[1:]) != layout.inner[1:]
        ):
            axis = next(
                x
                for x, size in zip(layout.order[layout.leading :], local)
                if size != w.shape[x]
            )
            raise ValueError(
                f"Blocks of {layout.block} entries of {name}, of shape "
                f"{tuple(w.shape)}, would lie across shards: its axis {axis} is "
                f"sharded as {spec[axis]!r}. {fix}"
            )
        self.spec = stored[: layout.leading + 1]

    def find_shardings(self, array: QuantisedArray) -> Any:
        """The sharding of each part of the quantised form."""
        return jax.tree.map(lambda x: self._find(x, array), array)

    def gather_scales(self, array: QuantisedArray) -> QuantisedArray:
        """The array with whole scales on each device, so that their mean is summed up
        in the same order on any mesh."""
        if not isinstance(self.sharding, NamedSharding):
            return array
        whole = NamedSharding(
            self.sharding.mesh, PartitionSpec(*self.spec[: self.layout.batch])
        )
        return array.replace(
            scales=jax.device_put(array.scales, whole),
            offsets=jax.device_put(array.offsets, whole),
        )

    def mark(self, array: QuantisedArray) -> QuantisedArray:
        """The abstract quantised form, with shardings."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=self._find(x, array)
            ),
            array,
        )

    def _find(self, x: Any, array: QuantisedArray) -> Any:
        if not isinstance(self.sharding, NamedSharding):
            return self.sharding
        own = [*array.codes, array.scales, array.offsets]
        spec: Sequence[Any] = self.spec
        if not any(x is part for part in own):
            # Nested scales: batch axes, and then all others in one.
            spec = spec[: self.layout.batch]
        return NamedSharding(self.sharding.mesh, PartitionSpec(*spec))

"""What is done with a quantised array, for the protocol of `_factored.base`.

Products need nothing here: they take the dense array, made where it is used.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from .._factored import (
    dense,
    find_explicit_sharding,
    gather,
    Label,
    Labels,
    map_arrays,
    NotFactored,
    views,
)
from .._shared import accumulation_dtype, axes_from_end, explicit_sharding, relabel
from .array import is_quantised, QuantisedArray
from .packing import round_apart, unpack_values


@dense.register
def _(base: QuantisedArray) -> Array:
    if (sharding := find_explicit_sharding(base)) is None:
        return _form_dense(base)
    form_dense: Any = jax.sharding.auto_axes(_form_dense, out_sharding=sharding)
    return form_dense(base)


def _form_dense(base: QuantisedArray) -> Array:
    # Checks that the parts fit each other.
    stored = base.stored_shape
    scales, offsets = lax.stop_gradient((_plain(base.scales), _plain(base.offsets)))
    values, scales = unpack_values(base.codes, base.format), scales.astype(jnp.float32)
    is_affine = base.format.codebook is None
    is_short = not is_quantised(base.scales) and base.scales.dtype == jnp.float16
    if offsets is not None and is_affine and not is_short:
        # The product with a whole number is exact then, and the sum is the same whether
        # or not the compiler multiplies and adds at once. Plain scales are short
        # already; nested ones are rounded here. Scales in float16, of files, always are
        # short, and rounding them for each entry takes as long as all else in a scan.
        scales = lax.reduce_precision(scales, 8, 23 - sum(base.format.bits))
    array = values * scales[..., None]
    if offsets is not None:
        if not is_affine:
            # As bitsandbytes does.
            array = round_apart(array)
        array = array + offsets.astype(jnp.float32)[..., None]
    count = len(base.inner)
    array = array.reshape(*array.shape[:-2], -1)
    size = 1
    for each in stored[-count:]:
        size *= each
    array = array[..., :size].reshape(stored)
    dtype = base.dtype
    if dtype.itemsize < 4:
        # As if it were stored in that dtype; a cast there and back would be left out.
        info = jnp.finfo(dtype)
        array = lax.reduce_precision(array, info.nexp, info.nmant)
    array = array.astype(accumulation_dtype(dtype))
    return array.transpose([axis % base.ndim for axis in base.stored_axes])


def _plain(scales: Any) -> Any:
    return dense(scales) if is_quantised(scales) else scales


@find_explicit_sharding.register
def _(base: QuantisedArray) -> NamedSharding | None:
    sharding = explicit_sharding(base.codes[0])
    return relabel(sharding, base.code_axes, base.stored_axes)


@map_arrays.register
def _(
    base: QuantisedArray,
    fn: Callable[[Any, Labels], Any],
    labels: Labels,
    moved: Collection[Label] = (),
) -> QuantisedArray:
    stored = _store_labels(base, labels)
    leading, inner = stored[: -len(base.inner)], stored[-len(base.inner) :]
    if set(inner) & set(moved):
        raise NotFactored("the blocks of a quantised array lie along that axis")
    blocks = [*leading, inner[0]]

    def of_scales(scales: Any) -> Any:
        if not is_quantised(scales):
            return None if scales is None else fn(scales, blocks)
        try:
            return map_arrays(scales, fn, blocks, moved)
        except NotFactored:
            return fn(_plain(scales), blocks)

    return base.replace(
        codes=tuple(fn(plane, [*blocks, None]) for plane in base.codes),
        scales=of_scales(base.scales),
        offsets=of_scales(base.offsets),
    )


def _store_labels(base: QuantisedArray, labels: Labels) -> list[Label]:
    by_axis = dict(zip(base.stored_axes, labels, strict=True))
    return [by_axis[axis] for axis in axes_from_end(base.ndim)]


@gather.register
def _(
    x: QuantisedArray,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    *,
    fill_value: Any = None,
    **options: Any,
) -> QuantisedArray:
    numbers = dimension_numbers
    count = x.ndim - len(x.inner)
    picked = {*numbers.start_index_map, *numbers.operand_batching_dims}
    picked |= {i for i, size in enumerate(slice_sizes) if size != x.shape[i]}
    kept = x.ndim - len({*numbers.collapsed_slice_dims, *numbers.operand_batching_dims})
    first = indices.ndim - 1
    is_last = tuple(numbers.offset_dims) == tuple(range(first, first + kept))
    if x.permutation is not None or max(picked, default=0) >= count or not is_last:
        raise NotFactored("it picks parts of the blocks of a quantised array")

    def pick(array: Any, fill: Any = 0) -> Any:
        if array is None:
            return None
        if is_quantised(array):
            # Nested scales, of which the same axes come first.
            if array.ndim - len(array.inner) < count:
                return pick(dense(array), fill)
            return array.replace(
                codes=tuple(map(pick, array.codes)),
                scales=pick(array.scales, fill),
                offsets=pick(array.offsets, fill),
            )
        extra = array.ndim - count
        of_array = numbers._replace(
            offset_dims=tuple(range(first, first + kept - len(x.inner) + extra))
        )
        sizes = (*slice_sizes[:count], *array.shape[count:])
        # What is out of bounds has a scale that is not a number, and a code of zero.
        return lax.gather(array, indices, of_array, sizes, fill_value=fill, **options)

    if fill_value not in (None, 0):
        raise NotFactored("what is out of bounds would be scaled too")
    return pick(x, fill_value)


@views.transpose.register
def _(x: QuantisedArray, permutation: Sequence[int]) -> QuantisedArray:
    return x.transpose(permutation)


@views.is_led_by_first_axis.register
def _(x: QuantisedArray) -> bool:
    return x.stored_axes[0] == -x.ndim and x.ndim > len(x.inner)


@views.convert.register
def _(x: QuantisedArray, dtype: DTypeLike) -> QuantisedArray:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NotFactored(f"it asks for {jnp.dtype(dtype).name}")
    return x.astype(dtype)


@views.squeeze.register
def _(x: QuantisedArray, dimensions: Sequence[int]) -> QuantisedArray:
    if not (dimensions := sorted(dimension % x.ndim for dimension in dimensions)):
        return x
    if x.permutation is not None or dimensions[-1] >= x.ndim - len(x.inner):
        raise NotFactored("the blocks of a quantised array lie along that axis")
    return jax.tree.map(lambda array: lax.squeeze(array, dimensions), _level(x))


@views.expand.register
def _(x: QuantisedArray, sizes: Sequence[int], dimensions: Sequence[int]) -> Any:
    if list(dimensions) != list(range(len(sizes))):
        raise NotFactored("it repeats a quantised array")
    return jax.tree.map(lambda array: views.expand(array, sizes, dimensions), _level(x))


def _level(x: QuantisedArray) -> QuantisedArray:
    """`x` with scales whose leading axes are those of the codes."""
    return x.replace(scales=_plain(x.scales), offsets=_plain(x.offsets))

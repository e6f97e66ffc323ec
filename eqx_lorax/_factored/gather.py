"""Picking entries of a weight by indices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .._shared import AnyArray, axes_from_end
from .base import add, dense, multiply_factors, refuse, register_arrays
from .form import Base, Factored
from .products import Label, Labels, NotFactored, scale_along
from .views import renumber


@functools.singledispatch
def gather(
    x: Base,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **options: Any,
) -> Base | Array:
    """As in `jax.lax`. What is picked of a `Factored` along batch axes alone is a
    `Factored`. What is looked up along rows or columns, as in an embedding, is an
    array."""
    raise refuse(x, "gather")


@register_arrays(gather)
def _(
    x: AnyArray,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **options: Any,
) -> Array:
    return lax.gather(x, indices, dimension_numbers, tuple(slice_sizes), **options)


@gather.register
def _(
    x: Factored,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    *,
    mode: Any = None,
    fill_value: Any = None,
    **flags: Any,
) -> Factored | Array:
    numbers = dimension_numbers
    x = x.without_gate()
    if fill_value is not None and fill_value != fill_value:
        # Not a number, as `jnp.take` fills in. It stays so whatever it is scaled by.
        fill_value = None
    if x.gain is not None and fill_value not in (None, 0):
        raise NotFactored("what is out of bounds would be scaled too")
    logical = x.logical_axes()
    size_of: dict[Label, int] = dict(zip(logical, slice_sizes, strict=True))
    collapsed = {logical[i] for i in numbers.collapsed_slice_dims}
    batched: dict[Label, int] = dict(
        zip(
            (logical[i] for i in numbers.operand_batching_dims),
            numbers.start_indices_batching_dims,
        )
    )
    column_of: dict[Label, int] = {
        logical[i]: j for j, i in enumerate(numbers.start_index_map)
    }
    full = dict(zip(logical, x.shape))
    picked = {axis for axis in logical if axis in column_of or axis in batched}
    picked |= {axis for axis in logical if size_of[axis] != full[axis]}
    if not picked:
        raise NotFactored("it picks nothing")
    index_labels: list[Label] = [("index", i) for i in range(indices.ndim - 1)]
    count = len(index_labels)

    def pick(array: Any, axes: Labels, fill: Any) -> tuple[Any, Labels]:
        if not picked & set(axes):
            return array, axes
        at = dict(enumerate(axes))
        rest = [a for a in axes if a not in collapsed and a not in batched]
        in_part = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(count, count + len(rest))),
            collapsed_slice_dims=tuple(i for i, a in at.items() if a in collapsed),
            start_index_map=tuple(i for i, a in at.items() if a in column_of),
            operand_batching_dims=tuple(i for i, a in at.items() if a in batched),
            start_indices_batching_dims=tuple(batched[a] for a in axes if a in batched),
        )
        columns = jnp.asarray([column_of[a] for a in axes if a in column_of], int)
        sizes: list[Any] = [size_of.get(a, array.shape[i]) for i, a in at.items()]
        found = gather(
            array,
            indices[..., columns],
            in_part,
            sizes,
            mode=mode,
            fill_value=fill,
            **flags,
        )
        return found, [*index_labels, *rest]

    stored = list(axes_from_end(x.ndim))
    offsets = iter([a for a in logical if a not in collapsed and a not in batched])
    indexed = iter(index_labels)
    out_labels = [
        next(offsets if i in numbers.offset_dims else indexed)
        for i in range(count + len(numbers.offset_dims))
    ]
    w, w_labels = pick(x.differentiable_base(), stored, fill_value)
    b, b_labels = pick(x.b, x.b_labels(stored), 0)
    a, a_labels = pick(x.a, x.a_labels(stored), 0)
    gain, gain_labels = x.gain, stored
    if gain is not None:
        gain, gain_labels = pick(gain, x.gain_labels(stored), 1)
    # Of a base alone, too, vectors are looked up: what is left is no weight.
    own = [size for label, size in zip(w_labels, w.shape) if label in stored]
    is_lookup = x.rank == 0 and sum(size > 1 for size in own) < 2
    if picked <= set(x.batch_axes()) and not is_lookup:
        x = x.replace(base=w, b=b, a=a, gain=gain)
        return renumber(x, w_labels, out_labels)
    base = dense(w)
    found = base
    if x.rank:
        update = multiply_factors(b, b_labels, a, a_labels, w_labels, base)
        found = add(base, x.scale * update)
    if gain is not None:
        found = scale_along(found, w_labels, gain, gain_labels)
    order = [w_labels.index(label) for label in out_labels]
    return lax.transpose(found, order).astype(x.dtype)


def take(x: Base, position: int, index: ArrayLike) -> Base | Array:
    """`x` indexed along one axis, where the axes of `index` then stand; `index` counts
    from the end where it is negative."""
    index = jnp.asarray(index)
    index = jnp.where(index < 0, index + x.shape[position], index)
    stay = [i for i in range(x.ndim) if i != position]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(i if i < position else i + index.ndim - 1 for i in stay),
        collapsed_slice_dims=(position,),
        start_index_map=(position,),
    )
    sizes = [1 if i == position else size for i, size in enumerate(x.shape)]
    return gather(x, index[..., None], numbers, sizes, mode="promise_in_bounds")

"""Picking entries of a weight by indices."""

from collections.abc import Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .._shared import is_array
from . import products
from .products import Label, NotFactored
from .views import add, dense, low_rank_product, renumbered, Viewed


def gather(
    x: Viewed,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    *,
    mode: Any = None,
    fill_value: Any = None,
    **flags: Any,
) -> Viewed:
    """As `jax.lax.gather`. What is picked along batch axes alone is still a weight;
    what is looked up along rows or columns, as an embedding does, is an array."""
    numbers = dimension_numbers
    if is_array(x):
        return lax.gather(
            x,
            indices,
            numbers,
            tuple(slice_sizes),
            mode=mode,
            fill_value=fill_value,
            **flags,
        )
    lora = x.as_lora()
    if lora.gain is not None and fill_value not in (None, 0):
        raise NotFactored("what is out of bounds would be scaled too")
    shown = lora.shown_axes()
    size_of: dict[Label, int] = dict(zip(shown, slice_sizes, strict=True))
    collapsed = {shown[i] for i in numbers.collapsed_slice_dims}
    batched = dict(
        zip(
            (shown[i] for i in numbers.operand_batching_dims),
            numbers.start_indices_batching_dims,
        )
    )
    column_of = {shown[i]: j for j, i in enumerate(numbers.start_index_map)}
    full = dict(zip(shown, lora.shape))
    picked = {axis for axis in shown if axis in column_of or axis in batched}
    picked |= {axis for axis in shown if size_of[axis] != full[axis]}
    if not picked:
        raise NotFactored("it picks nothing")
    index_labels: list[Label] = [("index", i) for i in range(indices.ndim - 1)]
    count = len(index_labels)

    def part(
        array: Any, axes: Sequence[Label], fill: Any
    ) -> tuple[Any, Sequence[Label]]:
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

    stored = list(range(-lora.w.ndim, 0))
    offsets = iter([a for a in shown if a not in collapsed and a not in batched])
    indexed = iter(index_labels)
    out_labels = [
        next(offsets if i in numbers.offset_dims else indexed)
        for i in range(count + len(numbers.offset_dims))
    ]
    w, w_labels = part(lora.base(), stored, fill_value)
    b, b_labels = part(lora.b, lora.b_axes(stored), 0)
    a, a_labels = part(lora.a, lora.a_axes(stored), 0)
    gain, gain_labels = lora.gain, stored
    if gain is not None:
        axes = [i if gain.shape[i] == lora.w.shape[i] else None for i in stored]
        gain, gain_labels = part(gain, axes, 1)
    if picked <= set(lora.batch_axes()):
        lora = lora.replace(w=w, b=b, a=a, gain=gain)
        return renumbered(lora, w_labels, out_labels)
    base = dense(w)
    low_rank = low_rank_product(b, b_labels, a, a_labels, w_labels, base)
    found = add(base, lora.scale * low_rank)
    if gain is not None:
        found = products.scaled(found, w_labels, gain, gain_labels)
    order = [w_labels.index(label) for label in out_labels]
    return lax.transpose(found, order).astype(x.dtype)


def take(x: Viewed, position: int, index: ArrayLike) -> Viewed:
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

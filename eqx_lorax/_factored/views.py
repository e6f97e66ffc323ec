"""What only moves, picks or repeats the entries of a weight, and so can be done to the
base and to the factors apart.

Each function here takes an array or a factored weight, does the same to either, and
raises `NotFactored` for a weight whose rows and columns would be mixed.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TYPE_CHECKING, TypeAlias

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from .._shared import accumulation_dtype, is_array, promote, sharding
from . import products
from .products import Label, NotFactored


if TYPE_CHECKING:
    from .._methods import LoraWeight

# An array or a factored weight.
Viewed: TypeAlias = Any


def dense(x: Viewed) -> Array:
    """The array that `x` stands for, in `wide` of its dtype, frozen where it is."""
    if is_array(x):
        return jnp.asarray(x, accumulation_dtype(x.dtype))
    lora = x.as_lora()
    stored = range(-lora.w.ndim, 0)
    base = dense(lora.base())
    low_rank = low_rank_product(
        lora.b, lora.b_axes(stored), lora.a, lora.a_axes(stored), stored, base
    )
    whole = add(base, lora.scale * low_rank)
    if lora.gain is not None:
        whole = products.scaled(whole, stored, lora.gain, stored)
    return lax.transpose(whole, [axis % whole.ndim for axis in lora.shown_axes()])


def explicit_sharding(x: Viewed) -> NamedSharding | None:
    """The sharding that the type of the array has, or would have, on explicit axes."""
    if is_array(x):
        return sharding.explicit_sharding(x)
    lora = x.as_lora()
    stored = range(-lora.w.ndim, 0)
    return sharding.relabel(explicit_sharding(lora.w), stored, lora.shown_axes())


def low_rank_product(
    b: Array,
    b_labels: Sequence[Label],
    a: Array,
    a_labels: Sequence[Label],
    out_labels: Sequence[Label],
    base: Array,
) -> Array:
    """`b · a`, in `wide` of their common dtype, where the `base` lies to which it is
    added."""
    dtype = promote(b.dtype, a.dtype)
    return products.product(
        b,
        b_labels,
        a,
        a_labels,
        out_labels,
        dtype,
        out_sharding=explicit_sharding(base),
    )


def add(x: Array, y: Array) -> Array:
    """The sum, in the common dtype."""
    dtype = promote(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def transpose(x: Viewed, permutation: Sequence[int]) -> Viewed:
    """As `jax.lax.transpose`; a view, that moves nothing, of a weight."""
    if isinstance(x, np.ndarray):
        # Not by way of JAX, which would round what has 64 bits.
        return x.transpose(permutation)
    if is_array(x):
        return lax.transpose(x, permutation)
    return x.factored().reordered(permutation)


def convert(x: Viewed, dtype: DTypeLike) -> Viewed:
    """The base in another inexact dtype; the factors, which may be wider, keep
    theirs."""
    if is_array(x):
        return lax.convert_element_type(x, dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise NotFactored(f"a weight of dtype {jnp.dtype(dtype).name} has no factors")
    lora = x.as_lora()
    kinds = promote(lora.b.dtype, lora.a.dtype), dtype
    was, is_complex = (jnp.issubdtype(x, jnp.complexfloating) for x in kinds)
    if was and not is_complex:
        raise NotFactored("the real part of an update has another rank")
    return lora.replace(w=convert(lora.w, dtype))


def scaled(x: Viewed, gain: Array) -> Viewed:
    """`x * gain`. The gain of a weight is constant along its rows or along its
    columns, and is not multiplied out: a product of the base's shape would be formed,
    and another for the gradient in `gain`."""
    if is_array(x):
        return x * gain
    lora = x.as_lora()
    gain = jnp.asarray(gain)
    if gain.ndim == 0:
        gain = gain.reshape((1,) * lora.ndim)
    stored = list(range(-lora.w.ndim, 0))
    gain = lax.transpose(gain, [lora.shown_axes().index(axis) for axis in stored])
    varying = {axis for axis in stored if gain.shape[axis] != 1}
    if varying & {*lora.rows} and varying & {*lora.columns}:
        raise NotFactored("the other factor varies along rows and columns")
    if lora.gain is not None:
        gain = gain * lora.gain.astype(gain.dtype)
        both = {axis for axis in stored if gain.shape[axis] != 1}
        if both & {*lora.rows} and both & {*lora.columns}:
            raise NotFactored("rows and columns are scaled")
    # Full along the batch axes: whoever slices the weight there slices all its leaves.
    batch = lora.batch_axes()
    shape = [lora.w.shape[i] if i in batch else gain.shape[i] for i in stored]
    return lora.replace(gain=jnp.broadcast_to(gain, shape))


def slice_(
    x: Viewed,
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Viewed:
    """As `jax.lax.slice`."""
    if is_array(x):
        return lax.slice(x, starts, limits, strides)
    steps = strides or (1,) * x.ndim
    by_axis = _by_axis(x, list(zip(starts, limits, steps, strict=True)))

    def part(array: Viewed, axes: Sequence[Label]) -> Viewed:
        bounds = [
            by_axis.get(axis, (0, size, 1)) for axis, size in zip(axes, array.shape)
        ]
        return slice_(array, *zip(*bounds))

    return x.as_lora().map_arrays(part)


def dynamic_slice(
    x: Viewed, starts: Sequence[ArrayLike], sizes: Sequence[int]
) -> Viewed:
    """As `jax.lax.dynamic_slice`."""
    if is_array(x):
        return lax.dynamic_slice(x, starts, sizes)
    by_axis = _by_axis(x, list(zip(starts, sizes, strict=True)))
    zero = jnp.zeros_like(starts[0])

    def part(array: Viewed, axes: Sequence[Label]) -> Viewed:
        bounds = [
            by_axis.get(axis, (zero, size)) for axis, size in zip(axes, array.shape)
        ]
        return dynamic_slice(array, *zip(*bounds))

    return x.as_lora().map_arrays(part)


def reverse(x: Viewed, dimensions: Sequence[int]) -> Viewed:
    """As `jax.lax.rev`."""
    if is_array(x):
        return lax.rev(x, tuple(dimensions))
    lora = x.as_lora()
    reversed_axes = {lora.shown_axes()[dimension] for dimension in dimensions}
    return lora.map_arrays(
        lambda array, axes: reverse(
            array, [i for i, axis in enumerate(axes) if axis in reversed_axes]
        )
    )


def _by_axis(x: Viewed, of_shown: Sequence[Any]) -> dict[Label, Any]:
    return dict(zip(x.as_lora().shown_axes(), of_shown, strict=True))


def squeeze(x: Viewed, dimensions: Iterable[int]) -> Viewed:
    """As `jax.lax.squeeze`."""
    if is_array(x):
        return lax.squeeze(x, tuple(dimensions))
    lora = x.as_lora()
    shown = lora.shown_axes()
    gone = {shown[dimension] for dimension in dimensions}

    def part(array: Viewed, axes: Sequence[Label]) -> Viewed:
        return squeeze(array, [i for i, axis in enumerate(axes) if axis in gone])

    stored = [axis for axis in range(-lora.w.ndim, 0) if axis not in gone]
    shown = [axis for axis in shown if axis not in gone]
    return renumbered(lora.map_arrays(part), stored, shown)


def expand(x: Viewed, sizes: Sequence[int], dimensions: Sequence[int]) -> Viewed:
    """`x` repeated along new axes of the `sizes`, which stand at the `dimensions` of
    the result. To a weight they are batch axes."""
    if not sizes:
        return x
    ndim = x.ndim + len(sizes)
    kept = [i for i in range(ndim) if i not in dimensions]
    if is_array(x):
        shape = [*sizes, *x.shape]
        leading = lax.broadcast_in_dim(x, shape, range(len(sizes), ndim))
        order = [*dimensions, *kept]
        return lax.transpose(leading, [order.index(i) for i in range(ndim)])
    lora = x.as_lora()

    def part(array: Viewed, axes: Sequence[Label]) -> Viewed:
        return expand(array, sizes, range(len(sizes)))

    shown = iter(lora.shown_axes())
    new = dict(zip(dimensions, range(-ndim, -lora.w.ndim)))
    order = [new[i] if i in new else next(shown) for i in range(ndim)]
    return lora.map_arrays(part).replace(order=tuple(order))


def broadcast_in_dim(
    x: Viewed, shape: Sequence[int], dimensions: Sequence[int]
) -> Viewed:
    """As `jax.lax.broadcast_in_dim`."""
    if is_array(x):
        return lax.broadcast_in_dim(x, shape, dimensions)
    stretched = [i for i, d in enumerate(dimensions) if x.shape[i] != shape[d]]
    x = squeeze(x, stretched) if stretched else x
    kept = [d for i, d in enumerate(dimensions) if i not in stretched]
    new = [d for d in range(len(shape)) if d not in kept]
    return expand(x, [shape[d] for d in new], new)


def reshape(x: Viewed, shape: Sequence[int]) -> Viewed:
    """As `jax.lax.reshape`, as long as no row is merged with a column or either with a
    batch axis."""
    if is_array(x):
        return lax.reshape(x, shape)
    if 0 in shape:
        raise NotFactored("it is empty")
    # Axes of size one can go anywhere, so they go first and come back last.
    x = squeeze(x, [i for i, size in enumerate(x.shape) if size == 1])
    ones = [i for i, size in enumerate(shape) if size == 1]
    lora = in_order(x.as_lora())
    groups = _reshape_groups(lora.shape, [size for size in shape if size != 1])
    kinds = [
        "row" if axis in lora.rows else "column" if axis in lora.columns else "batch"
        for axis in range(-lora.w.ndim, 0)
    ]
    stored: list[int] = list(range(-lora.w.ndim, 0))
    new_axes: dict[str, list[int]] = {"row": [], "column": [], "batch": []}
    new_sizes: dict[Label, tuple[int, ...]] = {}
    end = -sum(len(sizes) for _, sizes in groups)
    for axes, sizes in groups:
        if len({kinds[axis] for axis in axes}) > 1:
            kinds_merged = " and ".join(
                sorted({f"{kinds[axis]} axes" for axis in axes})
            )
            raise NotFactored(f"it merges {kinds_merged}")
        new_axes[kinds[axes[0]]] += range(end, end + len(sizes))
        end += len(sizes)
        new_sizes[stored[axes[0]]] = sizes
        new_sizes |= {stored[axis]: () for axis in axes[1:]}

    def part(array: Viewed, axes: Sequence[Label]) -> Viewed:
        of_axes = [
            new_sizes.get(axis, (size,)) for axis, size in zip(axes, array.shape)
        ]
        return reshape(array, [size for sizes in of_axes for size in sizes])

    gain = lora.gain
    if gain is not None:
        old, new = [], []
        for axes, sizes in groups:
            constant = all(gain.shape[axis] == 1 for axis in axes)
            old += [1 if constant else lora.shape[axis] for axis in axes]
            new += [1 if constant else size for size in sizes]
        gain = jnp.broadcast_to(gain, old).reshape(new)
    lora = lora.replace(gain=None).map_arrays(part)
    lora = lora.replace(
        rows=tuple(new_axes["row"]), columns=tuple(new_axes["column"]), gain=gain
    )
    return expand(lora, [1] * len(ones), ones)


def in_order(lora: "LoraWeight") -> "LoraWeight":
    """The same weight stored in the order in which it is shown, with the axes of rows
    and of columns in that order too."""
    shown = lora.shown_axes()
    ndim = lora.w.ndim
    w = transpose(lora.w, [axis % ndim for axis in shown])
    place: dict[Label, Any] = {axis: i - ndim for i, axis in enumerate(shown)}
    batch = sorted(place[axis] for axis in lora.batch_axes())
    rows = sorted(place[axis] for axis in lora.rows)
    columns = sorted(place[axis] for axis in lora.columns)

    def ordered(array: Any, axes: Sequence[Label], wanted: Sequence[Label]) -> Any:
        if array is None:  # In the frozen part of a model.
            return None
        now = [place.get(axis, axis) for axis in axes]
        return lax.transpose(array, [now.index(label) for label in wanted])

    stored = range(-ndim, 0)
    return lora.replace(
        w=w,
        b=ordered(lora.b, lora.b_axes(stored), [*batch, *rows, products.RANK]),
        a=ordered(lora.a, lora.a_axes(stored), [*batch, products.RANK, *columns]),
        gain=None
        if lora.gain is None
        else lax.transpose(lora.gain, [axis % ndim for axis in shown]),
        rows=tuple(rows),
        columns=tuple(columns),
        order=None,
    )


def _reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest runs of axes of `old` and the sizes of `new` that they become."""
    groups = []
    i = j = 0
    while i < len(old):
        start, begin = i, j
        before, after = old[i], new[j]
        i, j = i + 1, j + 1
        while before != after:
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, j = after * new[j], j + 1
        groups.append((tuple(range(start, i)), tuple(new[begin:j])))
    return groups


def renumbered(
    lora: "LoraWeight", stored: Sequence[Label], shown: Sequence[Label]
) -> "LoraWeight":
    """`lora`, whose base now has the axes `stored` of those that there were, in the
    order `shown`."""
    new = {axis: i - len(stored) for i, axis in enumerate(stored)}
    return lora.replace(
        rows=tuple(new[axis] for axis in lora.rows if axis in new),
        columns=tuple(new[axis] for axis in lora.columns if axis in new),
        order=tuple(new[axis] for axis in shown),
    )

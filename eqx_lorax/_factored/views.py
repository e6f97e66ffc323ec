"""What only moves, picks, repeats or scales the entries of a weight, and so is done to
its base and its factors separately.

Each function takes a base (see `base`) and does to it what the function of `jax.lax` of
that name does to an array. It raises `NotFactored` where rows and columns would mix.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from .._shared import AnyArray, axes_from_end, promote
from .base import map_arrays, refuse, register_arrays
from .form import Base, Factored
from .products import Label, Labels, NotFactored, RANK


@functools.singledispatch
def transpose(x: Base, permutation: Sequence[int]) -> Base:
    """As in `jax.lax`. Nothing is moved in a `Factored`."""
    raise refuse(x, "transpose")


@register_arrays(transpose)
def _(x: AnyArray, permutation: Sequence[int]) -> Array:
    if isinstance(x, np.ndarray):
        # Not by JAX, which would round numbers of 64 bits.
        return x.transpose(permutation)
    return lax.transpose(x, permutation)


@transpose.register
def _(x: Factored, permutation: Sequence[int]) -> Factored:
    return x.transpose(permutation)


@functools.singledispatch
def convert(x: Base, dtype: DTypeLike) -> Base:
    """`x` in another inexact dtype. The factors of a `Factored`, which may be wider,
    keep theirs."""
    raise refuse(x, "convert")


@register_arrays(convert)
def _(x: AnyArray, dtype: DTypeLike) -> Array:
    return lax.convert_element_type(x, dtype)


@convert.register
def _(x: Factored, dtype: DTypeLike) -> Factored:
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise NotFactored(f"a weight of dtype {jnp.dtype(dtype).name} has no factors")
    kinds = promote(x.b.dtype, x.a.dtype), dtype
    was, is_complex = (jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds)
    if was and not is_complex:
        raise NotFactored("the real part of an update has another rank")
    return x.replace(base=convert(x.base, dtype))


def scale(x: Factored, gain: Array) -> Factored:
    """`x * gain`. The gain is constant along the rows or along the columns, and is not
    multiplied out: that would form a product of the base's shape, and another one for
    the gradient of the gain."""
    gain = jnp.asarray(gain)
    if gain.ndim == 0:
        gain = gain.reshape((1,) * x.ndim)
    stored = list(axes_from_end(x.ndim))
    logical = x.logical_axes()
    gain = lax.transpose(gain, [logical.index(axis) for axis in stored])
    if _varies_along_both(x, gain):
        raise NotFactored("the other factor varies along rows and columns")
    if x.gain is not None:
        gain = gain * x.gain.astype(gain.dtype)
        if _varies_along_both(x, gain):
            raise NotFactored("rows and columns are scaled")
    # Of full size along batch axes: slicing the weight there slices all its leaves.
    batch = x.batch_axes()
    shape = [x.base.shape[i] if i in batch else gain.shape[i] for i in stored]
    return x.replace(gain=jnp.broadcast_to(gain, shape))


def _varies_along_both(x: Factored, gain: Array) -> bool:
    varying = {axis for axis in axes_from_end(x.ndim) if gain.shape[axis] != 1}
    return not (varying.isdisjoint(x.rows) or varying.isdisjoint(x.columns))


def slice_(
    x: Base,
    starts: Sequence[int],
    limits: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Base:
    steps = strides or (1,) * x.ndim
    bounds: dict[Label, Any] = dict(enumerate(zip(starts, limits, steps, strict=True)))

    def of_array(array: Array, labels: Labels) -> Array:
        own = [
            bounds.get(label, (0, size, 1)) for label, size in zip(labels, array.shape)
        ]
        return lax.slice(array, *zip(*own))

    moved = [i for i, size in enumerate(x.shape) if bounds[i] != (0, size, 1)]
    return map_arrays(x, of_array, range(x.ndim), moved)


def dynamic_slice(x: Base, starts: Sequence[ArrayLike], sizes: Sequence[int]) -> Base:
    bounds: dict[Label, Any] = dict(enumerate(zip(starts, sizes, strict=True)))
    zero = jnp.zeros_like(starts[0])

    def of_array(array: Array, labels: Labels) -> Array:
        own = [
            bounds.get(label, (zero, size)) for label, size in zip(labels, array.shape)
        ]
        return lax.dynamic_slice(array, *zip(*own))

    moved = [i for i, size in enumerate(x.shape) if sizes[i] != size]
    return map_arrays(x, of_array, range(x.ndim), moved)


def reverse(x: Base, dimensions: Sequence[int]) -> Base:
    """As `jax.lax.rev`."""

    def of_array(array: Array, labels: Labels) -> Array:
        return lax.rev(array, [i for i, x in enumerate(labels) if x in dimensions])

    return map_arrays(x, of_array, range(x.ndim), dimensions)


@functools.singledispatch
def squeeze(x: Base, dimensions: Iterable[int]) -> Base:
    raise refuse(x, "squeeze")


@register_arrays(squeeze)
def _(x: AnyArray, dimensions: Iterable[int]) -> Array:
    return lax.squeeze(x, tuple(dimensions))


@squeeze.register
def _(x: Factored, dimensions: Iterable[int]) -> Factored:
    logical = x.logical_axes()
    gone = {logical[dimension] for dimension in dimensions}

    def squeezed(array: Base, labels: Labels) -> Base:
        return squeeze(array, [i for i, axis in enumerate(labels) if axis in gone])

    stored = list(axes_from_end(x.ndim))
    new = x.map_factors(squeezed, stored).replace(base=squeezed(x.base, stored))
    stored = [axis for axis in stored if axis not in gone]
    return renumber(new, stored, [axis for axis in logical if axis not in gone])


def renumber(x: Factored, stored: Labels, logical: Labels) -> Factored:
    """`x`, whose base now has these of the axes that it had: `stored` in the order in
    which they are stored, `logical` in the order of `shape`."""
    new = {axis: i - len(stored) for i, axis in enumerate(stored)}
    x = x.replace(
        rows=tuple(new[axis] for axis in x.rows if axis in new),
        columns=tuple(new[axis] for axis in x.columns if axis in new),
    )
    return x.with_axes([new[axis] for axis in logical])


@functools.singledispatch
def expand(x: Base, sizes: Sequence[int], dimensions: Sequence[int]) -> Base:
    """`x` repeated along new axes of these sizes, which are the `dimensions` of the
    result. In a `Factored` they are batch axes."""
    raise refuse(x, "expand")


@register_arrays(expand)
def _(x: AnyArray, sizes: Sequence[int], dimensions: Sequence[int]) -> Array:
    if not sizes:
        return x
    ndim = x.ndim + len(sizes)
    leading = lax.broadcast_in_dim(x, [*sizes, *x.shape], range(len(sizes), ndim))
    order = [*dimensions, *(i for i in range(ndim) if i not in dimensions)]
    return lax.transpose(leading, [order.index(i) for i in range(ndim)])


@expand.register
def _(x: Factored, sizes: Sequence[int], dimensions: Sequence[int]) -> Factored:
    if not sizes:
        return x
    ndim = x.ndim + len(sizes)

    def expanded(array: Base, labels: Labels) -> Base:
        return expand(array, sizes, range(len(sizes)))

    logical = iter(x.logical_axes())
    new = dict(zip(dimensions, range(-ndim, -x.ndim)))
    order = [new[i] if i in new else next(logical) for i in range(ndim)]
    stored = axes_from_end(x.ndim)
    whole = x.map_factors(expanded, stored).replace(base=expanded(x.base, stored))
    return whole.with_axes(order)


def broadcast_in_dim(
    x: Factored, shape: Sequence[int], dimensions: Sequence[int]
) -> Factored:
    stretched = [i for i, d in enumerate(dimensions) if x.shape[i] != shape[d]]
    x = squeeze(x, stretched) if stretched else x
    kept = [d for i, d in enumerate(dimensions) if i not in stretched]
    new = [d for d in range(len(shape)) if d not in kept]
    return expand(x, [shape[d] for d in new], new)


@functools.singledispatch
def reshape(x: Base, shape: Sequence[int]) -> Base:
    """As in `jax.lax`, as long as no row is merged with a column, nor either with a
    batch axis."""
    raise refuse(x, "reshape")


@register_arrays(reshape)
def _(x: AnyArray, shape: Sequence[int]) -> Array:
    return lax.reshape(x, shape)


@reshape.register
def _(x: Factored, shape: Sequence[int]) -> Factored:
    if 0 in shape:
        raise NotFactored("it is empty")
    # Axes of size one can go anywhere, so they go first and come back last.
    x = squeeze(x, [i for i, size in enumerate(x.shape) if size == 1])
    ones = [i for i, size in enumerate(shape) if size == 1]
    x = store_in_order(x)
    groups = _group_axes(x.shape, [size for size in shape if size != 1])
    kinds = [
        "row" if axis in x.rows else "column" if axis in x.columns else "batch"
        for axis in axes_from_end(x.ndim)
    ]
    new_axes: dict[str, list[int]] = {"row": [], "column": [], "batch": []}
    new_sizes: dict[Label, tuple[int, ...]] = {}
    end = -sum(len(sizes) for _, sizes in groups)
    for axes, sizes in groups:
        if len({kinds[axis] for axis in axes}) > 1:
            merged = " and ".join(sorted({f"{kinds[axis]} axes" for axis in axes}))
            raise NotFactored(f"it merges {merged}")
        new_axes[kinds[axes[0]]] += range(end, end + len(sizes))
        end += len(sizes)
        first, *rest = (axis - x.ndim for axis in axes)
        new_sizes |= {first: sizes} | {axis: () for axis in rest}

    def reshaped(array: Base, labels: Labels) -> Base:
        of_axes = [
            new_sizes.get(axis, (size,)) for axis, size in zip(labels, array.shape)
        ]
        return reshape(array, [size for sizes in of_axes for size in sizes])

    stored = axes_from_end(x.ndim)
    new = x.replace(gain=None).map_factors(reshaped, stored)
    new = new.replace(
        base=reshaped(x.base, stored),
        rows=tuple(new_axes["row"]),
        columns=tuple(new_axes["column"]),
        gain=None if x.gain is None else _reshape_gain(x.gain, x.shape, groups),
    )
    return expand(new, [1] * len(ones), ones)


def _reshape_gain(gain: Array, shape: Sequence[int], groups: Sequence[Any]) -> Array:
    old, new = [], []
    for axes, sizes in groups:
        is_constant = all(gain.shape[axis] == 1 for axis in axes)
        old += [1 if is_constant else shape[axis] for axis in axes]
        new += [1 if is_constant else size for size in sizes]
    return jnp.broadcast_to(gain, old).reshape(new)


def _group_axes(
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


@functools.singledispatch
def is_led_by_first_axis(x: Base) -> bool:
    """Whether slicing all arrays in `x` along their first axes slices `x` along its
    first axis, as `scan` needs it. So it is for arrays, and has to be for all bases
    that do not register otherwise."""
    return True


@is_led_by_first_axis.register
def _(x: Factored) -> bool:
    first = x.logical_axes()[0]
    is_led = first == -x.ndim and first in x.batch_axes()
    return is_led and is_led_by_first_axis(x.base)


def store_in_order(x: Factored) -> Factored:
    """The same, its base stored in the order of `shape`, and the axes of rows and of
    columns in that order too."""
    ndim = x.ndim
    logical = x.logical_axes()
    order = [axis % ndim for axis in logical]
    position: dict[Label, Any] = {axis: i - ndim for i, axis in enumerate(logical)}
    batch = sorted(position[axis] for axis in x.batch_axes())
    rows = sorted(position[axis] for axis in x.rows)
    columns = sorted(position[axis] for axis in x.columns)

    def ordered(array: Any, labels: Labels, wanted: Labels) -> Any:
        if array is None:  # In the frozen part of a model.
            return None
        now = [position.get(axis, axis) for axis in labels]
        return lax.transpose(array, [now.index(label) for label in wanted])

    stored = axes_from_end(ndim)
    return x.replace(
        base=transpose(x.base, order),
        b=ordered(x.b, x.b_labels(stored), [*batch, *rows, RANK]),
        a=ordered(x.a, x.a_labels(stored), [*batch, RANK, *columns]),
        gain=None if x.gain is None else lax.transpose(x.gain, order),
        gate=ordered(x.gate, x.gate_labels(stored), [*batch, RANK]),
        rows=tuple(rows),
        columns=tuple(columns),
        permutation=None,
    )

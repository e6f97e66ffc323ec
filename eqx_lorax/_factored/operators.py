"""The array syntax of what stands for an array, `weight @ x` and `weight[index]`, in
terms of its normal form."""

import operator
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .base import map_arrays
from .contraction import contract as contract_labels
from .form import Factored
from .gather import take
from .names import name_product
from .products import Label, NotFactored


def matmul(form: Factored, x: ArrayLike) -> Array:
    """`form @ x`, with the broadcasting of `jnp.matmul`."""
    return _matmul(form, x, contract=-1)


def rmatmul(form: Factored, x: ArrayLike) -> Array:
    """`x @ form`, with the broadcasting of `jnp.matmul`."""
    return _matmul(form, x, contract=-2)


def _matmul(form: Factored, x: ArrayLike, *, contract: int) -> Array:
    shape, x_shape = form.shape, jnp.shape(x)
    x_contracts = -1 if contract == -2 or len(x_shape) == 1 else -2
    *batch, _, _ = shape
    x_batch = x_shape[:-2]
    depth = max(len(batch), len(x_batch))
    # One label for a pair of batch axes, two if either is broadcast.
    paired = [
        i < len(batch) and i < len(x_batch) and batch[-1 - i] == x_batch[-1 - i]
        for i in range(depth)
    ]
    fits = x_shape and x_shape[x_contracts] == shape[contract]
    for i in range(min(len(batch), len(x_batch))):
        fits = fits and (paired[i] or 1 in (batch[-1 - i], x_batch[-1 - i]))
    if not fits:
        operands = (shape, x_shape) if contract == -1 else (x_shape, shape)
        raise ValueError(
            f"Cannot multiply shapes {operands[0]} @ {operands[1]}: the contracted "
            "axes must be equal and the batch axes must broadcast."
        )

    def batch_labels(count: int, side: str) -> list[Label]:
        return [("both" if paired[i] else side, i) for i in reversed(range(count))]

    free = "columns" if contract == -2 else "rows"
    labels = batch_labels(len(batch), "weight")
    labels += ["summed", free] if contract == -2 else [free, "summed"]
    x_labels = batch_labels(len(x_batch), "x")
    if len(x_shape) == 1:
        x_labels, out = ["summed"], [free]
    elif contract == -2:
        x_labels, out = [*x_labels, "x free", "summed"], ["x free", free]
    else:
        x_labels, out = [*x_labels, "summed", "x free"], [free, "x free"]
    present = {*labels, *x_labels}
    out_batch = [
        (side, i)
        for i in reversed(range(depth))
        for side in ("both", "weight", "x")
        if (side, i) in present
    ]
    dtype = jnp.result_type(x, form.dtype)
    y = contract_labels(
        form,
        jnp.asarray(x, dtype),
        x_labels=tuple(x_labels),
        labels=tuple(labels),
        out_labels=(*out_batch, *out),
    ).astype(dtype)
    broadcast = jnp.broadcast_shapes(tuple(batch), x_batch)
    return name_product(y.reshape(*broadcast, *y.shape[len(out_batch) :]))


def index(form: Factored, item: Any) -> Factored | Array:
    """`form[item]`."""
    items = _full_index(item, form.ndim)
    for position, one in enumerate(items):
        if isinstance(one, slice) and one != slice(None):
            form = _slice_axis(form, position, one)
    picked = [i for i, one in enumerate(items) if not isinstance(one, slice)]
    if not picked:
        return form
    position, *more = picked
    one = _checked_index(items[position], form.shape[position])
    if more:
        if position != 0 or jnp.ndim(one) != 0:
            raise _unsupported_index(item)
        first = index(form, one)
        assert isinstance(first, Factored) or isinstance(first, jax.Array)
        rest = tuple(items[1:])
        return index(first, rest) if isinstance(first, Factored) else first[rest]
    try:
        return take(form, position, one)
    except NotFactored as error:
        raise _cannot_pick(form, position, error) from error


def _slice_axis(form: Factored, position: int, one: slice) -> Factored:
    def sliced(array: Any, labels: Any) -> Any:
        return array[tuple(one if x == position else slice(None) for x in labels)]

    try:
        return map_arrays(form, sliced, range(form.ndim), [position])
    except NotFactored as error:
        raise _cannot_pick(form, position, error) from error


def _cannot_pick(form: Factored, position: int, error: NotFactored) -> TypeError:
    return TypeError(
        f"Axis {position} of {form.shape} cannot be indexed: {error}. Form the array "
        "first, with `materialise()` or `dequantise()`, or quantise it with a `block` "
        "that divides its last axis."
    )


def _full_index(item: Any, ndim: int) -> list[Any]:
    """One entry for each axis, without `...`."""
    items = list(item) if isinstance(item, tuple) else [item]
    given = sum(not isinstance(i, EllipsisType) for i in items)
    if any(i is None or isinstance(i, bool) for i in items):
        raise _unsupported_index(item)
    if given > ndim or len(items) - given > 1:
        raise IndexError(f"Index {item} does not fit a weight of {ndim} axes.")
    at = [i for i, x in enumerate(items) if isinstance(x, EllipsisType)]
    at = at[0] if at else len(items)
    return items[:at] + [slice(None)] * (ndim - given) + items[at + 1 :]


def _checked_index(index: Any, size: int) -> ArrayLike:
    if not isinstance(index, (jax.Array, np.ndarray, list, np.generic)):
        try:
            index = operator.index(index)
        except TypeError:
            raise _unsupported_index(index) from None
        if not -size <= index < size:
            # Without this, iterating over a weight would never end.
            raise IndexError(f"Index {index} is out of range for an axis of {size}.")
        return index
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise _unsupported_index(index)
    return index


def _unsupported_index(item: Any) -> TypeError:
    return TypeError(
        f"A weight cannot be indexed by {item!r}: integers, integer arrays (one at a "
        "time, after the leading integers) and slices can. For anything else form the "
        "array, with `materialise()` or, of a quantised one, `dequantise()`."
    )

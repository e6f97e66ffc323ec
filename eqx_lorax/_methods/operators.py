"""The array syntax of a factored weight, `weight @ x` and `weight[index]`, in terms of
what the weight can do: contract, look up, map over an axis."""

import operator
from types import EllipsisType
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .._factored import Label, Labels, take


if TYPE_CHECKING:
    from .lora import LoraWeight
    from .weight import AbstractLoraWeight


def matmul(
    weight: "AbstractLoraWeight",
    x: ArrayLike,
    *,
    contract: int = -1,
    low_rank_x: Array | None = None,
) -> Array:
    """The matrix product of `weight` and `x`, not yet rounded, with the broadcasting of
    `jnp.matmul`: `weight @ x` if `contract` is -1, `x @ weight` if it is -2."""
    shape, x_shape = weight.shape, jnp.shape(x)
    x_contracts = -1 if contract == -2 or len(x_shape) == 1 else -2
    *batch, _, _ = shape
    x_batch = x_shape[:-2]
    depth = max(len(batch), len(x_batch))
    # One label a pair of batch axes, two where either is to be broadcast.
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
    dtype = jnp.result_type(x, weight.dtype)
    y = weight.contract(
        jnp.asarray(x, dtype),
        x_labels,
        labels,
        [*out_batch, *out],
        low_rank_x=None if low_rank_x is None else low_rank_x.astype(dtype),
    )
    broadcast = jnp.broadcast_shapes(tuple(batch), x_batch)
    return y.reshape(*broadcast, *y.shape[len(out_batch) :])


def getitem(lora: "LoraWeight", item: Any) -> "LoraWeight | Array":
    items = _full_index(item, lora.ndim)
    for position, index in enumerate(items):
        if isinstance(index, slice) and index != slice(None):
            axis = lora.shown_axes()[position]
            lora = lora.map_arrays(
                lambda x, axes, axis=axis, i=index: _sliced(x, axes, axis, i)
            )
    picked = [i for i, index in enumerate(items) if not isinstance(index, slice)]
    if not picked:
        return lora
    position, *more = picked
    index = _checked_index(items[position], lora.shape[position])
    if more:
        if position != 0 or jnp.ndim(index) != 0:
            raise _unsupported_index(item)
        return lora[index][tuple(items[1:])]
    return take(lora, position, index)


def _sliced(x: Any, axes: Labels, axis: int, index: slice) -> Any:
    return x[tuple(index if label == axis else slice(None) for label in axes)]


def _full_index(item: Any, ndim: int) -> list[Any]:
    """One entry an axis: `...` spelled out."""
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
        f"A factored weight cannot be indexed by {item!r}: integers, integer arrays "
        "(one at a time, after the leading integers) and slices can. For anything else "
        "form the array: `weight.materialise()[...]`."
    )

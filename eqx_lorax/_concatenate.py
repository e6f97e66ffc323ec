"""Joining weights, as code that fuses projections or stacks layers does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from ._arrays import is_array, promote
from ._contract import Label, NotFactored, RANK
from ._views import in_order, Viewed


if TYPE_CHECKING:
    from ._lora import LoraWeight


def concatenate(xs: Sequence[Viewed], dimension: int) -> Viewed:
    """As `jax.lax.concatenate`, of weights with the same row and column axes, and of
    arrays, which then have a base and no update.

    Along the rows `b` becomes a matrix of blocks, one for each weight, and `a` has the
    ranks of all; along the columns it is the other way round; along a batch axis the
    smaller ranks are filled up with zeros.
    """
    if all(map(is_array, xs)):
        return lax.concatenate(xs, dimension)
    weights = [in_order(x.as_lora()) for x in xs if not is_array(x)]
    first = weights[0]
    if any(weight.gain is not None for weight in weights):
        raise NotFactored("scaled weights are joined")
    axes = {(weight.rows, weight.columns) for weight in weights}
    if len(axes) > 1:
        raise NotFactored("weights with other rows and columns are joined")
    ordered = iter(weights)
    parts = [_plain(x, first) if is_array(x) else next(ordered) for x in xs]
    ranks = [part.rank for part in parts]
    axis = dimension - first.w.ndim
    shares_ranks = axis in first.batch_axes()
    total = max(ranks) if shares_ranks else sum(ranks)
    offsets = [0 if shares_ranks else sum(ranks[:i]) for i in range(len(ranks))]
    stored = range(-first.w.ndim, 0)

    def joined(arrays: Sequence[Array], labels: Sequence[Label]) -> Array:
        dtype = promote(*(array.dtype for array in arrays))
        arrays = [array.astype(dtype) for array in arrays]
        if axis not in labels:
            return lax.concatenate(arrays, labels.index(RANK))
        padded = [
            _in_place(array, labels.index(RANK), offset, total)
            for array, offset in zip(arrays, offsets)
        ]
        return lax.concatenate(padded, labels.index(axis))

    return first.replace(
        w=concatenate([part.w for part in parts], dimension),
        # Their scales may differ.
        b=joined([part.scale * part.b for part in parts], first.b_axes(stored)),
        a=joined([part.a for part in parts], first.a_axes(stored)),
        alpha=float(total),
        rank_stabilised=False,
    )


def _plain(x: Array, like: "LoraWeight") -> "LoraWeight":
    """An array as a weight whose update is zero."""
    sizes: dict[Label, int] = {RANK: 1, **dict(zip(range(-x.ndim, 0), x.shape))}
    stored = range(-x.ndim, 0)
    b = jnp.zeros([sizes[label] for label in like.b_axes(stored)], like.b.dtype)
    a = jnp.zeros([sizes[label] for label in like.a_axes(stored)], like.a.dtype)
    return like.replace(w=x, b=b, a=a)


def _in_place(x: Array, position: int, offset: int, total: int) -> Array:
    """`x` among zeros along one axis."""
    padding = [(0, 0, 0)] * x.ndim
    padding[position] = (offset, total - offset - x.shape[position], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)

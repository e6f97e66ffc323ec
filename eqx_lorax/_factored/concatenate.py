"""Joining weights, as code that fuses projections or stacks layers does."""

import math
from collections.abc import Sequence

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from .._shared import axes_from_end, is_array, promote
from .base import refuse
from .form import Base, Factored
from .products import Label, NotFactored, RANK
from .views import store_in_order


def concatenate(xs: Sequence[Base], dimension: int, *, is_frozen: bool = False) -> Base:
    """As `jax.lax.concatenate`, of weights with the same row and column axes, and of
    arrays, whose derivatives they keep unless all is frozen, as a base is.

    Along the rows `b` becomes a matrix of blocks, one for each weight, and `a` has the
    ranks of all; along the columns it is the other way round; along a batch axis the
    smaller ranks are filled up with zeros.
    """
    xs = [x for x in xs if x.shape[dimension]] or xs[:1]
    if len(xs) == 1:
        return xs[0]
    unfit = [x for x in xs if not (is_array(x) or isinstance(x, Factored))]
    if unfit:
        raise refuse(unfit[0], "concatenate")
    if all(map(is_array, xs)):
        return lax.concatenate(xs, dimension)
    weights = [store_in_order(x.without_gate()) for x in xs if isinstance(x, Factored)]
    first = weights[0]
    if any(weight.gain is not None for weight in weights):
        raise NotFactored("scaled weights are joined")
    axes = {(weight.rows, weight.columns) for weight in weights}
    if len(axes) > 1:
        raise NotFactored("weights with other rows and columns are joined")
    most = 0 if is_frozen else sum(weight.rank for weight in weights)
    ordered = iter(weights)
    parts = [
        next(ordered) if isinstance(x, Factored) else _as_factored(x, first, most)
        for x in xs
    ]
    has_frozen_base = is_frozen or all(part.has_frozen_base for part in parts)
    bases = [
        part.base if has_frozen_base else part.differentiable_base() for part in parts
    ]
    ranks = [part.rank for part in parts]
    axis = dimension - first.ndim
    shares_ranks = axis in first.batch_axes()
    total = max(ranks) if shares_ranks else sum(ranks)
    offsets = [0 if shares_ranks else sum(ranks[:i]) for i in range(len(ranks))]
    stored = axes_from_end(first.ndim)

    def joined(arrays: Sequence[Array], labels: Sequence[Label]) -> Array:
        dtype = promote(*(array.dtype for array in arrays))
        arrays = [array.astype(dtype) for array in arrays]
        if axis not in labels:
            return lax.concatenate(arrays, labels.index(RANK))
        padded = [
            _pad_with_zeros(array, labels.index(RANK), offset, total)
            for array, offset in zip(arrays, offsets)
        ]
        return lax.concatenate(padded, labels.index(axis))

    return first.replace(
        base=concatenate(bases, dimension, is_frozen=has_frozen_base),
        # Their scales may differ.
        b=joined([part.scale * part.b for part in parts], first.b_labels(stored)),
        a=joined([part.a for part in parts], first.a_labels(stored)),
        scale=1.0,
        has_frozen_base=has_frozen_base,
    )


def _as_factored(x: Array, like: Factored, most: int) -> Factored:
    """An array as a weight with its value for a base.

    Where its rank is no larger than `most`, its derivatives are those of a factor, so
    that the gradient in a few rows, such as those of new tokens beside a table, has not
    the whole table's size. Otherwise they are those of the base.
    """
    axes = (like.batch_axes(), like.rows, like.columns)
    batch, rows, columns = ([x.shape[axis] for axis in part] for part in axes)
    rank = min(math.prod(rows), math.prod(columns))
    if not 0 < rank <= most:
        b = jnp.zeros([*batch, *rows, 1], like.b.dtype)
        a = jnp.zeros([*batch, 1, *columns], like.a.dtype)
        return like.replace(base=x, b=b, a=a, has_frozen_base=most == 0)
    # The value stays out of the factors: a zero times a value that is not finite would
    # reach the other rows, and a factor's dtype may be narrower.
    order = [axis % x.ndim for part in axes for axis in part]
    values = lax.transpose(_tangent_alone(x), order)
    identity = jnp.eye(rank, dtype=like.b.dtype)
    if rank == math.prod(rows):
        b = jnp.broadcast_to(identity.reshape([*rows, rank]), [*batch, *rows, rank])
        a = values.reshape([*batch, rank, *columns])
    else:
        b = values.reshape([*batch, *rows, rank])
        a = identity.reshape([rank, *columns])
        a = jnp.broadcast_to(a, [*batch, rank, *columns])
    return like.replace(
        base=lax.stop_gradient(x),
        b=b,
        a=a,
        scale=1.0,
        has_frozen_base=True,
    )


@jax.custom_jvp
def _tangent_alone(x: Array) -> Array:
    """Zeros that have the derivatives of `x`."""
    return jnp.zeros_like(x)


@_tangent_alone.defjvp
def _(primals, tangents):
    # Not zeros outright: derivatives of higher order go through this one too.
    return _tangent_alone(*primals), *tangents


def _pad_with_zeros(x: Array, position: int, offset: int, total: int) -> Array:
    """`x` among zeros along one axis."""
    padding = [(0, 0, 0)] * x.ndim
    padding[position] = (offset, total - offset - x.shape[position], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)

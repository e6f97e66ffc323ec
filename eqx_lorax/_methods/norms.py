"""Norms of what a factored weight stands for, without forming it."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from .._factored import (
    contract_base,
    dense,
    Factored,
    Label,
    multiply_arrays,
    RANK,
)
from .._shared import axes_from_end


_OTHER_RANK = "other rank"


def norms_along(form: Factored, outputs: Literal["rows", "columns"]) -> Array:
    """The Euclidean norms of `base + scale * (b · a)` over all axes but batch axes and
    the outputs, without a derivative.

    Of the update only products of the rank's size are formed: `|w + u|²` is
    `|w|² + 2 w·u + |u|²`, in which `w·u` is the base times one factor, and `|u|²` has
    the inner products of that factor.

    **Returns:**

    A real array with the stored axes of the base, of size one along all others, in
    float32 or wider.
    """
    stored = axes_from_end(form.ndim)
    b, a = (form.b, form.b_labels(stored)), (form.a, form.a_labels(stored))
    (inner, inner_labels), (outer, outer_labels) = (
        (a, b) if outputs == "rows" else (b, a)
    )
    batch = list(form.batch_axes())
    kept = [*batch, *(form.rows if outputs == "rows" else form.columns)]
    others = tuple(axis for axis in stored if axis not in kept)
    inner, outer = jnp.conj(inner), jnp.conj(outer)

    base = contract_base(
        form.base,
        inner,
        x_labels=tuple(inner_labels),
        labels=tuple(stored),
        out_labels=(*batch, RANK, *kept[len(batch) :]),
        is_frozen=True,
    )
    base_labels: list[Label] = [*batch, RANK, *kept[len(batch) :]]
    cross = multiply_arrays(base, base_labels, outer, outer_labels, kept, base.dtype)

    renamed = [_OTHER_RANK if x == RANK else x for x in inner_labels]
    gram_labels: list[Label] = [*batch, _OTHER_RANK, RANK]
    gram = multiply_arrays(
        jnp.conj(inner), renamed, inner, inner_labels, gram_labels, inner.dtype
    )
    renamed = [_OTHER_RANK if x == RANK else x for x in outer_labels]
    half_labels: list[Label] = [RANK if x == RANK else x for x in outer_labels]
    half = multiply_arrays(
        jnp.conj(outer), renamed, gram, gram_labels, half_labels, gram.dtype
    )
    update = multiply_arrays(half, half_labels, outer, outer_labels, kept, half.dtype)

    squares = _squared_norms(form, others)
    total = squares + _spread(
        2 * form.scale * jnp.real(cross) + form.scale**2 * jnp.real(update), kept, form
    ).astype(squares.dtype)
    # A sum that cancels may come out below zero.
    return jnp.sqrt(jnp.maximum(total, 0))


def _squared_norms(form: Factored, axes: tuple[int, ...]) -> Array:
    base = dense(form.base)
    return jnp.sum(jnp.real(base * jnp.conj(base)), axis=axes, keepdims=True)


def _spread(x: Array, labels: list[int], form: Factored) -> Array:
    """`x`, with the axes `labels`, with all stored axes of the base."""
    stored = axes_from_end(form.ndim)
    order = [axis for axis in stored if axis in labels]
    x = jnp.transpose(x, [labels.index(axis) for axis in order])
    return jnp.expand_dims(
        x, [i for i, axis in enumerate(stored) if axis not in labels]
    )

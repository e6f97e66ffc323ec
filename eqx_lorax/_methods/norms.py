"""Norms of what a factored weight stands for, without forming it."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from .._factored import (
    contract_base,
    dense,
    Factored,
    find_explicit_sharding,
    Label,
    Labels,
    multiply_arrays,
    RANK,
)
from .._shared import axes_from_end, explicit_sharding, product_sharding


# Not the label of the rank, which a base that is a weight itself uses for its own.
_FIRST, _SECOND = "first rank", "second rank"


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

    def relabel(labels: Labels, rank: str) -> list[Label]:
        return [rank if label == RANK else label for label in labels]

    first, second = (
        [relabel(labels, rank) for labels in (inner_labels, outer_labels)]
        for rank in (_FIRST, _SECOND)
    )
    inner, outer = jnp.conj(inner), jnp.conj(outer)
    base_labels = (*batch, _FIRST, *kept[len(batch) :])
    base = contract_base(
        form.base,
        inner,
        x_labels=tuple(first[0]),
        labels=tuple(stored),
        out_labels=base_labels,
        is_frozen=True,
        out_sharding=product_sharding(
            explicit_sharding(inner),
            first[0],
            find_explicit_sharding(form.base),
            stored,
            base_labels,
        ),
    )
    cross = _multiply(base, base_labels, outer, first[1], kept)
    gram_labels: list[Label] = [*batch, _SECOND, _FIRST]
    gram = _multiply(jnp.conj(inner), second[0], inner, first[0], gram_labels)
    half = _multiply(jnp.conj(outer), second[1], gram, gram_labels, first[1])
    update = _multiply(half, first[1], outer, first[1], kept)

    squares = _squared_norms(form, others)
    total = squares + _spread(
        2 * form.scale * jnp.real(cross) + form.scale**2 * jnp.real(update), kept, form
    ).astype(squares.dtype)
    # A sum that cancels may come out below zero.
    return jnp.sqrt(jnp.maximum(total, 0))


def _multiply(
    x: Array, x_labels: Labels, y: Array, y_labels: Labels, out_labels: Labels
) -> Array:
    shardings = explicit_sharding(x), x_labels, explicit_sharding(y), y_labels
    return multiply_arrays(
        x,
        x_labels,
        y,
        y_labels,
        out_labels,
        x.dtype,
        out_sharding=product_sharding(*shardings, out_labels),
    )


def _squared_norms(form: Factored, axes: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.square(jnp.abs(dense(form.base))), axis=axes, keepdims=True)


def _spread(x: Array, labels: list[int], form: Factored) -> Array:
    """`x`, with the axes `labels`, with all stored axes of the base."""
    stored = axes_from_end(form.ndim)
    order = [axis for axis in stored if axis in labels]
    x = jnp.transpose(x, [labels.index(axis) for axis in order])
    return jnp.expand_dims(
        x, [i for i, axis in enumerate(stored) if axis not in labels]
    )

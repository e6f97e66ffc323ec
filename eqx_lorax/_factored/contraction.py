"""How a factored weight meets an activation."""

import functools
import math
from typing import Any, TYPE_CHECKING

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._shared import explicit_sharding, is_array, product_sharding, promote, relabel
from . import products, views
from .fused import multiplied
from .products import Label, Labels, portable, Precision, RANK
from .views import Viewed


if TYPE_CHECKING:
    from .._methods import LoraWeight


def contract(
    w: Viewed,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    x_labels: Labels,
    labels: Labels,
    out_labels: Labels,
    is_frozen: bool = False,
    precision: Precision = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """As `AbstractLoraWeight.contract`, for an array too, which is then what may be
    frozen."""
    stored = tuple(labels)
    if not is_array(w):
        w = w.factored()
        stored = w.stored_labels(labels)
    x_first, natural = _fast_orders(tuple(x_labels), stored, tuple(out_labels))
    y = _contracted(
        w,
        _reordered(x, x_labels, x_first),
        None if low_rank_x is None else _reordered(low_rank_x, x_labels, x_first),
        x_labels=x_first,
        labels=stored,
        out_labels=natural,
        is_frozen=is_frozen,
        precision=precision,
        out_sharding=relabel(out_sharding, out_labels, natural),
    )
    return _reordered(y, natural, out_labels)


@functools.lru_cache(maxsize=1024)
def _fast_orders(
    x_labels: tuple[Label, ...],
    labels: tuple[Label, ...],
    out_labels: tuple[Label, ...],
) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """The orders of the axes of `x` and of the result in which products are fast: those
    that `x` and the weight both keep, those of `x` alone, and then the others.

    Code with `w @ x` below `vmap` has all its activations the other way round. The
    transposes before and after cancel each other, and XLA finds the products in the
    fast order, also in the backward pass.
    """
    batch = [x for x in x_labels if x in labels and x in out_labels]
    free = [x for x in x_labels if x not in labels]
    summed = [x for x in x_labels if x in labels and x not in out_labels]
    kept = [x for x in labels if x in out_labels and x not in batch]
    return (*batch, *free, *summed), (*batch, *free, *kept)


def _reordered(x: Array, labels: Labels, wanted: Labels) -> Array:
    if tuple(labels) == tuple(wanted):
        return x
    return lax.transpose(x, [labels.index(label) for label in wanted])


# Compiled as one: each kind of product is then traced once and not in each layer.
@functools.partial(
    jax.jit,
    static_argnames=(
        "x_labels",
        "labels",
        "out_labels",
        "is_frozen",
        "precision",
        "out_sharding",
    ),
)
def _contracted(
    w: Viewed,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    x_labels: Labels,
    labels: Labels,
    out_labels: Labels,
    is_frozen: bool = False,
    precision: Precision = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """As `contract`, for axes in the order of the weight as it is stored and of the
    products themselves."""
    arguments: dict[str, Any] = dict(
        x_labels=x_labels,
        stored=labels,
        out_labels=out_labels,
        precision=precision,
        out_sharding=out_sharding,
    )
    if is_array(w):
        return products.product(
            x,
            x_labels,
            jnp.asarray(w),
            labels,
            out_labels,
            x.dtype,
            y_is_frozen=is_frozen,
            precision=precision,
            out_sharding=out_sharding,
        )
    separate = functools.partial(_separate, is_frozen=is_frozen, **arguments)
    merged = functools.partial(_merged, **arguments)
    return multiplied(separate, merged, x, w, low_rank_x)


def _merged(
    x: Array,
    lora: "LoraWeight",
    *,
    x_labels: Labels,
    stored: Labels,
    out_labels: Labels,
    precision: Precision,
    out_sharding: NamedSharding | None,
) -> Array:
    return products.product(
        x,
        x_labels,
        views.dense(lora.replace(order=None)),
        stored,
        out_labels,
        x.dtype,
        precision=precision,
        out_sharding=out_sharding,
    )


def _separate(
    x: Array,
    lora: "LoraWeight",
    low_rank_x: Array | None = None,
    *,
    x_labels: Labels,
    stored: Labels,
    out_labels: Labels,
    is_frozen: bool,
    precision: Precision,
    out_sharding: NamedSharding | None,
) -> Array:
    """Base and low-rank branch apart. `stored` are the labels of the base's axes."""
    low_rank_x = x if low_rank_x is None else low_rank_x
    gain, gain_labels = lora.gain, stored
    if gain is not None:
        gain, gain_labels = products.varying(gain, stored)
        if not set(gain_labels) <= set(out_labels):
            # What is summed over is scaled before.
            x, _ = _scaled_before(x, x_labels, gain, gain_labels)
            low_rank_x, x_labels = _scaled_before(
                low_rank_x, x_labels, gain, gain_labels
            )
            gain = None
    base = contract(
        lora.w,
        x,
        None,
        x_labels=tuple(x_labels),
        labels=stored,
        out_labels=out_labels,
        is_frozen=is_frozen or lora.has_frozen_base,
        precision=precision,
        out_sharding=out_sharding,
    )

    x, precision = low_rank_x, portable(precision)
    # The factor that owns more of what is summed goes first: it shrinks `x` most.
    summed = [
        math.prod(
            lora.w.shape[axis]
            for axis in axes
            if stored[axis] in x_labels and stored[axis] not in out_labels
        )
        for axes in (lora.rows, lora.columns)
    ]
    factors = [
        (lora.b, lora.b_axes(stored)),
        (lora.a, lora.a_axes(stored)),
    ]
    (first, first_labels), (second, second_labels) = (
        factors if summed[0] > summed[1] else factors[::-1]
    )
    dtype = promote(x.dtype, first.dtype, second.dtype)
    wanted = [*out_labels, *second_labels]
    hidden_labels = [
        label for label in dict.fromkeys([*x_labels, *first_labels]) if label in wanted
    ]
    hidden = products.product(
        x,
        x_labels,
        first,
        first_labels,
        hidden_labels,
        dtype,
        y_is_frozen=is_frozen,
        precision=precision,
        out_sharding=product_sharding(
            explicit_sharding(x),
            x_labels,
            explicit_sharding(first),
            first_labels,
            hidden_labels,
        ),
    )
    hidden = hidden * lora.scale
    if lora.gate is not None:
        batch = [stored[axis] for axis in lora.batch_axes()]
        hidden = products.scaled(hidden, hidden_labels, lora.gate, [*batch, RANK])
    update = products.product(
        hidden,
        hidden_labels,
        second,
        second_labels,
        out_labels,
        hidden.dtype,
        y_is_frozen=is_frozen,
        precision=precision,
        out_sharding=explicit_sharding(base),
    )
    y = views.add(base, update)
    if gain is None:
        return y
    return products.scaled(y, out_labels, gain, gain_labels)


def _scaled_before(
    x: Array, x_labels: Labels, gain: Array, gain_labels: Labels
) -> tuple[Array, Labels]:
    missing = [label for label in gain_labels if label not in x_labels]
    sizes = [gain.shape[gain_labels.index(label)] for label in missing]
    x = views.expand(x, sizes, range(x.ndim, x.ndim + len(missing)))
    x_labels = [*x_labels, *missing]
    return products.scaled(x, x_labels, gain, gain_labels), x_labels

"""The product of a factored weight and an activation: `W x + scale * B (A x)`."""

import functools
import math
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._shared import (
    AnyArray,
    explicit_sharding,
    product_sharding,
    promote,
    relabel,
    unshard,
)
from .base import (
    add,
    dense,
    refuse,
    register_arrays,
    stands_for_array,
)
from .form import Base, Factored
from .fused import choose_fusing
from .names import name_hidden
from .primitives import Product, unpack
from .products import (
    drop_constant_axes,
    Label,
    Labels,
    multiply_arrays,
    Precision,
    precision_for_any_dtype,
    scale_along,
)
from .views import expand


# Smaller bases save no time by their sum, and XLA compiles it for a third longer.
_WORTH_COMPILING = 64 * 64


def contract(
    weight: Factored,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    x_labels: tuple[Label, ...],
    labels: tuple[Label, ...],
    out_labels: tuple[Label, ...],
    is_frozen: bool = False,
    precision: Precision = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """The sum of `x` times `weight` over all labels that are not among `out_labels`.

    **Arguments:**

    - `weight`: The weight.
    - `x`: The other operand. The caller rounds the result to its dtype.
    - `low_rank_x`: The operand for the factors, if it is not `x`: after dropout.
    - `x_labels`: A label for each axis of `x`.
    - `labels`: A label for each axis of `weight`. One that is also a label of `x` is
        summed over unless it is among `out_labels`.
    - `out_labels`: The labels of the axes of the result.
    - `is_frozen`: Whether the factors are frozen too, as below another adapter.
    - `precision`, `out_sharding`: As in `jax.lax.dot_general`.

    **Returns:**

    The contraction, not yet rounded: in float32 where `x` or a factor is narrow.
    """
    is_in_order = weight.permutation is None
    stored = labels if is_in_order else weight.stored_labels(labels)
    fast_x, fast_out = _order_axes(x_labels, stored, out_labels)
    y = _contract_in_order(
        weight,
        _transpose(x, x_labels, fast_x),
        None if low_rank_x is None else _transpose(low_rank_x, x_labels, fast_x),
        x_labels=fast_x,
        stored=stored,
        out_labels=fast_out,
        is_frozen=is_frozen,
        precision=precision,
        out_sharding=relabel(out_sharding, out_labels, fast_out),
    )
    return _transpose(y, fast_out, out_labels)


@functools.singledispatch
def contract_base(base: Base, x: Array, **arguments: Any) -> Array:
    """`contract` for a base of any kind, without `low_rank_x`. If `is_frozen`, no
    derivative is taken in the base."""
    if not stands_for_array(base):
        raise refuse(base, "contract_base")
    arguments["is_frozen"] = True
    return unpack(Product(_contract_dense, tuple(arguments.items())), base, x)


def _contract_dense(base: Base, x: Array, **arguments: Any) -> Array:
    return contract_base(lax.stop_gradient(dense(base)), x, **arguments)


@contract_base.register
def _(base: Factored, x: Array, **arguments: Any) -> Array:
    return contract(base, x, **arguments)


@register_arrays(contract_base)
def _(
    base: AnyArray,
    x: Array,
    *,
    x_labels: Labels,
    labels: Labels,
    out_labels: Labels,
    is_frozen: bool = False,
    precision: Precision = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    return multiply_arrays(
        x,
        x_labels,
        jnp.asarray(base),
        labels,
        out_labels,
        x.dtype,
        y_is_frozen=is_frozen,
        precision=precision,
        out_sharding=out_sharding,
    )


@functools.lru_cache(maxsize=1024)
def _order_axes(
    x_labels: tuple[Label, ...],
    labels: tuple[Label, ...],
    out_labels: tuple[Label, ...],
) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """The orders of the axes of `x` and of the result in which products are fast:
    shared batch axes, axes of `x` alone, and then the summed axes of `x`, or the axes
    of the weight alone in the result.

    In code with `w @ x` below `vmap` every activation has the reverse order. The
    transposes before and after a layer cancel each other, and XLA finds the products in
    the fast order, also in the backward pass.
    """
    batch = [x for x in x_labels if x in labels and x in out_labels]
    free = [x for x in x_labels if x not in labels]
    summed = [x for x in x_labels if x in labels and x not in out_labels]
    kept = [x for x in labels if x in out_labels and x not in batch]
    return (*batch, *free, *summed), (*batch, *free, *kept)


def _transpose(x: Array, labels: Labels, wanted: Labels) -> Array:
    if tuple(labels) == tuple(wanted):
        return x
    return lax.transpose(x, [labels.index(label) for label in wanted])


# One jitted function: layers with the same shapes and labels share one trace.
@functools.partial(
    jax.jit,
    static_argnames=(
        *("x_labels", "stored", "out_labels"),
        *("is_frozen", "precision", "out_sharding"),
    ),
)
def _contract_in_order(
    weight: Factored,
    x: Array,
    low_rank_x: Array | None,
    *,
    x_labels: Labels,
    stored: Labels,
    out_labels: Labels,
    is_frozen: bool,
    precision: Precision,
    out_sharding: NamedSharding | None,
) -> Array:
    """As `contract`, with labels of the stored axes of `weight`, and axes in the orders
    of `_order_axes`."""
    multiply = _contract_separately if weight.gain is None else _contract_scaled
    arguments: dict[str, Any] = dict(
        x_labels=x_labels,
        stored=stored,
        out_labels=out_labels,
        is_frozen=is_frozen,
        precision=precision,
        out_sharding=out_sharding,
    )
    summed = [label for label in x_labels if label not in out_labels]
    axes = [stored.index(label) - len(stored) for label in summed]
    fuses_from = None
    if low_rank_x is None:
        fuses_from = choose_fusing(weight, x, axes, least_size=_WORTH_COMPILING)
    if fuses_from is None:
        return multiply(weight, x, low_rank_x, **arguments)
    product = Product(
        multiply,
        tuple(arguments.items()),
        fused=_contract_fused,
        fuses_from=fuses_from,
        factor=len(jax.tree.leaves(weight.base)),
        token_size=math.prod(weight.base.shape[axis] for axis in axes),
    )
    return unpack(product, weight, x)


def _contract_fused(
    weight: Factored, x: Array, *, stored: Labels, is_frozen: bool, **arguments: Any
) -> Array:
    """As `_contract_separately`, with one product with the sum of base and update."""
    whole = dense(weight.replace(permutation=None))
    return contract_base(whole, x, labels=stored, **arguments)


def _contract_separately(
    weight: Factored,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    x_labels: Labels,
    stored: Labels,
    out_labels: Labels,
    is_frozen: bool,
    precision: Precision,
    out_sharding: NamedSharding | None,
) -> Array:
    """`W x`, then `A x`, then `B (A x)`; the result is `W x + scale * B (A x)`."""
    # W x
    base = contract_base(
        weight.base,
        x,
        x_labels=tuple(x_labels),
        labels=tuple(stored),
        out_labels=tuple(out_labels),
        is_frozen=is_frozen or weight.has_frozen_base,
        precision=precision,
        out_sharding=out_sharding,
    )
    if weight.rank == 0:
        return base
    x = x if low_rank_x is None else low_rank_x
    precision = precision_for_any_dtype(precision)
    # A x, or B x where `x` is on the side of the rows.
    (first, first_labels), (second, second_labels) = order_factors(
        weight, stored, x_labels, out_labels
    )
    hidden_labels = label_hidden(x_labels, first_labels, second_labels, out_labels)
    hidden = multiply_arrays(
        x,
        x_labels,
        first,
        first_labels,
        hidden_labels,
        promote(x.dtype, first.dtype, second.dtype),
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
    hidden = weight.scale * hidden
    if weight.gate is not None:
        gate_labels = weight.gate_labels(stored)
        hidden = scale_along(hidden, hidden_labels, weight.gate, gate_labels)
    hidden = name_hidden(hidden)
    # B (A x)
    update = multiply_arrays(
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
    return add(base, update)


def order_factors(
    weight: Factored, stored: Labels, x_labels: Labels, out_labels: Labels
) -> list[tuple[Array, Labels]]:
    """The two factors and their labels. First comes the one that owns more of what is
    summed over, which makes the intermediate result smallest."""
    summed = [
        math.prod(
            weight.base.shape[axis]
            for axis in axes
            if stored[axis] in x_labels and stored[axis] not in out_labels
        )
        for axes in (weight.rows, weight.columns)
    ]
    factors: list[tuple[Array, Labels]] = [
        (weight.b, weight.b_labels(stored)),
        (weight.a, weight.a_labels(stored)),
    ]
    return factors if summed[0] > summed[1] else factors[::-1]


def label_hidden(
    x_labels: Labels, first_labels: Labels, second_labels: Labels, out_labels: Labels
) -> list[Label]:
    """The labels of the product of `x` with the first factor."""
    wanted = {*out_labels, *second_labels}
    either = dict.fromkeys([*x_labels, *first_labels])
    return [label for label in either if label in wanted]


def _contract_scaled(
    weight: Factored,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    x_labels: Labels,
    stored: Labels,
    out_labels: Labels,
    **arguments: Any,
) -> Array:
    """As `_contract_separately`, for a weight with a gain. With dropout the base sees
    all of `x`, and what the gain changes of it is part of the update:
    `W x + (gain - 1) W drop(x) + gain * scale * B (A drop(x))`."""
    assert weight.gain is not None
    if low_rank_x is not None:
        arguments |= dict(x_labels=x_labels, stored=stored, out_labels=out_labels)
        adapted = _contract_scaled(weight, low_rank_x, **arguments)
        arguments["is_frozen"] |= weight.has_frozen_base
        arguments["labels"] = arguments.pop("stored")
        x = x - low_rank_x.astype(x.dtype)
        return add(contract_base(weight.base, x, **arguments), adapted)
    gain, labels = drop_constant_axes(weight.gain, stored)
    multiply = functools.partial(
        _contract_separately,
        weight.replace(gain=None),
        stored=stored,
        out_labels=out_labels,
        **arguments,
    )
    if set(labels) <= set(out_labels):
        y = multiply(x, x_labels=x_labels)
        return scale_along(y, out_labels, gain, labels)

    # The gain varies along a summed axis: `x` is scaled before the product.
    missing = [label for label in labels if label not in x_labels]
    sizes = [gain.shape[labels.index(label)] for label in missing]
    # On a mesh with explicit axes `x` keeps its sharding.
    gain = unshard(gain)
    all_labels = [*x_labels, *missing]

    def scaled(x: Array) -> Array:
        x = expand(x, sizes, range(x.ndim, x.ndim + len(missing)))
        return scale_along(x, all_labels, gain, labels)

    return multiply(scaled(x), x_labels=all_labels)

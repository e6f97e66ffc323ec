"""Primitives that are linear in the weight: products and convolutions."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from ..._factored import (
    add,
    contract,
    convolve,
    Factored,
    find_explicit_sharding,
    is_factored,
    Label,
    label_hidden,
    Labels,
    multiply_arrays,
    name_product,
    NotFactored,
    order_factors,
    precision_for_any_dtype,
    RANK,
)
from ..._shared import (
    accumulation_dtype,
    explicit_sharding,
    is_array,
    product_sharding,
    promote,
)
from ..interpreter import Equation
from ..registry import rule


@rule("dot_general", "lorax_multiply_vector")
def _dot_general(equation: Equation, x: Any, y: Any) -> Sequence[Any]:
    (x_summed, y_summed), (x_batch, y_batch) = equation.params["dimension_numbers"]
    x_labels: list[Label] = [("x", i) for i in range(x.ndim)]
    y_labels: list[Label] = [("y", i) for i in range(y.ndim)]
    for i, j in zip([*x_summed, *x_batch], [*y_summed, *y_batch]):
        y_labels[j] = x_labels[i]
    paired = {*x_summed, *x_batch}, {*y_summed, *y_batch}
    out_labels = [x_labels[i] for i in x_batch]
    out_labels += [x_labels[i] for i in range(x.ndim) if i not in paired[0]]
    out_labels += [y_labels[j] for j in range(y.ndim) if j not in paired[1]]
    (out,) = equation.out_avals
    dtype = x.dtype if x.dtype == y.dtype else promote(x.dtype, y.dtype)
    if out.dtype != dtype and promote(
        out.dtype, accumulation_dtype(dtype)
    ) != accumulation_dtype(dtype):
        dtype = out.dtype
    # Of two weights, one that is neither scaled nor nested is taken apart.
    if is_factored(x) and (not is_factored(y) or _can_be_taken_apart(y)):
        x, x_labels, y, y_labels = y, y_labels, x, x_labels
    multiply: Any = _contract_weights if is_factored(x) else _contract
    options = dict(
        precision=equation.params["precision"],
        out_sharding=equation.params.get("out_sharding"),
    )
    result = multiply(x, x_labels, y, y_labels, out_labels, dtype, **options)
    return [name_product(result.astype(out.dtype))]


def _contract(
    x: Array,
    x_labels: Labels,
    y: Factored,
    labels: Labels,
    out_labels: Labels,
    dtype: jnp.dtype,
    *,
    precision: Any,
    out_sharding: NamedSharding | None = None,
) -> Array:
    return contract(
        y,
        x if x.dtype == dtype else x.astype(dtype),
        x_labels=tuple(x_labels),
        labels=tuple(labels),
        out_labels=tuple(out_labels),
        precision=precision,
        out_sharding=out_sharding,
    )


def _contract_weights(
    x: Factored,
    x_labels: Labels,
    y: Factored,
    labels: Labels,
    out_labels: Labels,
    dtype: jnp.dtype,
    *,
    precision: Any,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """The base of `x` meets `y`, and so do its factors, one after the other."""
    if not _can_be_taken_apart(x):
        raise NotFactored("both operands are weights, and scaled or nested")
    x = x.without_gate()
    stored = x.stored_labels(x_labels)
    base = _contract(
        jnp.asarray(x.differentiable_base()),
        stored,
        y,
        labels,
        out_labels,
        dtype,
        precision=precision,
        out_sharding=out_sharding,
    )

    rank = ("x", RANK)
    (first, first_labels), (second, second_labels) = (
        (factor, [rank if label == RANK else label for label in axes])
        for factor, axes in order_factors(x, stored, labels, out_labels)
    )
    hidden_labels = label_hidden(first_labels, labels, second_labels, out_labels)
    dtype = promote(dtype, first.dtype, second.dtype)
    hidden = _contract(
        first,
        first_labels,
        y,
        labels,
        hidden_labels,
        dtype,
        precision=precision_for_any_dtype(precision),
        out_sharding=product_sharding(
            explicit_sharding(first),
            first_labels,
            find_explicit_sharding(y),
            labels,
            hidden_labels,
        ),
    )
    update = multiply_arrays(
        hidden,
        hidden_labels,
        second,
        second_labels,
        out_labels,
        hidden.dtype,
        precision=precision_for_any_dtype(precision),
        out_sharding=explicit_sharding(base),
    )
    return add(base, x.scale * update)


def _can_be_taken_apart(x: Factored) -> bool:
    return x.gain is None and is_array(x.base)


@rule("conv_general_dilated")
def _convolution(equation: Equation, x: Any, kernel: Any) -> Sequence[Any]:
    params = equation.params
    if is_factored(x) or params["batch_group_count"] != 1:
        raise NotFactored("the weight is not the kernel")
    if params.get("out_sharding") is not None:
        raise NotFactored("it asks for a sharding of its result")
    (out,) = equation.out_avals
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    names += ("dimension_numbers", "feature_group_count", "precision")
    result = convolve(kernel, x, **{name: params[name] for name in names})
    return [name_product(result.astype(out.dtype))]


@rule("reduce_sum")
def _reduce_sum(equation: Equation, x: Factored) -> Sequence[Any]:
    """The product with ones. What is summed along batch axes alone is as large as the
    weight, and of a larger rank."""
    summed = equation.params["axes"]
    logical = x.logical_axes()
    if {logical[axis] for axis in summed} <= set(x.batch_axes()):
        raise NotFactored("it sums weights")
    (out,) = equation.out_avals
    labels = tuple(range(x.ndim))
    result = contract(
        x,
        jnp.ones([x.shape[axis] for axis in summed], x.dtype),
        x_labels=tuple(summed),
        labels=labels,
        out_labels=tuple(label for label in labels if label not in summed),
    )
    return [result.astype(out.dtype)]

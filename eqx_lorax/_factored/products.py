"""Products of arrays, written over *labels* instead of axis numbers.

An operand is an array and one label (any hashable) per axis. Labels that two operands
share are summed over, unless they are asked for in the output. That is all a factored
weight needs in order to meet an activation, whichever axes the activation contracts.

Every product here returns the dtype it was accumulated in: float32 for the narrow
floating dtypes, the operands' own dtype otherwise. Callers add up what they have to add
and round once.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from .._shared import accumulation_dtype, relabel
from .primitives import (
    apart_on_cpu,
    convolve_depthwise,
    convolve_padded,
    is_depthwise,
    is_small_product,
    multiply_vector,
    product_with_factor,
)


Label: TypeAlias = Hashable
Labels: TypeAlias = Sequence[Label]
# As `jax.lax.dot_general` and `jax.lax.conv_general_dilated` take it.
Precision: TypeAlias = Any

TangentInY: TypeAlias = Callable[[Array, Array], Array]

# The label of the rank axis. Unlike any axis of a weight, those being integers.
RANK = "rank"


class NotFactored(Exception):
    """An operation that cannot be done to base and factors separately. The message says
    why, as the end of a sentence."""


def precision_for_any_dtype(precision: Precision) -> Precision:
    """`precision`, or `None` if only operands of some dtypes can have it. An algorithm
    that fits a narrow base, for example, does not fit its wide factors."""
    parts = precision if isinstance(precision, tuple) else (precision,)
    return precision if all(isinstance(p, lax.Precision) for p in parts) else None


def lay_out(x: Array, labels: Labels, wanted: Labels) -> Array:
    """`x` with the axes `wanted`; what it lacks or has too many are of size one."""
    extra = [i for i, label in enumerate(labels) if label not in wanted]
    labels = [label for label in labels if label in wanted]
    x = lax.squeeze(x, extra)
    present = [label for label in wanted if label in labels]
    x = lax.transpose(x, [labels.index(label) for label in present])
    return lax.expand_dims(x, [i for i, v in enumerate(wanted) if v not in labels])


def drop_constant_axes(gain: Array, labels: Labels) -> tuple[Array, list[Label]]:
    """`gain` and its labels without the axes of size one."""
    along = [i for i, size in enumerate(gain.shape) if size != 1]
    return gain.reshape([gain.shape[i] for i in along]), [labels[i] for i in along]


def scale_along(y: Array, labels: Labels, gain: Array, gain_labels: Labels) -> Array:
    """`y` times `gain`, which is constant along the axes that it does not have or of
    which it has one entry. All others must be among `labels`."""
    gain, gain_labels = drop_constant_axes(gain, gain_labels)
    order = [label for label in labels if label in gain_labels]
    gain = lax.transpose(gain, [gain_labels.index(label) for label in order])
    along = [i for i, label in enumerate(labels) if label in gain_labels]
    return y * lax.broadcast_in_dim(gain.astype(y.dtype), y.shape, along)


def _multiply(
    product: Callable[[Array, Array, jnp.dtype | None], Array],
    x: Array,
    y: Array,
    y_is_frozen: bool,
    tangent_in_y: TangentInY | None = None,
    *,
    is_tangent: bool = False,
) -> Array:
    """`product(x, y, preferred_element_type)` in the accumulation dtype of `x` and `y`,
    and without a tangent for `y` if that is frozen, whatever the order of the
    derivative.

    Tangents are products in the operands' own narrow dtype, as those of a plain layer
    are: differentiating through `preferred_element_type` would make them products of
    wide arrays (and for a convolution, whose operands must agree, an error).

    The backward pass uses `y` itself. `jax.lax.stop_gradient(y)` would be a new array,
    and `scan` would keep a copy for each layer. It is a JVP with symbolic zeros, not a
    VJP, because a VJP below the `vmap` around every Equinox layer forms one gradient
    per example.
    """
    is_wide = is_tangent or accumulation_dtype(x.dtype) == x.dtype
    preferred = None if is_wide else accumulation_dtype(x.dtype)
    if is_wide and not y_is_frozen and tangent_in_y is None:
        return product(x, y, None)

    @jax.custom_jvp
    def ruled(x, y):
        return product(x, y, preferred)

    def jvp(primals, tangents):
        (x, y), (x_dot, y_dot) = primals, tangents
        # Not the product itself: derivatives of higher order go by this rule too.
        out = ruled(x, y)
        terms = []
        if not isinstance(x_dot, SymbolicZero):
            in_x = functools.partial(_multiply, product, is_tangent=True)
            terms.append(in_x(x_dot, y, y_is_frozen, tangent_in_y))
        if not y_is_frozen and not isinstance(y_dot, SymbolicZero):
            in_y = tangent_in_y or (lambda x, y_dot: product(x, y_dot, None))
            terms.append(in_y(x, y_dot))
        terms = [term.astype(out.dtype) for term in terms]
        return out, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(out)

    ruled.defjvp(jvp, symbolic_zeros=True)
    return ruled(x, y)


def multiply_arrays(
    x: Array,
    x_labels: Labels,
    y: Array,
    y_labels: Labels,
    out_labels: Labels,
    dtype: DTypeLike,
    *,
    y_is_frozen: bool = False,
    precision: Precision = None,
    out_sharding: NamedSharding | None = None,
) -> Array:
    """The sum over every label of `x` and `y` that is not among `out_labels`.

    A label that only one operand has must be among `out_labels`. If `y` is frozen, no
    derivative is taken in it. For `out_sharding` see `jax.lax.dot_general`.

    **Returns:**

    An array with one axis per label of `out_labels`, in the accumulation dtype of
    `dtype`, to which `x` and `y` are cast before they meet.
    """
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in out_labels]
    summed = [label for label in shared if label not in out_labels]
    x_free = [label for label in x_labels if label not in shared]
    y_free = [label for label in y_labels if label not in shared]

    def positions(labels: Labels, wanted: Labels) -> tuple[int, ...]:
        return tuple(list(labels).index(label) for label in wanted)

    dimension_numbers = (
        (positions(x_labels, summed), positions(y_labels, summed)),
        (positions(x_labels, batch), positions(y_labels, batch)),
    )

    def dot_general(x, y, preferred_element_type):
        if x.dtype == jnp.bfloat16 and preferred_element_type is not None:
            x = apart_on_cpu(x)
        if summed == list(x_labels) and is_small_product(x, y):
            return multiply_vector(x, y, y_labels.index(summed[0]), precision)
        return lax.dot_general(
            x,
            y,
            dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=relabel(out_sharding, out_labels, batch + x_free + y_free),
        )

    def with_factor(x, y_dot):
        """The tangent in `y` whose transpose is faster than that of `dot_general`."""
        y_dot = lax.transpose(y_dot, positions(y_labels, y_free + summed))
        sizes = y_dot.shape[: len(y_free)]
        # No -1 for a size: there may be no tokens at all.
        columns = math.prod(y_dot.shape[len(y_free) :])
        y_dot = y_dot.reshape(math.prod(sizes), columns)
        x = x.reshape(*x.shape[: len(x_free)], columns)
        out = product_with_factor(x, y_dot, precision=precision)
        return out.reshape(*out.shape[:-1], *sizes)

    # The first of two factors gets its gradient in the right order by itself.
    has_natural_order = y_labels[0] == RANK and RANK not in summed
    is_of_tokens = not batch and y_free and list(x_labels) == x_free + summed
    has_own_tangent = is_of_tokens and not has_natural_order and out_sharding is None
    out = _multiply(
        dot_general,
        x.astype(dtype),
        y.astype(dtype),
        y_is_frozen,
        with_factor if has_own_tangent else None,
    )
    order = positions(batch + x_free + y_free, out_labels)
    return out if order == tuple(range(out.ndim)) else lax.transpose(out, order)


def convolve_arrays(
    x: Array,
    kernel: Array,
    dtype: DTypeLike,
    *,
    kernel_is_frozen: bool = False,
    **conv: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` of `x` with `kernel`, both cast to `dtype`, in
    the accumulation dtype. If the kernel is frozen, no derivative is taken in it.

    **Arguments:**

    - `conv`: All other arguments of `jax.lax.conv_general_dilated`, with
        `dimension_numbers` as `jax.lax.ConvDimensionNumbers`.
    """

    is_fast = is_depthwise(x, kernel, conv)
    product = convolve_depthwise if is_fast else convolve_padded

    def convolve(x, kernel, preferred_element_type):
        return product(x, kernel, **conv, preferred_element_type=preferred_element_type)

    return _multiply(convolve, x.astype(dtype), kernel.astype(dtype), kernel_is_frozen)

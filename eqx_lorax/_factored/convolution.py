"""How a factored kernel meets images."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from .._shared import accumulation_dtype, AnyArray, axes_from_end, promote
from .base import (
    add,
    dense,
    multiply_factors,
    refuse,
    register_arrays,
    stands_for_array,
)
from .form import Base, Factored
from .fused import choose_fusing
from .names import name_hidden
from .primitives import Product, unpack
from .products import (
    convolve_arrays,
    Label,
    lay_out,
    multiply_arrays,
    NotFactored,
    Precision,
    precision_for_any_dtype,
    RANK,
    scale_along,
)


def channels_first(ndim: int) -> lax.ConvDimensionNumbers:
    """The layout of Equinox and PyTorch: images `(batch, channels, *spatial)`, kernels
    `(out, in / groups, *window)`, of `ndim` axes each."""
    axes = tuple(range(ndim))
    return lax.ConvDimensionNumbers(axes, axes, axes)


def convolve(
    kernel: Factored,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    precision: Precision = None,
    is_frozen: bool = False,
    **conv: Any,
) -> Array:
    """The convolution of images with a kernel, one of whose factors owns the window.

    The factor that owns the window is a kernel itself, of `rank` outputs if the other
    factor owns the kernel's outputs (that one then mixes them into the true ones), of
    `rank` inputs if the other one owns its inputs (that one then mixes the image's
    channels first).

    **Arguments:**

    - `x`: The images, of the dtype that the result is to have.
    - `dimension_numbers`: The layout of images, kernel and result.
    - `feature_group_count`: The number of groups. Every group has outputs of its own in
        the factor that owns them, and shares the factor that owns the inputs, so the
        update has the kernel's own shape.
    - `low_rank_x`: The images for the factors, if they are not `x`.
    - `is_frozen`: Whether the factors are frozen too, as below another adapter.
    - `conv`: `window_strides`, `padding`, `lhs_dilation`, `rhs_dilation`. See
        `jax.lax.conv_general_dilated`.

    **Returns:**

    The images, not yet rounded: in float32 where `x` or a factor is narrow.

    **Raises:**

    `NotFactored` if both factors own axes of the window, or neither.
    """
    arguments: dict[str, Any] = dict(
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **conv,
    )
    fuses_from = None
    if low_rank_x is None:
        fuses_from = choose_fusing(kernel, x, kernel.columns)
    if fuses_from is None:
        return _convolve_separately(
            kernel, x, low_rank_x, is_frozen=is_frozen, **arguments
        )
    arguments["is_frozen"] = is_frozen
    product = Product(
        _convolve_separately,
        _freeze(arguments),
        fused=_convolve_fused,
        factor=len(jax.tree.leaves(kernel.base)),
        fuses_from=fuses_from,
        token_size=_token_size(x, dimension_numbers, **conv),
    )
    return unpack(product, kernel, x)


def _token_size(
    x: Array,
    dimension_numbers: lax.ConvDimensionNumbers,
    *,
    window_strides: Sequence[int],
    lhs_dilation: Sequence[int],
    **_: Any,
) -> int:
    """About how many entries of the images there are for a place in the result."""
    channels = x.shape[dimension_numbers.lhs_spec[1]]
    return max(1, channels * math.prod(window_strides) // math.prod(lhs_dilation))


def _convolve_fused(
    kernel: Factored, x: Array, *, is_frozen: bool, **arguments: Any
) -> Array:
    return convolve_arrays(x, dense(kernel), x.dtype, **arguments)


@functools.singledispatch
def convolve_base(base: Base, x: Array, **arguments: Any) -> Array:
    """`convolve` for a base of any kind, without `low_rank_x`. If `is_frozen`, no
    derivative is taken in the base."""
    if not stands_for_array(base):
        raise refuse(base, "convolve_base")
    arguments["is_frozen"] = True
    return unpack(Product(_convolve_dense, _freeze(arguments)), base, x)


def _convolve_dense(base: Base, x: Array, **arguments: Any) -> Array:
    return convolve_base(lax.stop_gradient(dense(base)), x, **arguments)


def _freeze(arguments: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments as a `Product` has them: `padding` is a list of pairs."""

    def freeze(x: Any) -> Any:
        return tuple(map(freeze, x)) if isinstance(x, list) else x

    return tuple((name, freeze(x)) for name, x in arguments.items())


@convolve_base.register
def _(base: Factored, x: Array, **arguments: Any) -> Array:
    return convolve(base, x, **arguments)


@register_arrays(convolve_base)
def _(base: AnyArray, x: Array, *, is_frozen: bool = False, **arguments: Any) -> Array:
    return convolve_arrays(
        x, jnp.asarray(base), x.dtype, kernel_is_frozen=is_frozen, **arguments
    )


def _convolve_separately(
    weight: Factored,
    x: Array,
    low_rank_x: Array | None = None,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    precision: Precision,
    is_frozen: bool,
    **conv: Any,
) -> Array:
    """The images meet the base, then the factors one after the other."""
    weight = weight.without_gate()
    if weight.gain is not None and low_rank_x is not None:
        # As in `contraction`: the base sees all of `x`, and what the gain changes of it
        # is part of the update.
        arguments: dict[str, Any] = dict(
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
            **conv,
        )
        adapted = _convolve_separately(
            weight, low_rank_x, is_frozen=is_frozen, **arguments
        )
        is_frozen = is_frozen or weight.has_frozen_base
        rest = x - low_rank_x.astype(x.dtype)
        return add(
            convolve_base(weight.base, rest, is_frozen=is_frozen, **arguments), adapted
        )
    logical = weight.logical_axes()
    inputs = logical[dimension_numbers.rhs_spec[1]]
    gain = weight.gain
    if gain is not None and gain.size == gain.shape[inputs] != 1:
        # The kernel is scaled along its inputs: the images are, in its place.
        feature = dimension_numbers.lhs_spec[1]
        each = jnp.tile(gain.reshape(-1), feature_group_count)
        x = scale_along(x, range(x.ndim), each, [feature])
        weight = weight.replace(gain=None)
    kernel_axes = tuple(logical[axis] for axis in dimension_numbers.rhs_spec)
    mixer_owns = _mixer(weight, kernel_axes) if weight.rank else None
    as_stored = tuple(axis % weight.base.ndim for axis in kernel_axes)
    base = convolve_base(
        weight.base,
        x,
        is_frozen=is_frozen or weight.has_frozen_base,
        dimension_numbers=dimension_numbers._replace(rhs_spec=as_stored),
        feature_group_count=feature_group_count,
        precision=precision,
        **conv,
    )
    if weight.rank == 0:
        return base
    branch = _outputs_mixed if mixer_owns == "outputs" else _inputs_mixed
    if _is_depthwise(weight, kernel_axes, feature_group_count):
        branch = _multiplied_first
    update = branch(
        weight,
        x if low_rank_x is None else low_rank_x,
        kernel_axes,
        groups=feature_group_count,
        is_frozen=is_frozen,
        precision=precision_for_any_dtype(precision),
        dimension_numbers=dimension_numbers,
        **conv,
    )
    y = add(base, weight.scale * update)
    if weight.gain is None:
        return y
    if weight.gain.size != weight.gain.shape[kernel_axes[0]]:
        raise NotFactored("the kernel is scaled along its window")
    feature = dimension_numbers.out_spec[1]
    gain = weight.gain.reshape(-1)
    return scale_along(y, range(y.ndim), gain, [feature])


def _is_depthwise(weight: Factored, kernel_axes: Sequence[int], groups: int) -> bool:
    """Whether each group has one input and one output. Then `b · a`, of one entry for
    each channel and place in the window, is tiny beside what the factors would make of
    the images, one after the other: `rank` channels for each channel."""
    outputs, inputs = (weight.base.shape[axis] for axis in kernel_axes[:2])
    return outputs == groups and inputs == 1


def _multiplied_first(
    weight: Factored,
    x: Array,
    kernel_axes: Sequence[int],
    *,
    groups: int,
    is_frozen: bool,
    dimension_numbers: lax.ConvDimensionNumbers,
    **conv: Any,
) -> Array:
    """The factors are multiplied, and the images meet the result."""
    stored = axes_from_end(weight.ndim)
    b, a = (weight.b, weight.b_labels(stored)), (weight.a, weight.a_labels(stored))
    as_stored = tuple(axis % weight.ndim for axis in kernel_axes)
    return convolve_arrays(
        x,
        multiply_factors(*b, *a, stored, weight.base),
        accumulation_dtype(promote(x.dtype, weight.b.dtype, weight.a.dtype)),
        kernel_is_frozen=is_frozen,
        dimension_numbers=dimension_numbers._replace(rhs_spec=as_stored),
        feature_group_count=groups,
        **conv,
    )


def _mixer(weight: Factored, kernel_axes: Sequence[int]) -> str:
    """What the factor without a window owns: the kernel's `"outputs"` or `"inputs"`."""
    outputs, inputs, *window = kernel_axes
    window = [axis for axis in window if weight.base.shape[axis] != 1]
    for mixer, kernel in ((weight.rows, weight.columns), (weight.columns, weight.rows)):
        if all(axis in kernel for axis in window):
            if outputs in mixer and inputs in kernel:
                return "outputs"
            if inputs in mixer and outputs in kernel:
                return "inputs"
    raise NotFactored(
        "no factor owns the kernel's whole window: of a convolution's kernel one "
        "factor must own the outputs, or the inputs, alone, as with "
        f"`lorax.LoraSpec(rank, rows=({outputs + weight.base.ndim},))`"
    )


def _factors(
    weight: Factored, mixed: int, kernel_axes: Sequence[int]
) -> tuple[Array, Array]:
    """The factor that owns the axis `mixed`, as `(size, rank)`, and the other one with
    the axes `(rank, *kernel_axes)` but `mixed`."""
    stored = axes_from_end(weight.ndim)
    b_labels, a_labels = weight.b_labels(stored), weight.a_labels(stored)
    factors = [(weight.b, b_labels), (weight.a, a_labels)]
    mixer, kernel = factors if mixed in b_labels else factors[::-1]
    others = [axis for axis in kernel_axes if axis != mixed]
    return lay_out(*mixer, [mixed, RANK]), lay_out(*kernel, [RANK, *others])


def _outputs_mixed(
    weight: Factored,
    x: Array,
    kernel_axes: Sequence[int],
    *,
    groups: int,
    is_frozen: bool,
    precision: Precision,
    dimension_numbers: lax.ConvDimensionNumbers,
    **conv: Any,
) -> Array:
    mixer, kernel = _factors(weight, kernel_axes[0], kernel_axes)
    dtype = promote(x.dtype, mixer.dtype, kernel.dtype)
    lhs_spec, _, out_spec = dimension_numbers
    # Channels first, for the groups: they share the kernel, so to it they are as good
    # as further images.
    numbers = channels_first(x.ndim)
    if groups == 1:
        numbers = numbers._replace(lhs_spec=lhs_spec, out_spec=out_spec)
    else:
        x = lax.transpose(x, lhs_spec)
        batch, channels, *spatial = x.shape
        x = x.reshape(batch * groups, channels // groups, *spatial)
    hidden = convolve_arrays(
        x,
        kernel,
        dtype,
        kernel_is_frozen=is_frozen,
        dimension_numbers=numbers,
        precision=precision,
        **conv,
    )
    hidden = name_hidden(hidden)
    names = ["batch", RANK, *(f"window {i}" for i in range(x.ndim - 2))]
    out_labels = [names[out_spec.index(i)] for i in range(x.ndim)]
    feature = out_spec[1]
    out_labels[feature : feature + 1] = ["group", "out"]
    if groups == 1:
        hidden = lax.expand_dims(hidden, [feature])
        labels = [RANK if label == "out" else label for label in out_labels]
    else:
        hidden = hidden.reshape(-1, groups, *hidden.shape[1:])
        labels = ["batch", "group", *names[1:]]
    update = multiply_arrays(
        hidden,
        labels,
        mixer.reshape(groups, -1, mixer.shape[1]),
        ["group", "out", RANK],
        out_labels,
        hidden.dtype,
        y_is_frozen=is_frozen,
        precision=precision,
    )
    return lax.collapse(update, feature, feature + 2)


def _inputs_mixed(
    weight: Factored,
    x: Array,
    kernel_axes: Sequence[int],
    *,
    groups: int,
    is_frozen: bool,
    precision: Precision,
    dimension_numbers: lax.ConvDimensionNumbers,
    **conv: Any,
) -> Array:
    mixer, kernel = _factors(weight, kernel_axes[1], kernel_axes)
    dtype = promote(x.dtype, mixer.dtype, kernel.dtype)
    feature = dimension_numbers.lhs_spec[1]
    shape = list(x.shape)
    shape[feature : feature + 1] = [groups, mixer.shape[0]]
    labels: list[Label] = list(range(x.ndim))
    labels[feature : feature + 1] = ["group", "in"]
    out_labels = [RANK if label == "in" else label for label in labels]
    hidden = multiply_arrays(
        x.reshape(shape),
        labels,
        mixer,
        ["in", RANK],
        out_labels,
        dtype,
        y_is_frozen=is_frozen,
        precision=precision,
    )
    hidden = name_hidden(lax.collapse(hidden, feature, feature + 2))
    out, *window = range(1, kernel.ndim)
    return convolve_arrays(
        hidden,
        lax.transpose(kernel, [out, 0, *window]),
        hidden.dtype,
        kernel_is_frozen=is_frozen,
        dimension_numbers=dimension_numbers._replace(rhs_spec=tuple(range(x.ndim))),
        feature_group_count=groups,
        precision=precision,
        **conv,
    )

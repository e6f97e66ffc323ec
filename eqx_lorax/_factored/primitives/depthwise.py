"""Depthwise convolutions as sums of shifted images.

XLA's compiler for the CPU has no fast code for as many groups as channels: a window of
3 × 3 takes forty times as long as nine multiplications of shifted images, which it
fuses into one loop. Here the convolution is a primitive that becomes this sum on the
CPU alone. Its gradient in the images is such a convolution again.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ..._shared import accumulation_dtype, has_typed_mesh
from .padding import convolve_padded


# The loop has as many terms as the window has entries.
_MAX_WINDOW = 64


def is_depthwise(x: Array, kernel: Array, conv: dict[str, Any]) -> bool:
    """Whether `convolve_depthwise` can do the work of `jax.lax.conv_general_dilated`
    with these arguments."""
    outputs, inputs, *window = (
        kernel.shape[axis] for axis in conv["dimension_numbers"].rhs_spec
    )
    return (
        outputs == conv.get("feature_group_count", 1)
        and inputs == 1
        and math.prod(window) <= _MAX_WINDOW
        and jnp.issubdtype(x.dtype, jnp.floating)
        # On meshes that types speak of, JAX knows best.
        and not has_typed_mesh(x, kernel)
    )


def convolve_depthwise(x: Array, kernel: Array, **conv: Any) -> Array:
    """`jax.lax.conv_general_dilated` with one input and one output for each group. It
    needs all arguments of that but the counts of groups of batches."""
    if isinstance(padding := conv["padding"], str):
        lhs_spec, rhs_spec, _ = conv["dimension_numbers"]
        padding = lax.padtype_to_pads(
            _spatial_sizes(x, lhs_spec, conv["lhs_dilation"]),
            _spatial_sizes(kernel, rhs_spec, conv["rhs_dilation"]),
            conv["window_strides"],
            padding,
        )
    conv["padding"] = tuple((int(low), int(high)) for low, high in padding)
    for name in ("window_strides", "lhs_dilation", "rhs_dilation"):
        conv[name] = tuple(conv[name])
    return _depthwise.bind(x, kernel, **conv)


def _spatial_sizes(x: Array, spec: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [_dilate(x.shape[axis], by) for axis, by in zip(spec[2:], dilation)]


def _dilate(size: int, by: int) -> int:
    return (size - 1) * by + 1 if size else 0


def _shifted(x: Array, kernel: Array, **conv: Any) -> Array:
    lhs_spec, rhs_spec, out_spec = conv["dimension_numbers"]
    out = jax.eval_shape(
        lambda x, kernel: convolve_padded(x, kernel, **conv), x, kernel
    )
    if out.size == 0:
        return jnp.zeros(out.shape, out.dtype)
    spatial, shape = lhs_spec[2:], list(x.shape)
    edges = [(0, 0, 0)] * x.ndim
    for i, axis in enumerate(spatial):
        edges[axis] = (*conv["padding"][i], conv["lhs_dilation"][i] - 1)
        shape[axis] = out.shape[out_spec[2 + i]]
    # Products of narrow arrays are added up in float32, and rounded once.
    dtype = accumulation_dtype(out.dtype)
    # Without the barrier each term would ask whether it is on the edge.
    x = lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), edges))
    kernel = lax.transpose(kernel, rhs_spec)[:, 0].astype(dtype)
    y = jnp.zeros((), dtype)
    for entry in np.ndindex(kernel.shape[1:]):
        starts, strides = [0] * x.ndim, [1] * x.ndim
        for i, axis in enumerate(spatial):
            starts[axis] = entry[i] * conv["rhs_dilation"][i]
            strides[axis] = conv["window_strides"][i]
        limits = [
            start + _dilate(size, by) for start, size, by in zip(starts, shape, strides)
        ]
        seen = lax.slice(x, starts, limits, strides).astype(dtype)
        each = lax.broadcast_in_dim(kernel[:, *entry], shape, [lhs_spec[1]])
        y = y + seen * each
    order = [lhs_spec[out_spec.index(axis)] for axis in range(x.ndim)]
    return lax.transpose(y, order).astype(out.dtype)


def _gradient_in_x(cotangent: Array, x: Any, kernel: Array, **conv: Any) -> Array:
    lhs_spec, rhs_spec, out_spec = conv["dimension_numbers"]
    padding = []
    for i, (low, _) in enumerate(conv["padding"]):
        size = _dilate(x.aval.shape[lhs_spec[2 + i]], conv["lhs_dilation"][i])
        reach = _dilate(kernel.shape[rhs_spec[2 + i]], conv["rhs_dilation"][i]) - 1
        seen = _dilate(cotangent.shape[out_spec[2 + i]], conv["window_strides"][i])
        padding.append((reach - low, size + low - seen))
    conv |= dict(
        padding=tuple(padding),
        window_strides=conv["lhs_dilation"],
        lhs_dilation=conv["window_strides"],
        dimension_numbers=lax.ConvDimensionNumbers(out_spec, rhs_spec, lhs_spec),
    )
    return _depthwise.bind(cotangent, lax.rev(kernel, rhs_spec[2:]), **conv)


def _gradient_in_kernel(cotangent: Array, x: Array, kernel: Any, **conv: Any) -> Array:
    zeros = jnp.zeros(kernel.aval.shape, kernel.aval.dtype)
    _, pull = jax.vjp(lambda kernel: convolve_padded(x, kernel, **conv), zeros)
    return pull(cotangent)[0]


def _batched(
    operands: tuple[Array, Array], dims: tuple[Any, Any], **conv: Any
) -> tuple[Array, int]:
    (x, kernel), (x_dim, kernel_dim) = operands, dims
    lhs_spec, rhs_spec, out_spec = conv["dimension_numbers"]
    if kernel_dim is None:
        # More images.
        size = x.shape[x_dim]
        y = _depthwise.bind(_merge(x, x_dim, lhs_spec[0]), kernel, **conv)
        return _split(y, out_spec[0], size), out_spec[0]
    # More channels.
    size = kernel.shape[kernel_dim]
    if x_dim is None:
        x, x_dim = jnp.broadcast_to(x, (size, *x.shape)), 0
    conv["feature_group_count"] *= size
    y = _depthwise.bind(
        _merge(x, x_dim, lhs_spec[1]), _merge(kernel, kernel_dim, rhs_spec[0]), **conv
    )
    return _split(y, out_spec[1], size), out_spec[1]


def _merge(x: Array, axis: int, into: int) -> Array:
    """`x` with one axis merged into another, which is counted without the first."""
    return lax.collapse(jnp.moveaxis(x, axis, into), into, into + 2)


def _split(x: Array, axis: int, size: int) -> Array:
    # No -1 for a size: there may be no images at all.
    rest = x.shape[axis] // size if size else 0
    return x.reshape(*x.shape[:axis], size, rest, *x.shape[axis + 1 :])


def _abstract(x: Any, kernel: Any, **conv: Any) -> Any:
    out = jax.eval_shape(
        lambda x, kernel: convolve_padded(x, kernel, **conv), x, kernel
    )
    return x.update(shape=out.shape, dtype=out.dtype, weak_type=False)


_depthwise = Primitive("lorax_convolve_depthwise")
_depthwise.def_impl(
    jax.jit(
        lambda x, kernel, **conv: _depthwise.bind(x, kernel, **conv),
        static_argnames=(
            *("window_strides", "padding", "lhs_dilation", "rhs_dilation"),
            *("dimension_numbers", "feature_group_count"),
            *("precision", "preferred_element_type"),
        ),
    )
)
_depthwise.def_abstract_eval(_abstract)
ad.defbilinear(_depthwise, _gradient_in_x, _gradient_in_kernel)
batching.primitive_batchers[_depthwise] = _batched
mlir.register_lowering(
    _depthwise, mlir.lower_fun(convolve_padded, multiple_results=False)
)
mlir.register_lowering(
    _depthwise, mlir.lower_fun(_shifted, multiple_results=False), platform="cpu"
)

"""Convolutions with negative padding.

XLA for the CPU is wrong at the gradient of a float32 kernel for some negative paddings
(until JAX 0.10). So edges are cut off before the convolution.
"""

from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array


def convolve_padded(
    x: Array, kernel: Array, *, padding: Any, lhs_dilation: Any = None, **conv: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, where `jax.lax.pad` cuts off edges."""
    spatial = conv["dimension_numbers"].lhs_spec[2:]
    dilation = list(lhs_dilation or [1] * len(spatial))
    if not isinstance(padding, str) and any(min(pair) < 0 for pair in padding):
        edges, padding = [(0, 0, 0)] * x.ndim, list(padding)
        for i, axis in enumerate(spatial):
            if min(padding[i]) < 0:
                edges[axis] = (*padding[i], dilation[i] - 1)
                padding[i], dilation[i] = (0, 0), 1
        x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    return lax.conv_general_dilated(
        x, kernel, padding=padding, lhs_dilation=dilation, **conv
    )

"""The padding and strides of Equinox's convolutions, in the terms of `jax.lax`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array


_PAD_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


def conv_geometry(
    conv: eqx.nn.Conv | eqx.nn.ConvTranspose, spatial: Sequence[int]
) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    """The geometry of `conv` on images `(channels, *spatial)`.

    **Returns:**

    A function that pads an image where the padding is not zeros, and the keyword
    arguments of `jax.lax.conv_general_dilated` for everything else.
    """
    ones = (1,) * conv.num_spatial_dims
    if isinstance(conv, eqx.nn.ConvTranspose):
        padding = _transposed_padding(conv)
        pad_width = [(0, 0)] * conv.num_spatial_dims
        if conv.padding_mode == "CIRCULAR":
            # A whole stride of padding is a whole pixel. The rest are zeros in between.
            strided = list(zip(padding, conv.stride))
            pad_width = [(low // s, high // s) for (low, high), s in strided]
            padding = [(low % s, high % s) for (low, high), s in strided]
        strides, lhs_dilation = ones, conv.stride
    else:
        padding, pad_width = conv.padding, [(0, 0)] * conv.num_spatial_dims
        if conv.padding_mode != "ZEROS":
            pad_width, padding = _explicit_padding(conv, spatial), "VALID"
        strides, lhs_dilation = conv.stride, ones

    def pad(x: Array) -> Array:
        if not any(low or high for low, high in pad_width):
            return x
        return jnp.pad(x, [(0, 0), *pad_width], _PAD_MODES[conv.padding_mode])

    return pad, dict(
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=conv.dilation,
    )


def _explicit_padding(
    conv: eqx.nn.Conv, spatial: Sequence[int]
) -> list[tuple[int, int]]:
    if not isinstance(conv.padding, str):
        return [(low, high) for low, high in conv.padding]
    window = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation)]
    return lax.padtype_to_pads(spatial, window, conv.stride, conv.padding)


def _transposed_padding(conv: eqx.nn.ConvTranspose) -> list[tuple[int, int]]:
    """The padding of the convolution that equals a transposed one: relationship 14 of
    [A guide to convolution arithmetic](https://arxiv.org/abs/1603.07285)."""
    padding = []
    for i, (kernel, stride, dilation, extra) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, conv.output_padding)
    ):
        reach = dilation * (kernel - 1)
        if not isinstance(conv.padding, str):
            low, high = conv.padding[i]
        elif conv.padding == "VALID":
            low = high = 0
        else:
            total = reach - stride + extra + 1
            extra = max(-total, 0)
            total = max(total, 0)
            low = (total + (conv.padding == "SAME_LOWER")) // 2
            high = total - low
        padding.append((reach - low, reach - high + extra))
    return padding

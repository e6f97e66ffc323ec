"""The layer for `equinox.nn.Conv` and `equinox.nn.ConvTranspose`."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._factored import channels_first, convolve
from .._methods import AbstractLoraWeight
from .calls import add_bias, check_unstacked, drop_inputs, Keys
from .forwarding import run_module
from .geometry import conv_geometry
from .kinds import find_kernel_axes, register
from .layer import AbstractLoraLayer


@register({"weight": find_kernel_axes})
class LoraConv(AbstractLoraLayer):
    """An `equinox.nn.Conv` or `equinox.nn.ConvTranspose`, of any number of spatial
    dimensions, with a factored kernel.

    `a (rank, in / groups, *window)` is a kernel with `rank` outputs, which all groups
    share, and `b (out, rank)` mixes those: the update has the kernel's own shape.
    """

    wrapped: eqx.nn.Conv | eqx.nn.ConvTranspose
    dropout: eqx.nn.Dropout | None = None
    key: Keys | None = None

    adapts = (eqx.nn.Conv, eqx.nn.ConvTranspose)
    by_default = True
    has_dropout = True
    is_lookup = False

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `x`: The image, of shape `(in_channels, *spatial)`. Use `jax.vmap` for a
            batch.
        - `key`: For the dropout on the low-rank branch, if there is any. Defaults to
            the one that `lorax.dropout_key` gave.

        **Returns:**

        An array of shape `(out_channels, *spatial)` and of the dtype that the plain
        layer returns; for bfloat16 and float16 it is rounded once, from float32.

        **Raises:**

        `ValueError` if the layer is a stack of layers, if `x` has the wrong number of
        axes, or if `key` is missing.
        """
        conv = self.wrapped
        if not isinstance(conv.weight, AbstractLoraWeight):
            return run_module(self, operator.call, x, key=key)
        kernel = conv.weight.factored()
        check_unstacked(conv, kernel, conv.num_spatial_dims + 2)
        if x.ndim != conv.num_spatial_dims + 1:
            raise ValueError(
                f"`x` must have {conv.num_spatial_dims + 1} axes, (in_channels, "
                f"*spatial), but has shape {x.shape}. For a batch use `jax.vmap`."
            )
        with jax.named_scope("lorax.LoraConv"):
            dtype = jnp.result_type(x, kernel.dtype)
            x = x.astype(dtype)
            pad, geometry = conv_geometry(conv, x.shape[1:])
            low_rank_x = drop_inputs(self, x, key)
            y = convolve(
                kernel,
                pad(x)[None],
                None if low_rank_x is None else pad(low_rank_x)[None],
                dimension_numbers=channels_first(x.ndim + 1),
                feature_group_count=conv.groups,
                **geometry,
            )
            return add_bias(y[0], dtype, conv.bias)

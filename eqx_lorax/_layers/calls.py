"""Parts of the calls of several layers: checks, dropout, bias."""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray, UInt32

from .._factored import Factored, name_product
from .._methods import AbstractLoraWeight, is_one_key
from .._shared import is_array
from .layer import has_active_dropout


# One key, or one for each layer of a stack.
Keys: TypeAlias = Key[Array, "*layers"] | UInt32[Array, "*layers words"]


def check_unstacked(
    module: Any, weight: AbstractLoraWeight | Factored, ndim: int
) -> None:
    """Raises `ValueError` if `weight` has more axes than that of one layer."""
    if weight.ndim != ndim:
        raise ValueError(
            f"This {type(module).__name__} is a stack of layers: its `weight` has "
            f"shape {weight.shape}, {ndim} axes of which belong to one layer. Call it "
            "below `eqx.filter_vmap` or `jax.lax.scan` over the leading axes."
        )


def drop_inputs(layer: Any, x: Array, key: PRNGKeyArray | None) -> Array | None:
    """The input of the low-rank branch; `None` where that is the input of the base."""
    dropout = layer.dropout
    if dropout is None:
        return None
    key = layer.key if key is None else key
    if has_active_dropout(layer):
        _check_key(key, dropout.p)
    return dropout(x, key=key)


def _check_key(key: Any, rate: float) -> None:
    if key is None:
        raise ValueError(
            f"`key=None`, but this layer was adapted with `dropout={rate}`. Give the "
            "model its keys once a step, `lorax.dropout_key(model, key)`, or pass "
            "`key=...` where the model calls the layer, or switch dropout off with "
            "`eqx.nn.inference_mode(model)`."
        )
    if is_array(key) and not is_one_key(key):
        raise ValueError(
            f"The key of this layer has shape {key.shape}, that of a stack of layers, "
            "of which this is one. Slice keys with the weights: "
            "`eqx.partition(layers, eqx.is_array)` has both in its first part."
        )


def add_bias(y: Array, dtype: jnp.dtype, bias: Array | None) -> Array:
    """`y` plus `bias`, rounded once, to the dtype that a plain layer returns if its
    product without the bias is of `dtype`."""
    if bias is None:
        return name_product(cast(y, dtype))
    result = dtype if dtype == bias.dtype else jnp.result_type(dtype, bias.dtype)
    return name_product(cast(y + cast(bias, y.dtype), result))


def cast(x: Array, dtype: jnp.dtype) -> Array:
    """`x` in this dtype. Outside `jax.jit` a cast that casts nothing takes as long as a
    small product."""
    return x if x.dtype == dtype else x.astype(dtype)

"""The layer for `equinox.nn.Linear`."""

import operator

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from .._factored import contract, Factored
from .._methods import AbstractLoraWeight
from .calls import add_bias, check_unstacked, drop_inputs, Keys
from .forwarding import run_module
from .kinds import find_matrix_axes, register
from .layer import AbstractLoraLayer


# Of a vector, and, as `equinox.nn.Linear` allows it, of the columns of a matrix.
_LABELS = {1: (("in",), ("out",)), 2: (("in", "column"), ("out", "column"))}


@register({"weight": find_matrix_axes})
class LoraLinear(AbstractLoraLayer):
    """An `equinox.nn.Linear` with a factored weight."""

    wrapped: eqx.nn.Linear
    dropout: eqx.nn.Dropout | None = None
    key: Keys | None = None

    adapts = (eqx.nn.Linear,)
    by_default = True
    has_dropout = True
    takes_quantised = True
    is_lookup = False

    def __call__(self, x: ArrayLike, *, key: PRNGKeyArray | None = None) -> Array:
        """**Arguments:**

        - `x`: The input, of shape `(in_features,)`, or `()` if `in_features` is
            `"scalar"`. Use `jax.vmap` for a batch.
        - `key`: For the dropout on the low-rank branch, if there is any. Defaults to
            the one that `lorax.dropout_key` gave.

        **Returns:**

        An array of shape `(out_features,)`, or `()`, and of the dtype that the plain
        layer returns; for bfloat16 and float16 it is rounded once, from float32.

        **Raises:**

        `ValueError` if the layer is a stack of layers, or if `key` is missing.
        """
        linear = self.wrapped
        if not isinstance(linear.weight, AbstractLoraWeight):
            return run_module(self, operator.call, jnp.asarray(x), key=key)
        weight = linear.weight.factored()
        check_unstacked(linear, weight, 2)
        with jax.named_scope("lorax.LoraLinear"):
            x = x if isinstance(x, jax.Array) else jnp.asarray(x)
            if linear.in_features == "scalar":
                if x.shape != ():
                    raise ValueError(f"`x` must have shape (), not {x.shape}.")
                x = x[None]
            _check_input(linear, weight, x)
            dtype = weight.dtype
            if x.dtype != dtype:
                dtype = jnp.result_type(x, dtype)
                x = x.astype(dtype)
            batch = range(x.ndim - 2)
            x_labels, out_labels = _LABELS[min(x.ndim, 2)]
            # W x + scale * B (A x)
            y = contract(
                weight,
                x,
                drop_inputs(self, x, key),
                x_labels=(*batch, *x_labels),
                labels=("out", "in"),
                out_labels=(*batch, *out_labels),
            )
            y = add_bias(y, dtype, linear.bias)
            return y.reshape(()) if linear.out_features == "scalar" else y


def _check_input(linear: eqx.nn.Linear, weight: Factored, x: Array) -> None:
    size = weight.shape[-1]
    if x.ndim < 2 and x.shape != (size,):
        raise ValueError(
            f"Cannot multiply shapes {weight.shape} @ {x.shape}: a "
            f"{type(linear).__name__} takes a vector, here of shape ({size},)."
        )
    if x.ndim > 1 and x.shape[-2] != size:
        raise ValueError(
            f"`x` has shape {x.shape}, but a {type(linear).__name__} takes one vector "
            f"at a time, here of shape ({size},). For a batch use `jax.vmap`."
        )

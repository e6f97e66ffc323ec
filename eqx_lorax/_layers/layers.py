"""The layers that stand in the place of adapted ones.

Each keeps the module it stands for inside, with nothing changed but its weight, and
passes for it: attributes and `isinstance` answer as that module does.
"""

import dataclasses
import operator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, Key, PRNGKeyArray, UInt32

from .._factored import channels_first, convolve
from .._methods import AbstractLoraWeight, is_one_key, matmul
from .._shared import is_array
from .forwarding import NORMS, run_module
from .geometry import conv_geometry
from .layer import AbstractLoraLayer, has_active_dropout


# One key, or one for each layer of a stack.
Keys: TypeAlias = Key[Array, "*layers"] | UInt32[Array, "*layers words"]


class LoraLinear(AbstractLoraLayer):
    """An `equinox.nn.Linear` with a factored weight."""

    wrapped: eqx.nn.Linear
    dropout: eqx.nn.Dropout | None = None
    key: Keys | None = None

    adapts = (eqx.nn.Linear,)
    by_default = True
    has_dropout = True
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
        _check_unstacked(linear, linear.weight, 2)
        with jax.named_scope("lorax.LoraLinear"):
            x = jnp.asarray(x)
            if linear.in_features == "scalar":
                if x.shape != ():
                    raise ValueError(f"`x` must have shape (), not {x.shape}.")
                x = x[None]
            _check_single(linear, x)
            low_rank_x = _dropped(self, x, key)
            y = matmul(linear.weight, x, low_rank_x=low_rank_x)
            y = _add_bias(y, jnp.result_type(x, linear.weight.dtype), linear.bias)
            return y.reshape(()) if linear.out_features == "scalar" else y


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
        _check_unstacked(conv, conv.weight, conv.num_spatial_dims + 2)
        if x.ndim != conv.num_spatial_dims + 1:
            raise ValueError(
                f"`x` must have {conv.num_spatial_dims + 1} axes, (in_channels, "
                f"*spatial), but has shape {x.shape}. For a batch use `jax.vmap`."
            )
        with jax.named_scope("lorax.LoraConv"):
            dtype = jnp.result_type(x, conv.weight.dtype)
            x = x.astype(dtype)
            pad, geometry = conv_geometry(conv, x.shape[1:])
            low_rank_x = _dropped(self, x, key)
            y = convolve(
                conv.weight,
                pad(x)[None],
                low_rank_x=None if low_rank_x is None else pad(low_rank_x)[None],
                dimension_numbers=channels_first(x.ndim + 1),
                feature_group_count=conv.groups,
                **geometry,
            )
            return _add_bias(y[0], dtype, conv.bias)


class LoraEmbedding(AbstractLoraLayer):
    """An `equinox.nn.Embedding` with a factored table."""

    wrapped: eqx.nn.Embedding

    adapts = (eqx.nn.Embedding,)
    by_default = False
    has_dropout = False
    is_lookup = True

    def __call__(
        self, x: Int[ArrayLike, ""], *, key: PRNGKeyArray | None = None
    ) -> Array:
        """**Arguments:**

        - `x`: The index, an integer of shape `()`. Use `jax.vmap` for several.
        - `key`: Ignored.

        **Returns:**

        An array of shape `(embedding_size,)` and of the dtype of the table.

        **Raises:**

        `ValueError` if the layer is a stack of layers, or if `x` is not a scalar.
        """
        embedding = self.wrapped
        if isinstance(embedding.weight, AbstractLoraWeight):
            _check_unstacked(embedding, embedding.weight, 2)
        # The table knows how to be indexed, which is all that its layer does.
        with jax.named_scope("lorax.LoraEmbedding"):
            return embedding(x, key=key)


class LoraModule(AbstractLoraLayer):
    """Any other module with factored weights in the place of some of its arrays.

    It runs the module's own code through `lorax.lora`: calls, other methods, properties
    and operators such as `len`, `[]` and `@`. Whatever that does with the arrays, they
    stay factored where they can, and are materialised with a
    `lorax.MaterialiseWarning` where not. The reparameterisations
    `equinox.nn.WeightNorm` and `equinox.nn.SpectralNorm` take the norm of their weight
    and so always form it.
    """

    wrapped: eqx.Module

    adapts = ()
    by_default = False
    has_dropout = False
    is_lookup = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself: same arguments, same result."""
        with jax.named_scope("lorax.LoraModule"):
            return run_module(self, operator.call, *args, **kwargs)


_STANDARD = (LoraLinear, LoraConv, LoraEmbedding)


def find_layer(module: Any) -> type[AbstractLoraLayer]:
    """The layer that stands for `module`: the one for its kind if it computes as all
    of that kind do, and else the one that runs any module's own code."""
    kind, layer = _kind_of(module)
    is_plain = kind is not None and _computes_as(module, kind, layer)
    return layer if is_plain else LoraModule


def is_known_layer(module: Any) -> bool:
    """Whether `module` is a layer of a kind that can be adapted by its name alone."""
    return _kind_of(module)[0] is not None or type(module) in NORMS


def is_adapted_by_default(module: Any) -> bool:
    """Whether `module` is adapted where only what is around it is named."""
    return _kind_of(module)[1].by_default


def is_field_of_kind(module: Any, field: str) -> bool:
    """Whether `module` has its field `field` as all of its kind have it, rather than as
    the subclass that it is an instance of."""
    kind, _ = _kind_of(module)
    return kind is not None and field in _names_in(kind)


def _kind_of(module: Any) -> tuple[type | None, type[AbstractLoraLayer]]:
    for layer in _STANDARD:
        for kind in layer.adapts:
            if issubclass(type(module), kind):
                return kind, layer
    return None, LoraModule


def _computes_as(module: Any, kind: type, layer: type[AbstractLoraLayer]) -> bool:
    """Whether `module` inherits all that the code of `kind` is and reads, and has no
    attribute that the layer would hide."""
    ancestors = type(module).__mro__
    overridden = {
        name
        for ancestor in ancestors[: ancestors.index(kind)]
        for name, value in vars(ancestor).items()
        if hasattr(value, "__get__")
    }
    hidden = {field.name for field in dataclasses.fields(layer)} - {"wrapped"}
    is_hidden = any(hasattr(module, name) for name in hidden)
    return not is_hidden and overridden.isdisjoint({"__call__", *_names_in(kind)})


def _names_in(kind: type) -> set[str]:
    own = {name for name in vars(kind) if not name.startswith("__")}
    return own | {field.name for field in dataclasses.fields(kind)}


def kernel_axes(module: Any, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The row and the column axes, counted from the end, of a weight of `module`.
    `num_spatial_dims` marks a convolution; elsewhere the last two axes are the
    matrix."""
    spatial = getattr(module, "num_spatial_dims", 0)
    if not isinstance(spatial, int) or ndim < spatial + 2:
        spatial = 0
    return (-spatial - 2,), tuple(range(-spatial - 1, 0))


def _check_unstacked(module: Any, weight: AbstractLoraWeight, ndim: int) -> None:
    if weight.ndim != ndim:
        raise ValueError(
            f"This {type(module).__name__} is a stack of layers: its `weight` has "
            f"shape {weight.shape}, {ndim} axes of which belong to one layer. Call it "
            "below `eqx.filter_vmap` or `jax.lax.scan` over the leading axes."
        )


def _check_single(linear: eqx.nn.Linear, x: Array) -> None:
    size = linear.weight.shape[-1]
    if x.ndim > 1 and x.shape[-2] != size:
        raise ValueError(
            f"`x` has shape {x.shape}, but a {type(linear).__name__} takes one vector "
            f"at a time, here of shape ({size},). For a batch use `jax.vmap`."
        )


def _dropped(
    layer: LoraLinear | LoraConv, x: Array, key: PRNGKeyArray | None
) -> Array | None:
    """The input of the low-rank branch where it is not that of the base."""
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


def _add_bias(y: Array, dtype: jnp.dtype, bias: Array | None) -> Array:
    """`y` plus `bias`, rounded once, to the dtype that a plain layer returns if its
    product without the bias is of `dtype`."""
    if bias is None:
        return y.astype(dtype)
    return (y + bias.astype(y.dtype)).astype(jnp.result_type(dtype, bias.dtype))

"""Keys for dropout inside the model, for modules that pass no keys to their layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

from .._layers import (
    find_axes,
    has_active_dropout,
    is_layer,
    list_adapted_names,
    replace_fields,
)
from .._methods import base_of, check_key, is_weight, key_for_words, words_of
from .._trees import join_path, Places, rebuild


_Model = TypeVar("_Model")


def dropout_key(model: _Model, key: PRNGKeyArray | None) -> _Model:
    """Gives every adapted layer with active dropout a key of its own.

    The layers can then be called without keys. This is for models that pass none to
    their layers, such as `equinox.nn.MLP` and `equinox.nn.MultiheadAttention`. A key
    that is passed in a call takes precedence. Call this function once in each step, and
    inside `jax.vmap` once for each example:

    !!! example

        ```python
        def loss(model, xs, key):
            def predict(x, key):
                return lorax.dropout_key(model, key)(x)

            ys = jax.vmap(predict)(xs, jax.random.split(key, len(xs)))
            ...
        ```

    The keys are not part of the adapter: they are not trained, not saved with it and
    not in `params`, and `lorax.unloraify` removes them.

    **Arguments:**

    - `model`: A model with adapters, or the `frozen` part of one.
    - `key`: A `jax.random.key`, which may be traced. The key of a layer depends on it
        and on the layer's path alone. A stack of layers gets one key for each layer,
        along its leading axes, so that `jax.lax.scan` and `jax.vmap` can slice them.
        `None` removes the keys. Do so before `equinox.tree_serialise_leaves`, which can
        write raw keys (`jax.random.PRNGKey`) only.

    **Returns:**

    The model with keys. `model` itself is not changed. Where no dropout is active it is
    returned as it is, so that the same code works for
    `equinox.nn.inference_mode(model)`.

    **Raises:**

    `ValueError` if the model has no adapters or no base. `TypeError` or `ValueError` if
    `key` is not a single key.
    """
    places = Places(model)
    _check_model(places)
    layers = [place for place in places.all if is_layer(place.node)]
    if key is None:
        layers = [place for place in layers if place.node.has_dropout]
        keys = [None] * len(layers)
    else:
        check_key(key)
        layers = [place for place in layers if has_active_dropout(place.node)]
        words = [words_of(join_path(place.path)) for place in layers]
        shapes = [_stack_shape(place.node) for place in layers]
        keys = _derive_keys(key, words, shapes) if layers else []
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: lambda layer, key=key: replace_fields(layer, key=key)
        for place, key in zip(layers, keys, strict=True)
    }
    return rebuild(model, edits)


def remove_keys(model: _Model) -> _Model:
    """`model`, or any other pytree, without keys for dropout."""
    layers = [place for place in Places(model).all if is_layer(place.node)]
    keyed = [x for x in layers if x.node.has_dropout and x.node.key is not None]
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: lambda layer: replace_fields(layer, key=None) for place in keyed
    }
    return rebuild(model, edits)


def _stack_shape(layer: Any) -> tuple[int, ...]:
    """The sizes of the leading axes of a stack of layers; `()` for a single layer."""
    module = layer.wrapped
    names = list_adapted_names(module)
    name = next(x for x in names if getattr(module, x, None) is not None)
    shape = getattr(module, name).shape
    own = sum(map(len, find_axes(module, name, len(shape))))
    return tuple(shape[: len(shape) - own])


def _derive_keys(
    key: PRNGKeyArray,
    words: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, ...]],
) -> list[Array]:
    # One program for all: to compile a `fold_in` for each takes long.
    return _derive(key, jax.device_put(np.array(words, np.uint32)), tuple(shapes))


@functools.partial(jax.jit, static_argnums=2)
def _derive(
    key: PRNGKeyArray,
    words: UInt32[Array, "layers 2"],
    shapes: tuple[tuple[int, ...], ...],
) -> list[Array]:
    keys = jax.vmap(key_for_words, in_axes=(None, 0))(key, words)
    each = [keys[i] for i in range(len(shapes))]
    return [jr.split(x, shape) if shape else x for x, shape in zip(each, shapes)]


def _check_model(places: Places) -> None:
    bases = [base_of(place.node) for place in places.all if is_weight(place.node)]
    if not bases:
        raise ValueError(
            "`model` has no adapters, so there is nothing to drop. Call "
            "`lorax.loraify(model, dropout=...)` first."
        )
    if any(base is None for base in bases):
        raise ValueError(
            "`model` has no base: it is the `params` of `lorax.partition`, which hold "
            "no keys. Pass the whole model, `lorax.combine(params, frozen)`, or "
            "`frozen`."
        )

"""Training: frozen means not in the tree that is differentiated."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from ._arrays import is_inexact
from ._select import available, Filter, named_places
from ._tree import Place, Places, rebuild
from ._weight import is_weight


_Model = TypeVar("_Model")


def trainable(model: PyTree, also: Filter = None) -> PyTree[bool]:
    """Which leaves of a model are trained: a filter spec for `equinox.partition`.

    **Arguments:**

    - `model`: A model with adapters, or any model if `also` is given.
    - `also`: What is trained besides the factors: a new head, norms, biases. A filter
        as of `lorax.loraify`, of which every inexact array at or beneath the named
        places is meant. Base weights that have an adapter stay frozen all the same.

    **Returns:**

    A pytree of the structure of `model` with a bool at each leaf.

    **Raises:**

    `ValueError` if nothing would be trained, or if any part of `also` names no array
    that could be.
    """
    spec = adapter_spec(model)
    if also is None:
        if not any(jax.tree.leaves(spec)):
            raise ValueError(
                "`model` has no adapters, so nothing would be trained. Call "
                "`lorax.loraify` first, or name what to train with `also`."
            )
        return spec
    also_trained = trained_places(model, Places(model), also)
    return rebuild(spec, {place.steps: lambda _: True for place in also_trained})


def partition(model: _Model, also: Filter = None) -> tuple[_Model, _Model]:
    """Splits a model into what is trained and what is frozen.

    `params` *is* the adapter: make the optimizer state from it, save it, or combine
    another one with the same `frozen`. `lorax.combine(params, frozen)` is the model.

    **Arguments:**

    - `model`, `also`: As of `lorax.trainable`.

    **Returns:**

    `(params, frozen)`, both of the structure of `model`, with `None` for the leaves of
    the other.

    **Raises:**

    As `lorax.trainable`.
    """
    return eqx.partition(model, trainable(model, also))


def filter_value_and_grad(
    fun: Callable[..., Any] | None = None,
    *,
    also: Filter = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """As `equinox.filter_value_and_grad`, but differentiates only what is trained in
    the first argument of `fun`: the base weights take no part.

    **Arguments:**

    - `fun`: A function whose first argument is a model with adapters and which returns
        a scalar, or a scalar and something else if `has_aux`.
    - `also`: As of `lorax.trainable`.
    - `has_aux`: Whether `fun` returns a pair.

    **Returns:**

    A function with the arguments of `fun` that returns the value of `fun` and a
    gradient of the structure of `params` in `lorax.partition(model, also)`.

    **Raises:**

    As `lorax.trainable`, when it is called.
    """
    if fun is None:
        return functools.partial(filter_value_and_grad, also=also, has_aux=has_aux)
    function = fun

    @functools.wraps(function)
    def value_and_grad(model: Any, *args: Any, **kwargs: Any) -> Any:
        params, frozen = partition(model, also)

        def of_params(params: Any, *args: Any, **kwargs: Any) -> Any:
            return function(eqx.combine(params, frozen), *args, **kwargs)

        transformed = eqx.filter_value_and_grad(of_params, has_aux=has_aux)
        return transformed(params, *args, **kwargs)

    return value_and_grad


def filter_grad(
    fun: Callable[..., Any] | None = None,
    *,
    also: Filter = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """As `lorax.filter_value_and_grad`, but returns the gradient alone, or the gradient
    and the second result if `has_aux`: the signature of `equinox.filter_grad`."""
    if fun is None:
        return functools.partial(filter_grad, also=also, has_aux=has_aux)
    value_and_grad = filter_value_and_grad(fun, also=also, has_aux=has_aux)

    @functools.wraps(fun)
    def grad(model: Any, *args: Any, **kwargs: Any) -> Any:
        value, gradient = value_and_grad(model, *args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return grad


def adapter_spec(model: PyTree) -> PyTree[bool]:
    """`trainable(model)`, but all `False` where there is no adapter."""
    return jax.tree.map(
        lambda node: node.trainable() if is_weight(node) else False,
        model,
        is_leaf=is_weight,
    )


def trained_places(model: PyTree, places: Places, also: Filter) -> list[Place]:
    """The arrays that `also` names, each once."""
    if also is None:
        return []
    found: dict[Place, None] = {}
    for named in named_places(model, places, also, "also"):
        arrays = [
            array
            for place in named.places
            for array in places.beneath(place)
            if is_inexact(array.node)
        ]
        if not arrays:
            raise ValueError(
                f"{named.label} names no array that could be trained: there are only "
                "adapters, which are trained anyway, their frozen bases, or none. "
                f"Available: {available(places.all)}."
            )
        found.update(dict.fromkeys(arrays))
    return list(found)

"""What of a model is trained, and gradients of that alone: frozen arrays are not in the
tree that is differentiated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload, ParamSpec, TypeVar

import equinox as eqx
import jax

from .._layers import is_layer
from .._methods import check_whole, is_packed, is_weight
from .._modules import without_gates
from .._shared import is_inexact, list_some, PyTree
from .._trees import (
    exclude_places,
    Filter,
    FilterMatch,
    list_available,
    match_filter,
    Place,
    Places,
    rebuild,
)


_Model = TypeVar("_Model")
_Parameters = ParamSpec("_Parameters")
_Value = TypeVar("_Value")


def trainable(
    model: PyTree, also: Filter = None, *, exclude: Filter = None
) -> PyTree[bool]:
    """Which leaves of a model are trained: a filter spec for `equinox.partition`.

    !!! example

        ```python
        params, frozen = eqx.partition(model, lorax.trainable(model, also="head"))
        ```

    **Arguments:**

    - `model`: A model with adapters, or its `params`; or any model if `also` is given.
    - `also`: What is trained besides the factors: a new head, norms, biases. This is a
        filter, see `lorax.loraify`, and means every inexact array at or beneath the
        places that it names. Base weights that have an adapter stay frozen all the
        same. To train such a layer whole, leave it out of the adapters, by `exclude` of
        `lorax.loraify`.
    - `exclude`: What stays frozen after all. This is a filter too, and means the
        factors of every adapter, and every array that `also` names, at or beneath the
        places that it names.

    **Returns:**

    A pytree of the structure of `model` with a bool at each leaf.

    **Raises:**

    `ValueError` if nothing would be trained, if any part of `also` names an adapted
    layer, a quantised array or no array that could be trained, or if any part of
    `exclude` excludes nothing.
    """
    check_whole(model, "lorax.partition({})", or_params=True)
    spec = mark_factors(model)
    if also is None and not any(jax.tree.leaves(spec)):
        raise ValueError(
            "`model` has no adapters, so nothing would be trained. Call "
            "`lorax.loraify` first, or name what to train with `also`."
        )
    if also is None and exclude is None:
        return spec
    places = Places(model)
    also_trained = find_trained_places(model, places, also)
    quantised = _find_quantised(model, places, also)
    adapters = [place for place in places.all if is_weight(place.node)]
    chosen = [*adapters, *also_trained, *quantised]
    left = set(exclude_places(model, places, exclude, chosen, set(chosen).__contains__))
    if stuck := [place.dotted for place in quantised if place in left]:
        raise ValueError(_explain_quantised(stuck))
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: lambda _: True for place in also_trained if place in left
    }
    for place in adapters:
        if place not in left:
            edits[place.indices] = lambda flags: jax.tree.map(lambda _: False, flags)
    return rebuild(spec, edits)


def partition(
    model: _Model, also: Filter = None, *, exclude: Filter = None
) -> tuple[_Model, _Model]:
    """Splits a model into a trained and a frozen part.

    `params` *is* the adapter: make the optimizer state from it, save it, or combine
    another one with the same `frozen`. `lorax.combine(params, frozen)` is the model.
    A mixture out of a `lorax.AdapterBank` is first multiplied into its factors, so that
    `params` contain all of it.

    !!! example

        ```python
        params, frozen = lorax.partition(model, also="head")
        state = optimizer.init(params)
        ```

    **Arguments:**

    - `model`, `also`, `exclude`: See `lorax.trainable`.

    **Returns:**

    `(params, frozen)`, both of the structure of `model`, with `None` for the leaves of
    the other.

    **Raises:**

    `ValueError` if `lorax.trainable` raises it, or if a weight was multiplied with an
    array, which is neither in the base nor in the factors.
    """
    model = without_gates(model)
    return eqx.partition(model, trainable(model, also, exclude=exclude))


@overload
def filter_value_and_grad(
    fun: Callable[_Parameters, _Value],
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[_Parameters, tuple[_Value, Any]]: ...


@overload
def filter_value_and_grad(
    fun: None = None,
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[
    [Callable[_Parameters, _Value]], Callable[_Parameters, tuple[_Value, Any]]
]: ...


def filter_value_and_grad(
    fun: Callable[..., Any] | None = None,
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """`equinox.filter_value_and_grad` for the trained part of the first argument of
    `fun`: base weights are not differentiated.

    !!! example

        ```python
        @lorax.filter_value_and_grad
        def loss(model, x, y):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        value, grads = loss(model, x, y)
        updates, state = optimizer.update(grads, state, params)
        ```

    **Arguments:**

    - `fun`: A function whose first argument is a model with adapters and which returns
        a scalar, or a scalar and something else if `has_aux`.
    - `also`, `exclude`: See `lorax.trainable`.
    - `has_aux`: Whether `fun` returns a pair.

    **Returns:**

    A function with the arguments of `fun` that returns the value of `fun` and a
    gradient of the structure of `params` in `lorax.partition` with the same `also` and
    `exclude`.

    **Raises:**

    `ValueError`, when it is called, if `lorax.trainable` raises it.
    """
    if fun is None:
        return functools.partial(
            filter_value_and_grad, also=also, exclude=exclude, has_aux=has_aux
        )
    function = fun

    @functools.wraps(function)
    def value_and_grad(model: Any, *args: Any, **kwargs: Any) -> Any:
        params, frozen = partition(model, also, exclude=exclude)

        def of_params(params: Any, *args: Any, **kwargs: Any) -> Any:
            return function(eqx.combine(params, frozen), *args, **kwargs)

        transformed = eqx.filter_value_and_grad(of_params, has_aux=has_aux)
        return transformed(params, *args, **kwargs)

    return value_and_grad


@overload
def filter_grad(
    fun: Callable[_Parameters, Any],
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[_Parameters, Any]: ...


@overload
def filter_grad(
    fun: None = None,
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[[Callable[_Parameters, Any]], Callable[_Parameters, Any]]: ...


def filter_grad(
    fun: Callable[..., Any] | None = None,
    *,
    also: Filter = None,
    exclude: Filter = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """`lorax.filter_value_and_grad` without the value. It returns the gradient, or the
    gradient and the second result if `has_aux`, like `equinox.filter_grad`.

    !!! example

        ```python
        @lorax.filter_grad
        def grads(model, x, y):
            return jnp.mean((jax.vmap(model)(x) - y) ** 2)

        updates, state = optimizer.update(grads(model, x, y), state, params)
        ```
    """
    if fun is None:
        return functools.partial(
            filter_grad, also=also, exclude=exclude, has_aux=has_aux
        )
    value_and_grad = filter_value_and_grad(
        fun, also=also, exclude=exclude, has_aux=has_aux
    )

    @functools.wraps(fun)
    def grad(model: Any, *args: Any, **kwargs: Any) -> Any:
        value, gradient = value_and_grad(model, *args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return grad


def mark_factors(model: PyTree) -> PyTree[bool]:
    """`trainable(model)`, which may be `False` everywhere: the factors are trained."""
    return jax.tree.map(
        lambda node: node.trainable() if is_weight(node) else False,
        model,
        is_leaf=is_weight,
    )


def find_trained_places(model: PyTree, places: Places, also: Filter) -> list[Place]:
    """The arrays that `also` names, each once.

    **Raises:**

    `ValueError` if any part of `also` names none, or an adapted layer itself, of which
    only the bias would be trained.
    """
    if also is None:
        return []
    found: dict[Place, None] = {}
    for named in match_filter(model, places, also, "also", _could_be_trained):
        _check_not_adapted(named, places)
        arrays = [x for x in named.find_covered(places) if _could_be_trained(x)]
        if not arrays:
            if stuck := list(filter(_is_quantised, named.find_covered(places))):
                raise ValueError(_explain_quantised([x.dotted for x in stuck]))
            raise ValueError(
                f"{named.label} names no array that could be trained: there are only "
                "adapters, which are trained anyway, their frozen bases, or none. "
                f"Available: {list_available(places, _could_be_trained)}."
            )
        found.update(dict.fromkeys(arrays))
    return list(found)


def _find_quantised(model: PyTree, places: Places, also: Filter) -> list[Place]:
    """The quantised arrays that `also` names, each once."""
    if also is None or not any(map(_is_quantised, places.all)):
        return []
    matches = match_filter(model, places, also, "also", _could_be_trained)
    covered = (x for match in matches for x in match.find_covered(places))
    return list(dict.fromkeys(filter(_is_quantised, covered)))


def _is_quantised(place: Place) -> bool:
    return is_packed(place.node)


def _explain_quantised(dotted: Sequence[str]) -> str:
    return (
        f"`also` names {list_some(dotted)}, which is quantised and so has no "
        "derivative. To train it leave it out of `lorax.quantise`, by `exclude`. To "
        "train only what is beside it, name that, or name this one in `exclude`."
    )


def _could_be_trained(place: Place) -> bool:
    return is_inexact(place.node)


def _check_not_adapted(named: FilterMatch, places: Places) -> None:
    for place in named.places:
        if not is_layer(place.node):
            continue
        arrays = [x for x in places.beneath(place) if x.is_array]
        if any(array.owner is not place for array in arrays):
            continue  # a container, some of whose own arrays are adapted
        rest = [x.dotted for x in arrays if _could_be_trained(x)]
        hint = f" To train only what else is in it, name {rest!r}." if rest else ""
        raise ValueError(
            f"{named.label} names {place.dotted}, which has an adapter, so that its "
            "base stays frozen. To train it whole leave it out of the adapters: "
            f"`lorax.loraify(..., exclude={place.dotted!r})`.{hint}"
        )

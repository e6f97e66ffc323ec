"""Putting an adapter, the `params` of `lorax.partition`, into any model of its base."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax

from .._layers import is_layer, replace_fields
from .._methods import (
    base_of,
    find_misfits,
    is_missing,
    is_weight,
    list_missing,
    unfuse,
)
from .._shared import is_array, list_some
from .._trees import Place, Places, rebuild


_Model = TypeVar("_Model")
_Path = tuple[str, ...]


def attach(model: _Model, params: Any) -> _Model:
    """Puts an adapter into a model, and takes out those that are there.

    The adapter may have been made with other settings and for other targets than those
    of `model`: rank, alpha, dtype and targets of the result are its own, and so is
    whatever else was trained, such as a head. The result computes what
    `lorax.combine(params, frozen)` does with the frozen part that `params` came with.

    !!! example

        ```python
        params, _ = lorax.partition(lorax.load_adapter("ada.safetensors", model))
        of_ada = lorax.attach(model, params)
        ```

    **Arguments:**

    - `model`: The model that the adapter was made for: plain, or with any adapters,
        which are dropped. Its head, if it has trained one, stays unless `params` has
        one. Also an abstract model, and inside `jax.jit`.
    - `params`: The first result of `lorax.partition`, or what `lorax.weighted_sum`,
        `lorax.scale`, or a `lorax.AdapterBank` made of several.

    **Returns:**

    The model, with base arrays that are the very ones of `model`, and the others those
    of `params`. `model` itself is not changed. Dropout is no part of `params`: there is
    that of `model` in the layers that have any in both. Frozen arrays of a method
    beside the base, such as `a` of LoRA-FA, are those of `model`: whether `params` came
    with the same ones cannot be seen, so it has to be a model of the same adapter.

    **Raises:**

    `ValueError` with all that does not fit: arrays that `model` does not have, or has
    with another shape; or if `params` is no adapter.
    """
    new = Places(params).all
    _check_params(params, new)
    places = Places(model).all
    _check_model(places)
    arrays = {place.path: place for place in places if place.is_array}
    nodes = {place.path: place for place in places if not place.is_array}
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: _without_adapter for place in places if _has_adapter(place.node)
    }
    problems: list[str] = []
    for place in new:
        if not place.is_array and not is_layer(place.node):
            continue
        target = (arrays if place.is_array else nodes).get(place.path)
        if target is None:
            if place.is_array:
                problems.append(f"{place.dotted}: there is no such array in `model`")
            continue
        made, wrong = _make_edit(target, place.node)
        problems += [f"{place.dotted}: {line}" for line in wrong]
        edits[target.indices] = made
    if problems:
        listed = list_some(problems, 12, separator="\n  ")
        raise ValueError(
            f"`params` does not fit `model`:\n  {listed}\n{_hint(model, new, arrays)}"
        )
    return rebuild(model, edits)


def _check_model(places: list[Place]) -> None:
    if any(base_of(place.node) is None for place in _weights(places)):
        raise ValueError(
            "`model` is an adapter without its base, the `params` of "
            "`lorax.partition`. Call `lorax.attach(model, params)` with the model to "
            "put it into."
        )


def _check_params(params: Any, places: list[Place]) -> None:
    arrays = [place.node for place in places if place.is_array]
    weights = [node for node in arrays if is_weight(node)]
    if not arrays:
        raise ValueError(
            f"`params` is a {type(params).__name__} without any array, which is no "
            "adapter. Pass the first result of `lorax.partition`."
        )
    if not any(base_of(weight) is not None for weight in weights):
        return
    if any(not is_missing(weight.w) and list_missing(weight) for weight in weights):
        raise ValueError(
            "`params` is a base without its adapters, the `frozen` of "
            "`lorax.partition`. Call `lorax.attach(model, params)` with the first "
            "result of that."
        )
    raise ValueError(
        "`params` is a whole model with its frozen base. Call "
        "`lorax.attach(model, lorax.partition(params)[0])`."
    )


def _has_adapter(node: Any) -> bool:
    return is_layer(node) or is_weight(node)


def _without_adapter(node: Any) -> Any:
    return node.wrapped if is_layer(node) else base_of(node)


def _make_edit(place: Place, new: Any) -> tuple[Callable[[Any], Any], list[str]]:
    """An edit of the node at `place` that puts `new` there, and its problems."""
    if is_layer(new):
        types = [type(module) for module in (place.module, new.wrapped)]
        if types[0] is not types[1]:
            names = [cls.__name__ for cls in types]
            return _keep, [f"a {names[0]} in `model`, a {names[1]} in `params`"]
        return lambda node: _layer(node, new), []
    if is_weight(new):
        weight, wrong = _weight(place.node, new)
        return lambda _: weight, wrong
    found, wanted = tuple(place.node.shape), tuple(new.shape)
    wrong = [f"{found} in `model`, {wanted} in `params`"] if found != wanted else []
    return lambda _: new, wrong


def _keep(node: Any) -> Any:
    return node


def _layer(node: Any, new: Any) -> Any:
    """The layer `new`, around the module in a model."""
    is_adapted = is_layer(node)
    changes = {"wrapped": node.wrapped if is_adapted else node}
    # The rate of dropout is not trained, and so not in `params`. A layer of dropout
    # stays, so that the structure is the same.
    if new.has_dropout and new.dropout is not None and new.dropout.p is None:
        changes["dropout"] = eqx.nn.Dropout(0.0, inference=True)
        if is_adapted and node.has_dropout and node.dropout is not None:
            changes |= {"dropout": node.dropout, "key": node.key}
    return replace_fields(new, **changes)


def _weight(node: Any, new: Any) -> tuple[Any, list[str]]:
    """The weight `new` on the base that `node` has, and the problems with it."""
    mine, theirs = _list_levels(node), _list_levels(new)
    beneath = len(theirs) - 1
    if len(mine) < beneath:
        return new, [
            f"an adapter on top of {beneath} others in `params`, of which `model` has "
            f"{len(mine)}"
        ]
    of_model = len(mine) - beneath
    base = mine[of_model] if of_model < len(mine) else base_of(node)
    weight = new.with_base(base)
    # The frozen arrays of a method are not in `params`.
    there = mine[of_model - 1] if of_model else None
    if type(unfuse(there)) is type(unfuse(weight)):
        names = [x for x in list_missing(weight) if getattr(there, x) is not None]
        weight = weight.with_base(
            base, **{name: getattr(there, name) for name in names}
        )
    wrong = list(find_misfits(weight))
    lacking = [] if wrong else list_missing(weight)
    if lacking:
        listed = ", ".join(f"`{name}`" for name in lacking)
        wrong = [
            f"{listed} of a {type(new).__name__} are frozen, so not in `params`, and "
            "`model` has none either"
        ]
    return weight, wrong


def _list_levels(node: Any) -> list[Any]:
    """The nested adapters, the outermost first."""
    return [node, *_list_levels(node.w)] if is_weight(node) else []


def _hint(model: Any, new: list[Place], arrays: dict[_Path, Place]) -> str:
    if any(list_missing(place.node) for place in _weights(arrays.values())):
        return (
            "`model` is the `frozen` of `lorax.partition`. If they belong together, "
            "call `lorax.combine(params, frozen)`."
        )
    for place in _weights(new):
        array, there = place.node, arrays.get(place.path)
        if there is not None and _has_one_more(array, base_of(there.node)):
            return (
                "There is an axis more in front, as `lorax.stack` makes. Attach one "
                "of them, `jax.tree.map(lambda x: x[index], params)`."
            )
    return "Pass the model that the adapter was made for."


def _has_one_more(weight: Any, base: Any) -> bool:
    def first(x: Any) -> Any:
        is_there = is_array(x) and x.ndim
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if is_there else x

    return not list(find_misfits(jax.tree.map(first, weight).with_base(base)))


def _weights(places: Any) -> Iterator[Place]:
    return (place for place in places if is_weight(place.node))

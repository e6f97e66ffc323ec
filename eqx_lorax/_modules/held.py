"""Weights that code has put into a model, in the form that files and partitions need.

Such a weight may be a view, which shows the axes of its base in another order, or a
mixture from an `AdapterBank`, which has a gate on its rank. No argument of `LoraWeight`
gives either. The functions here bring them back to base and factors.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array

from .._factored import products, views
from .._methods import is_weight, LoraWeight
from .._shared import axes_from_end
from .._trees import Place, Places, rebuild


_Model = TypeVar("_Model")


def without_views(model: _Model, *, allow_scaled: bool = False) -> _Model:
    """`model` with weights that the arguments of their classes can give: a gate is
    multiplied into a factor, and a base is stored in the order in which it is shown.

    **Raises:**

    `ValueError` if a weight is scaled, for which there is no such form, unless that is
    allowed.
    """
    if not any(_is_view(x) for x in _weights(model)):
        return model
    places = [place for place in Places(model).all if is_weight(place.node)]
    if not allow_scaled:
        _check_unscaled(places)
    views = [place for place in places if _is_view(place.node)]
    return rebuild(model, {place.indices: _stored for place in views})


def without_gates(model: _Model) -> _Model:
    """`model` with the gates of its weights multiplied into factors. Gates are not
    trained, and factors are. The order of bases is kept.

    **Raises:**

    `ValueError` if a weight is scaled.
    """
    weights = [x for x in _weights(model) if isinstance(x, LoraWeight)]
    if all(x.gate is None and x.gain is None for x in weights):
        return model
    places = [place for place in Places(model).all if is_weight(place.node)]
    _check_unscaled(places)
    return rebuild(model, {place.indices: _without_gate for place in places})


def strip_adapters(weight: Any) -> Array:
    """The base of a weight of `without_views`, with its gain."""
    if not is_weight(weight):
        return weight
    base = strip_adapters(weight.w)
    if not isinstance(weight, LoraWeight) or weight.gain is None:
        return base
    stored = axes_from_end(base.ndim)
    scaled = products.scaled(views.dense(base), stored, weight.gain, stored)
    return scaled.astype(base.dtype)


def _weights(model: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(model, is_leaf=is_weight) if is_weight(x)]


def _is_view(weight: Any) -> bool:
    if not is_weight(weight):
        return False
    is_lora = isinstance(weight, LoraWeight)
    parts = (weight.order, weight.gain, weight.gate) if is_lora else ()
    return any(part is not None for part in parts) or _is_view(weight.w)


def _check_unscaled(places: Sequence[Place]) -> None:
    for place in places:
        weight = place.node
        while is_weight(weight):
            if isinstance(weight, LoraWeight) and weight.gain is not None:
                raise ValueError(
                    f"{place.dotted} is scaled by a `gain`, which belongs neither to "
                    "its base nor to its factors and would be lost. Scale the array "
                    "before it is adapted, or merge it: `lorax.unloraify(model)`."
                )
            weight = weight.w


def _stored(weight: Any) -> Any:
    # A part of a partition has the base without factors, or the factors without it.
    if not is_weight(weight) or weight.w is None:
        return weight
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(weight)):
        return eqx.filter_eval_shape(_on_stored_base, weight)
    return _on_stored_base(weight)


def _on_stored_base(weight: Any) -> Any:
    if isinstance(weight, LoraWeight):
        weight = _without_gate(weight)
        is_moved = weight.shown_axes() != tuple(axes_from_end(weight.w.ndim))
        weight = views.in_order(weight) if is_moved else weight.replace(order=None)
    base = weight.w
    if not is_weight(base):
        return weight
    return eqx.tree_at(
        lambda x: x.w, weight, _stored(base), is_leaf=lambda x: x is base
    )


def _without_gate(weight: Any) -> Any:
    if not isinstance(weight, LoraWeight) or weight.gate is None or weight.b is None:
        return weight
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(weight)):
        return eqx.filter_eval_shape(weight.as_lora)
    return weight.as_lora()

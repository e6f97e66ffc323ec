"""Weights that code has put into a model, in the form that files and partitions need.

Such a weight may be a view, which shows the axes of its base in another order, a
mixture from an `AdapterBank`, which has a gate on its rank, or a weight under
`merged_forward`. The functions here bring them back to weights of their methods.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx

from .._factored import dense, scale_along, views
from .._methods import (
    FactoredWeight,
    FusedWeight,
    is_missing,
    is_weight,
    list_weights,
    LoraWeight,
    unfuse,
)
from .._shared import axes_from_end, is_abstract
from .._trees import Place, Places, rebuild


_Model = TypeVar("_Model")


def without_views(model: _Model, *, allow_scaled: bool = False) -> _Model:
    """`model` with weights that the arguments of their classes can give: a gate is
    multiplied into a factor, and a base is stored in the order in which it is shown.

    **Raises:**

    `ValueError` if a weight is scaled, for which there is no such form, unless that is
    allowed.
    """
    if not any(_is_view(x) for x in list_weights(model)):
        return model
    places = [place for place in Places(model).all if is_weight(place.node)]
    if not allow_scaled:
        _check_unscaled(places)
    held = [place for place in places if _is_view(place.node)]
    return rebuild(model, {place.indices: _without_view for place in held})


def without_gates(model: _Model) -> _Model:
    """`model` with the gates of its weights multiplied into factors. Gates are not
    trained, and factors are. The order of bases is kept.

    **Raises:**

    `ValueError` if a weight is scaled.
    """
    if not any(has_gate(x) for x in list_weights(model)):
        return model
    places = [place for place in Places(model).all if is_weight(place.node)]
    _check_unscaled(places)
    return rebuild(model, {place.indices: _without_gate for place in places})


def strip_adapters(weight: Any) -> Any:
    """The base of a weight of `without_views`, with its gain: an array, or what stands
    for one."""
    if not is_weight(weight):
        return weight
    base = strip_adapters(weight.w)
    if not isinstance(weight, FactoredWeight) or weight.gain is None:
        return base
    stored = axes_from_end(base.ndim)
    return scale_along(dense(base), stored, weight.gain, stored).astype(base.dtype)


def _is_view(weight: Any) -> bool:
    if not is_weight(weight):
        return False
    return isinstance(weight, FactoredWeight | FusedWeight) or _is_view(weight.w)


def has_gate(weight: Any) -> bool:
    """Whether `weight` has a gate or a gain, which are no factors."""
    if isinstance(weight, FusedWeight):
        return has_gate(weight.weight)
    is_form = isinstance(weight, FactoredWeight)
    return is_form and not (weight.gate is None and weight.gain is None)


def _check_unscaled(places: Sequence[Place]) -> None:
    for place in places:
        weight = place.node
        while is_weight(weight):
            if isinstance(weight, FactoredWeight) and weight.gain is not None:
                raise ValueError(
                    f"{place.dotted} is scaled by a `gain`, which belongs neither to "
                    "its base nor to its factors and would be lost. Scale the array "
                    "before it is adapted, or merge it: `lorax.unloraify(model)`."
                )
            weight = weight.w


def _without_view(weight: Any) -> Any:
    weight = unfuse(weight)
    # A part of a partition has the base without factors, or the factors without it.
    if not is_weight(weight) or is_missing(weight.w):
        return weight
    if isinstance(weight, FactoredWeight):
        if weight.gain is None and weight.b is not None:
            return _when_abstract(LoraWeight.from_factored, weight.form)
        return FactoredWeight(_when_abstract(views.store_in_order, weight.form))
    base = _without_view(weight.w)
    return weight if base is weight.w else weight.with_base(base)


def _without_gate(weight: Any) -> Any:
    if isinstance(weight, FusedWeight):
        return FusedWeight(_without_gate(weight.weight), weight.is_fused)
    if not isinstance(weight, FactoredWeight) or weight.b is None:
        return weight
    return FactoredWeight(_when_abstract(type(weight.form).without_gate, weight.form))


def _when_abstract(fn: Any, form: Any) -> Any:
    """`fn(form)`, also where there are shapes in the place of arrays."""
    if is_abstract(form):
        return eqx.filter_eval_shape(fn, form)
    return fn(form)

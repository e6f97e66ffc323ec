"""Targets: the arrays of modules that are to be adapted."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp

from .._layers import (
    AbstractLoraLayer,
    find_layer,
    is_adapted_by_default,
    is_field_of_kind,
    is_known_layer,
    list_adapted_names,
    LoraModule,
    NORMS,
)
from .._methods import is_weight
from .._shared import list_some
from .._trees import (
    exclude_places,
    Filter,
    FilterMatch,
    list_available,
    list_briefly,
    match_filter,
    Place,
    Places,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A module, and its arrays that are to become factored weights."""

    place: Place
    """The place of the module, which a layer will stand for."""

    arrays: tuple[Place, ...]
    """Arrays of that module. For a norm wrapper, of the layer inside it."""

    @property
    def is_adapted(self) -> bool:
        """Whether any of the arrays has an adapter already."""
        return any(is_weight(array.node) for array in self.arrays)

    @property
    def layer(self) -> type[AbstractLoraLayer]:
        """The type of the layer that will stand for the module."""
        module = self.place.module
        paths = {(*self.place.path, name) for name in list_adapted_names(module)}
        layer = find_layer(module)
        has_own = any(array.path in paths for array in self.arrays)
        return layer if layer is not None and has_own else LoraModule


@dataclasses.dataclass(frozen=True, eq=False)
class Unadaptable:
    """A place that was named, or is a layer, and cannot be adapted."""

    place: Place
    reason: str
    severity: Literal["silent", "warning", "error"]
    """Whether the user gets an error, a warning or nothing."""


_Item: TypeAlias = Target | Unadaptable


def find_targets(
    model: Any,
    places: Places,
    filter: Filter,
    exclude: Filter = None,
    *,
    verb: str = "adapt",
) -> tuple[list[Target], list[str]]:
    """Finds the targets that `filter` names and `exclude` does not, in the order of the
    model, and the reasons why layers are passed over that nobody excluded.

    **Raises:**

    `ValueError` if either of the two, or any part of it, names nothing that can be
    adapted, or if there is no module.
    """
    if not any(isinstance(place.node, eqx.Module) for place in places.all):
        raise ValueError(
            f"There is no `eqx.Module` in this model, and so nothing to {verb}. Arrays "
            "outside of modules get adapters from `lorax.init_lora(params, spec, "
            "key)`, and `lorax.lora(fn)` runs any function on them."
        )
    if filter is None:
        found = _find_layers(places.root, places)
    else:
        named = match_filter(model, places, filter, "filter", is_target)
        found = [item for part in named for item in _resolve(part, places)]
    targets = join_targets(item for item in found if isinstance(item, Target))
    unadaptable = [item for item in found if isinstance(item, Unadaptable)]
    if exclude is not None:
        among = [array for target in targets for array in target.arrays]
        among += [item.place for item in unadaptable]
        left = set(exclude_places(model, places, exclude, among, is_target))
        unadaptable = [item for item in unadaptable if item.place in left]
        kept = [
            Target(target.place, tuple(x for x in target.arrays if x in left))
            for target in targets
        ]
        targets = [target for target in kept if target.arrays]
    reasons: dict[str, list[str]] = {"silent": [], "warning": [], "error": []}
    for item in unadaptable:
        if item.reason not in reasons[item.severity]:
            reasons[item.severity].append(item.reason)
    if wrong := reasons["error"]:
        listed = list_some(wrong, 5, separator="; ")
        raise ValueError(f"{listed}. Or leave it out, with `exclude`.")
    if not targets:
        listed = "".join(f" {reason}." for reason in reasons["warning"][:5])
        raise ValueError(
            f"There is nothing to {verb}. `filter=None`, or naming a container, means "
            f"every `eqx.nn.Linear` and convolution in it, and there is none.{listed} "
            f"Name what to {verb}: {list_available(places, is_target)}."
        )
    return targets, reasons["warning"]


def is_target(array: Place) -> bool:
    """Whether `array` can be adapted."""
    return find_target(array) is not None


def find_target(array: Place) -> Target | None:
    """The target with this array alone; `None` if it cannot be adapted."""
    owner = array.owner
    while owner is not None and _is_array_like(owner.module):
        # Such a module computes an array, so the module around it multiplies with it.
        owner = owner.owner
    if owner is None or not array.is_array or len(array.node.shape) < 2:
        return None
    if not jnp.issubdtype(array.node.dtype, jnp.inexact) or 0 in array.node.shape:
        return None
    field = array.path[len(owner.path)]
    is_adapted = field in list_adapted_names(owner.module)
    if not is_adapted and is_field_of_kind(owner.module, field):
        # Such as a stacked bias, which looks like a matrix.
        return None
    norm = owner.owner
    if (
        norm is not None
        and type(norm.module) in NORMS
        and array.path == (*norm.path, "layer", norm.module.weight_name)
    ):
        # The norm rewrites this weight, so the layer itself never sees the factors.
        owner = norm
    return Target(owner, (array,))


def join_targets(targets: Iterable[Target]) -> list[Target]:
    """One target for each module, with all of its arrays, in the order of the model."""
    modules: dict[Place, dict[Place, None]] = {}
    for target in targets:
        modules.setdefault(target.place, {}).update(dict.fromkeys(target.arrays))
    in_order = sorted(modules, key=lambda place: place.indices)
    return [
        Target(module, tuple(sorted(modules[module], key=lambda place: place.indices)))
        for module in in_order
    ]


def list_targets(targets: Sequence[Target]) -> str:
    """The paths of the first few targets."""
    return list_briefly([target.place for target in targets])


def _resolve(part: FilterMatch, places: Places) -> list[_Item]:
    """Finds the targets for one part of a filter."""
    found: list[_Item] = []
    left: list[Place] = []
    for place in part.places:
        items = _resolve_place(place, places, part)
        found += items
        if not items:
            left.append(place)
    if part.is_leafwise:
        # A filter spec usually marks a bias together with its weight.
        owners = {item.place for item in found if isinstance(item, Target)}
        left = [place for place in left if place.owner not in owners]
    if left and (part.is_leafwise or not found):
        reasons = "; ".join(
            f"{place.dotted} is {_describe(place)}" for place in left[:3]
        )
        raise ValueError(
            f"{part.label} names what cannot be adapted: {reasons}. To train it as it "
            "is, name it in `also` of `lorax.partition`. Available: "
            f"{list_available(places, is_target)}."
        )
    return found


def _resolve_place(place: Place, places: Places, part: FilterMatch) -> list[_Item]:
    if place.is_array:
        target = find_target(place)
        return [] if target is None else [target]
    if is_known_layer(place.module) and type(place.module) not in NORMS:
        return _resolve_layer(place, places, is_named=True)
    own = [x for x in places.beneath(place) if x.owner is place and is_target(x)]
    is_shallow = part.is_shallow and not is_known_layer(place.module)
    found = [] if is_shallow else _find_layers(place, places)
    names = list_adapted_names(place.module)
    found += [x for y in own if y.path[-1] in names and (x := find_target(y))]
    if not found and own:
        listed = ", ".join(f"{x.dotted!r} {tuple(x.node.shape)}" for x in own)
        reason = (
            f"{part.label} names {place.dotted}, a {type(place.module).__name__}. "
            f"Which of its arrays is to be adapted? Name them: {listed}"
        )
        found.append(Unadaptable(place, reason, "error"))
    return found


def _find_layers(place: Place, places: Places) -> list[_Item]:
    """The targets for layers that are adapted by default, at or beneath `place`."""
    return [
        item
        for layer in places.beneath(place)
        if is_adapted_by_default(layer.module)
        for item in _resolve_layer(layer, places, is_named=False)
    ]


def _resolve_layer(layer: Place, places: Places, is_named: bool) -> list[_Item]:
    """For each adapted array of a layer of a known kind, a target, or the reason why
    there is none."""
    names = list_adapted_names(layer.module)
    return [_resolve_array(layer, name, places, is_named) for name in names]


def _resolve_array(layer: Place, name: str, places: Places, is_named: bool) -> _Item:
    inside = list(places.beneath(layer))
    weight = next((x for x in inside if x.path == (*layer.path, name)), None)
    if weight is None or weight.node is not getattr(layer.module, name, None):
        others = [x.dotted for x in inside if x.owner is layer and is_target(x)]
        hint = f"; it has {', '.join(others)}, to be named" if others else ""
        reason = f"{layer.dotted} has no `{name}`: that is `None`, or computed{hint}"
        return Unadaptable(layer, reason, "error" if is_named else "warning")
    if not weight.is_array:
        return _explain_no_array(layer, weight, places, is_named)
    if 0 in weight.node.shape:
        reason = (
            f"{weight.dotted} has shape {tuple(weight.node.shape)}: a layer without "
            "inputs or without outputs has nothing to adapt"
        )
        return Unadaptable(weight, reason, "error" if is_named else "warning")
    target = find_target(weight)
    if target is None and jnp.issubdtype(weight.node.dtype, jnp.inexact):
        reason = f"{weight.dotted} is {_describe(weight)}, which has no matrix to adapt"
        return Unadaptable(weight, reason, "error" if is_named else "warning")
    if target is None:
        reason = (
            f"{weight.dotted} has dtype {weight.node.dtype}, which cannot carry an "
            "adapter. Cast it to a floating dtype"
        )
        return Unadaptable(weight, reason, "error")
    return target


def _explain_no_array(
    layer: Place, weight: Place, places: Places, is_named: bool
) -> Unadaptable:
    shared = _find_shared_owner(weight, places)
    if shared is not None:
        reason = (
            f"{layer.dotted} was named, but `eqx.nn.Shared` takes its weight from "
            f"elsewhere. Name its owner: {shared!r}"
        )
        return Unadaptable(weight, reason, "error" if is_named else "silent")
    inside = [x.dotted for x in places.beneath(weight) if is_target(x)]
    hint = f"it holds {', '.join(inside)}, to be named" if inside else "not adaptable"
    kind = type(weight.node).__name__
    reason = f"{weight.dotted} is not an array but a {kind}: {hint}"
    return Unadaptable(weight, reason, "error" if is_named else "warning")


def _is_array_like(module: Any) -> bool:
    return hasattr(type(module), "__jax_array__")


def _describe(place: Place) -> str:
    if not place.is_array:
        return f"a {type(place.module).__name__} without a matrix"
    shape = tuple(place.node.shape)
    if len(shape) < 2:
        return f"a vector {shape}" if shape else "a scalar"
    if 0 in shape:
        return f"empty, of shape {shape}"
    if not jnp.issubdtype(place.node.dtype, jnp.inexact):
        return f"of dtype {place.node.dtype}"
    if place.owner is None:
        return "not an array of an `eqx.Module`"
    return f"not the weight of its {type(place.owner.module).__name__}"


def _find_shared_owner(placeholder: Place, places: Places) -> str | None:
    around = [
        place.node
        for place in places.all
        if type(place.node) is eqx.nn.Shared and place.holds(placeholder)
    ]
    for shared in around:
        sources, holes = shared.get(shared.pytree), shared.where(shared.pytree)
        if not isinstance(holes, list | tuple):
            sources, holes = [sources], [holes]
        for source, hole in zip(sources, holes):
            if hole is placeholder.node:
                return next(x.dotted for x in places.all if x.node is source)
    return "the layer that holds the array" if around else None

"""Targets: which arrays of which modules are to be adapted."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ._forwarding import NORMS
from ._layers import layer_for, LoraModule
from ._select import (
    available,
    Filter,
    matches_around,
    Named,
    named_places,
    no_match,
    Pattern,
)
from ._tree import Place, Places
from ._weight import is_weight


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A module, and those of its arrays that are to become factored weights."""

    module: Place
    """The module that a layer is to stand for."""

    arrays: tuple[Place, ...]
    """Arrays of that module, or of the layer inside it if it is a norm wrapper."""

    @property
    def is_adapted(self) -> bool:
        """Whether any of the arrays has an adapter already."""
        return any(is_weight(array.node) for array in self.arrays)


def find_targets(model: Any, places: Places, filter: Filter) -> list[Target]:
    """The targets that `filter` names, in the order of the model.

    **Raises:**

    `ValueError` if the filter, or any part of it, names nothing that can be adapted.
    """
    if filter is None:
        found = _layers_beneath(places.root, places)
        if not found:
            raise ValueError(
                "`filter=None` adapts every `eqx.nn.Linear` and convolution, and this "
                f"model has none. Name what to adapt: {available(places.all)}."
            )
    else:
        named = named_places(model, places, filter, "filter")
        found = [target for part in named for target in _resolve(part, places)]
    return _merged(found)


def per_target(
    option: Any, targets: Sequence[Target], argument: str, default: Any
) -> list[Any]:
    """The value of `option` for each target: `option` itself or, if it is a mapping
    from patterns, the value of the first that matches, or else `default`.

    **Raises:**

    `ValueError` if a pattern decides for no target.
    """
    if not isinstance(option, Mapping):
        return [option] * len(targets)
    used: set[Pattern] = set()
    values = []
    for target in targets:
        paths = [target.module.path, *(array.path for array in target.arrays)]
        matching = [
            pattern
            for pattern in option
            if any(matches_around(pattern, path) for path in paths)
        ]
        used.update(matching[:1])
        values.append(option[matching[0]] if matching else default)
    for pattern in option:
        if pattern in used:
            continue
        paths = [target.module.path for target in targets]
        if any(matches_around(pattern, path) for path in paths):
            raise ValueError(
                f"`{argument}` has a pattern {pattern!r} that decides nothing: another "
                "before it matches all the same targets. The first that matches "
                "counts, so put the general ones last."
            )
        text = getattr(pattern, "pattern", pattern)
        raise ValueError(
            f"{no_match(argument, text, paths)} It has to match a target of `filter`: "
            f"{summarised(targets)}."
        )
    return values


def summarised(targets: Iterable[Target]) -> str:
    """The targets in a few words."""
    paths = [target.module.dotted for target in targets]
    more = f", and {len(paths) - 8} more" if len(paths) > 8 else ""
    return ", ".join(paths[:8]) + more


def _resolve(part: Named, places: Places) -> list[Target]:
    """The targets that one part of a filter means by what it names."""
    found: list[Target] = []
    left: list[Place] = []
    for place in part.places:
        targets = _targets_at(place, places, part.label)
        found += targets
        if not targets:
            left.append(place)
    if part.one_by_one:
        # Marking a bias together with its weight is how specs usually look.
        owners = {target.module for target in found}
        left = [place for place in left if place.owner not in owners]
    if left and (part.one_by_one or not found):
        reasons = "; ".join(
            f"{place.dotted} is {_what_it_is(place)}" for place in left[:3]
        )
        raise ValueError(
            f"{part.label} names what cannot be adapted: {reasons}. To train it as it "
            "is, name it in `also` of `lorax.partition`. Available: "
            f"{available(places.all)}."
        )
    return found


def _targets_at(place: Place, places: Places, label: str) -> list[Target]:
    if place.is_array:
        target = target_of(place)
        return [] if target is None else [target]
    if layer_for(place.module) is not LoraModule:
        return [_target_of_layer(place, places, label)]
    found = _layers_beneath(place, places)
    own = [array for array in places.beneath(place) if array.owner is place]
    weight = [array for array in own if array.path[-1] == "weight"]
    targets = [target_of(array) for array in weight if array.is_array]
    found += [target for target in targets if target is not None]
    candidates = [array for array in own if target_of(array) is not None]
    if not found and candidates:
        listed = ", ".join(f"{x.dotted!r} {tuple(x.node.shape)}" for x in candidates)
        raise ValueError(
            f"{label} names {place.dotted}, a {type(place.module).__name__}. Which of "
            f"its arrays is to be adapted? Name them: {listed}."
        )
    return found


def _layers_beneath(place: Place, places: Places) -> list[Target]:
    """The layers of the kinds that need not be named, at or beneath `place`."""
    return [
        _target_of_layer(layer, places, None)
        for layer in places.beneath(place)
        if layer_for(layer.module).by_default and _weight_of(layer, places).is_array
    ]


def _target_of_layer(layer: Place, places: Places, label: str | None) -> Target:
    weight = _weight_of(layer, places)
    if not weight.is_array:
        raise ValueError(
            f"{label} names {layer.dotted}, whose weight `eqx.nn.Shared` takes from "
            f"elsewhere. Name its owner: {_owner_of_shared(weight, places)!r}."
        )
    target = target_of(weight)
    if target is None:
        raise ValueError(
            f"{weight.dotted} has dtype {weight.node.dtype}, which cannot carry an "
            "adapter. Cast it to a floating dtype, or leave it out of `filter`."
        )
    return target


def _weight_of(layer: Place, places: Places) -> Place:
    return next(
        place
        for place in places.beneath(layer)
        if place.path == (*layer.path, "weight")
    )


def target_of(array: Place) -> Target | None:
    """The target that adapting `array` makes; `None` if it cannot be adapted."""
    owner = array.owner
    if owner is None or not array.is_array or len(array.node.shape) < 2:
        return None
    if not jnp.issubdtype(array.node.dtype, jnp.inexact):
        return None
    if layer_for(owner.module) is not LoraModule and array.path[-1] != "weight":
        # A stacked bias looks like a matrix.
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


def _what_it_is(place: Place) -> str:
    if not place.is_array:
        return f"a {type(place.module).__name__} without a matrix"
    shape = tuple(place.node.shape)
    if len(shape) < 2:
        return f"a vector {shape}" if shape else "a scalar"
    if not jnp.issubdtype(place.node.dtype, jnp.inexact):
        return f"of dtype {place.node.dtype}"
    if place.owner is None:
        return "not an array of an `eqx.Module`"
    return f"not the weight of its {type(place.owner.module).__name__}"


def _owner_of_shared(placeholder: Place, places: Places) -> str:
    for place in places.all:
        if type(place.node) is eqx.nn.Shared and place.holds(placeholder):
            shared = place.node
            sources, holes = shared.get(shared.pytree), shared.where(shared.pytree)
            if not isinstance(holes, list | tuple):
                sources, holes = [sources], [holes]
            for source, hole in zip(sources, holes):
                if hole is placeholder.node:
                    return next(x.dotted for x in places.all if x.node is source)
    return "the layer that holds the array"


def _merged(targets: Iterable[Target]) -> list[Target]:
    """Each module once, with all of its arrays, in the order of the model."""
    modules: dict[Place, dict[Place, None]] = {}
    for target in targets:
        modules.setdefault(target.module, {}).update(dict.fromkeys(target.arrays))
    in_order = sorted(modules, key=lambda place: place.steps)
    return [
        Target(module, tuple(sorted(modules[module], key=lambda place: place.steps)))
        for module in in_order
    ]

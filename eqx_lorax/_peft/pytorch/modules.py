"""The modules of PyTorch that a model here stands for, and the shapes of their arrays
there."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx

from ..._layers import adapted_names
from ..._shared import is_inexact
from ..._trees import Place, Places
from .names import expanded, Names, template


def template_for(place: Place, names: Names) -> str:
    path = named(place)
    torch = template(names, path)
    if torch is None:
        dotted = ".".join(path)
        raise ValueError(f"`names` has nothing for {dotted!r}.")
    return torch


def named(place: Place) -> tuple[str, ...]:
    """What `names` is asked about an array: the module whose weight it is."""
    module = None if place.owner is None else place.owner.module
    is_only_one = adapted_names(module) == (place.path[-1],)
    return place.path[:-1] if is_only_one else place.path


def torch_shape(array: Place, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in PyTorch of an array of a module that is saved whole, of this `shape`
    here: biases of convolutions have axes of size one more."""
    module: Any = array.owner.module if array.owner is not None else None
    if array.path[-1] == "bias" and hasattr(module, "num_spatial_dims"):
        return tuple(shape[: len(shape) - module.num_spatial_dims])
    return tuple(shape)


def arrays_of(module: Place, places: Places) -> list[Place]:
    return [
        place
        for place in places.beneath(module)
        if place.owner is module and is_inexact(place.node)
    ]


def is_module(place: Place) -> bool:
    return isinstance(place.node, eqx.Module) and bool(place.path)


def modules_with_arrays(places: Places, names: Names) -> list[str]:
    """The paths in PyTorch of all modules that have arrays of their own."""
    return [
        path
        for module in places.all
        if is_module(module)
        and (torch := template(names, module.path)) is not None
        and (arrays := [x for x in places.beneath(module) if x.owner is module])
        for _, path in expanded(torch, getattr(arrays[0].node, "shape", ()))
    ]

"""The modules of PyTorch that a model here stands for, and the shapes of their arrays
there."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx

from ..._layers import list_adapted_names
from ..._shared import is_inexact
from ..._trees import Place, Places
from .names import expand, find_template, Names


def require_template(place: Place, names: Names) -> str:
    """The path in PyTorch of the array at `place`, see `find_template`.

    **Raises:**

    `ValueError` if `names` lacks it.
    """
    path = path_in_names(place)
    torch = find_template(names, path)
    if torch is None:
        dotted = ".".join(path)
        raise ValueError(f"`names` has nothing for {dotted!r}.")
    return torch


def path_in_names(place: Place) -> tuple[str, ...]:
    """The path by which `names` knows an array. For the only adapted array of a module,
    usually its `weight`, that is the path of the module."""
    module = None if place.owner is None else place.owner.module
    is_only_one = list_adapted_names(module) == (place.path[-1],)
    return place.path[:-1] if is_only_one else place.path


def to_torch_shape(array: Place, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in PyTorch of an array that has this `shape` here. Only the biases of
    convolutions differ, which have further axes of size one here."""
    module: Any = array.owner.module if array.owner is not None else None
    if array.path[-1] == "bias" and hasattr(module, "num_spatial_dims"):
        return tuple(shape[: len(shape) - module.num_spatial_dims])
    return tuple(shape)


def find_own_arrays(module: Place, places: Places) -> list[Place]:
    """The inexact arrays of the module itself, not those of modules inside it."""
    return [
        place
        for place in places.beneath(module)
        if place.owner is module and is_inexact(place.node)
    ]


def is_module(place: Place) -> bool:
    return isinstance(place.node, eqx.Module) and bool(place.path)


def find_modules(places: Places, names: Names) -> list[str]:
    """The paths in PyTorch of all modules that have arrays of their own."""
    return [
        path
        for module in places.all
        if is_module(module)
        and (torch := find_template(names, module.path)) is not None
        and (arrays := [x for x in places.beneath(module) if x.owner is module])
        for _, path in expand(torch, getattr(arrays[0].node, "shape", ()))
    ]

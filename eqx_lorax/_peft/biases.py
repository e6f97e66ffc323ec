"""Biases that are trained beside adapters: PEFT's options `bias` and `lora_bias`."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._adapters import Adapter
from .._methods import is_weight
from .._shared import is_inexact
from .._trees import Place, Places
from .pytorch import (
    expand,
    find_template,
    Index,
    is_module,
    Names,
    require_template,
    to_torch_shape,
)
from .tensors import choose_part_layout, Factors


class Biases(NamedTuple):
    """The biases of an adapter, as PEFT saves them."""

    option: str
    """`bias` in the configuration."""
    tensors: dict[str, np.ndarray]
    saved: set[tuple[str, ...]]
    """The paths of their arrays in the model here."""


def collect_biases(adapter: Adapter, places: Places, names: Names) -> Biases:
    """The biases that are trained without the rest of their modules: all biases of the
    model, or all those of adapted layers. PEFT saves every bias of such a set, so those
    that are not trained are written unchanged.

    **Raises:**

    `ValueError` if `names` lacks one of them.
    """
    every = [place for place in places.all if _is_bias(place)]
    trained = {place for place in every if place.path in adapter.others}
    alone = {x for x in trained if not _is_trained_whole(x, adapter, places)}
    of_layers = {x for x in every if _is_of_layer(x, places, names)}
    if alone and len(trained) == len(every):
        option, chosen = "all", alone | of_layers
    elif alone & of_layers:
        option, chosen = "lora_only", of_layers
    else:
        return Biases("none", {}, set())
    tensors: dict[str, np.ndarray] = {}
    for place in every:
        if place not in chosen:
            continue
        torch = find_template(names, place.path[:-1])
        if torch is None:
            raise ValueError(f"`names` has nothing for {'.'.join(place.path[:-1])!r}.")
        inside = ".base_layer" if place in of_layers else ""
        for index, path in expand(torch, place.node.shape):
            part = np.asarray(jax.device_get(place.node[index]))
            shape = to_torch_shape(place, part.shape)
            tensors[f"{path}{inside}.bias"] = part.reshape(shape)
    return Biases(option, tensors, {place.path for place in chosen})


def read_biases(
    config: Mapping[str, Any],
    places: Places,
    names: Names,
    remaining: dict[str, Any],
    *,
    adapted: Mapping[str, Factors],
    whole: Collection[str],
) -> tuple[dict[tuple[str, ...], np.ndarray], list[str]]:
    """The new biases by their paths here, and a line for each problem. Their tensors
    are taken out of `remaining`.

    **Arguments:**

    - `adapted`: The factors of each adapted module by its path.
    - `whole`: The modules that are saved whole, with their biases.
    """
    option = config.get("bias") or "none"
    here = dict(_find_biases(places, names))
    parts: dict[Place, dict[Index, np.ndarray]] = {}
    problems: list[str] = []
    taken = dict(_find_tensors(remaining, option))
    for path, (place, index) in here.items():
        if path in whole:
            continue
        wanted = to_torch_shape(place, place.node.shape[len(index) :])
        now = np.asarray(jax.device_get(place.node[index])).reshape(wanted)
        new = now
        if path in taken:
            new = np.asarray(remaining.pop(taken.pop(path)))
        elif option == "all" or (option == "lora_only" and path in adapted):
            problems.append(f"`bias={option!r}`, and there is no bias of {path}")
        if new.shape != wanted:
            problems.append(f"the bias of {path} has shape {new.shape}, not {wanted}")
            continue
        if path in adapted and f"{path}.lora_B.bias" in remaining:
            added = np.asarray(remaining.pop(f"{path}.lora_B.bias"), np.float64)
            total = new.astype(np.float64) + adapted[path].scale * added
            new = total.astype(new.dtype)
        if new is not now:
            parts.setdefault(place, {})[index] = new
    without = [x for x in adapted if x not in here and f"{x}.lora_B.bias" in remaining]
    for path in without:
        remaining.pop(f"{path}.lora_B.bias")
        problems.append(
            f"{path} has a bias of its adapter (`lora_bias`), and the layer here has "
            "none to which it could be added. Make it with a bias of zeros"
        )
    return {
        place.path: _join_parts(place, of_stack) for place, of_stack in parts.items()
    }, problems


def _join_parts(place: Place, parts: Mapping[Index, np.ndarray]) -> np.ndarray:
    """The bias of a whole stack. Layers without a new bias keep theirs."""
    dtype = next(iter(parts.values())).dtype
    joined = np.array(place.node, dtype)
    for index, part in parts.items():
        joined[index] = part.reshape(joined[index].shape)
    return joined


def _find_tensors(remaining: dict[str, Any], option: str) -> Iterator[tuple[str, str]]:
    """The names of the tensors of biases, by the paths of their modules. A module that
    is saved whole has two more copies of its bias, which are dropped."""
    if option == "none":
        return
    for name in list(remaining):
        module, _, array = name.rpartition(".")
        parts = module.split(".")
        if array != "bias" or parts[-1] == "lora_B":
            continue
        if "original_module" in parts or "modules_to_save" in parts:
            del remaining[name]
        else:
            yield ".".join(x for x in parts if x != "base_layer"), name


def _find_biases(
    places: Places, names: Names
) -> Iterator[tuple[str, tuple[Place, Index]]]:
    for place in places.all:
        if not _is_bias(place):
            continue
        torch = find_template(names, place.path[:-1])
        if torch is not None:
            for index, path in expand(torch, place.node.shape):
                yield path, (place, index)


def _is_bias(place: Place) -> bool:
    owner = place.owner
    return (
        place.path[-1:] == ("bias",)
        and owner is not None
        and is_module(owner)
        and owner.path == place.path[:-1]
        and is_inexact(place.node)
    )


def _is_trained_whole(bias: Place, adapter: Adapter, places: Places) -> bool:
    assert bias.owner is not None
    arrays = [x for x in places.beneath(bias.owner) if x.owner is bias.owner]
    others = [x for x in arrays if x is not bias and x.is_array]
    return any(x.path in adapter.others for x in others)


def _is_of_layer(bias: Place, places: Places, names: Names) -> bool:
    """Whether `bias` is that of a module whose weight has an adapter."""
    assert bias.owner is not None
    weights = [
        x
        for x in places.beneath(bias.owner)
        if x.owner is bias.owner and is_weight(x.node)
    ]
    if len(weights) != 1 or weights[0].path[-1] != "weight":
        return False
    (place,) = weights
    batch = place.node.batch_shape
    torch = require_template(place, names)
    return not choose_part_layout(place, torch, batch, False).is_parameter

"""From adapters here to the tensors and the configuration of PEFT."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .._adapters import Adapter
from .._methods import is_weight
from .._modules import infer_axes
from .._trees import Place, Places
from .biases import trained_biases
from .config import is_said_alone, new_config, upwards
from .pytorch import (
    arrays_of,
    expanded,
    few,
    modules_with_arrays,
    Names,
    template,
    template_for,
    torch_shape,
)
from .tensors import (
    by_module,
    check_order,
    Factors,
    InOut,
    Layout,
    layout_for,
    Linear,
    order_to_write,
    prefixes,
    warn_of_convolution,
)
from .tied import Tied, tied_pair


# What PEFT has inside an adapted module.
_INSIDE = (
    "base_layer",
    "lora_dropout.default",
    "lora_A.default",
    "lora_B.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


@dataclasses.dataclass(frozen=True)
class Whole:
    """What is saved as it is: modules whole, and biases."""

    paths: list[str]
    """Of the modules in PyTorch."""
    tensors: dict[str, Any]
    saved: set[tuple[str, ...]]
    """The paths of their arrays here."""
    bias: str
    """Which biases are saved besides."""


def written(
    adapter: Adapter,
    places: Places,
    names: Names,
    in_out: InOut,
    whole: Whole,
    order: Sequence[str] | None,
    tied: Tied,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of all that is saved, and the configuration that fits them,
    whose `target_parameters` are in the order in which PEFT nests those of one module.
    """
    by_path = {place.path: place for place in places.all}
    is_stabilised = all(x.settings["rank_stabilised"] for x in adapter.weights)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    heads: dict[str, str] = {}
    factors: dict[str, tuple[Layout, Factors]] = {}
    for adapted in adapter.weights:
        place = by_path[adapted.path]
        if is_weight(place.node.w):
            raise ValueError(
                f"{adapted.dotted} has an adapter upon an adapter, which PEFT has not. "
                "Merge the one below first."
            )
        for torch, layout, part in _parts(place, names, place in in_out):
            if torch in factors:
                raise ValueError(f"`names` gives {torch!r} twice.")
            if place in tied.heads:
                heads[torch] = tied.heads[place]
            factors[torch] = layout, part
            ranks[torch] = layout.torch_rank(part.rank)
            alphas[torch] = part.scaled_for(ranks[torch], is_stabilised)
    pairs = {
        torch: layout.to_torch(part.b, part.a)
        for torch, (layout, part) in factors.items()
    }
    parameters = [torch for torch in factors if factors[torch][0].is_parameter]
    check_order(order, parameters)
    orders = [
        order_to_write({path: [x.shape for x in pairs[path]] for path in paths}, order)
        for paths in by_module(parameters)
    ]
    prefix_of = {torch: f"{torch}." for torch in factors}
    for paths in orders:
        prefix_of |= prefixes(paths)
    tensors = {
        prefix_of[torch] + name: array
        for torch, pair in pairs.items()
        for name, array in zip(factors[torch][0].names, pair)
    }
    for torch, head in heads.items():
        pair = tied_pair(factors[torch][0], *pairs[torch])
        tensors |= {f"{head}.{x}": y for x, y in zip(Linear.names, pair)}
        ranks[head], alphas[head] = ranks[torch], alphas[torch]
    modules = known_modules(places, names, ranks)
    config = new_config(
        ranks,
        alphas,
        parameters=[path for paths in orders for path in paths],
        modules=modules,
        rank_stabilised=bool(adapter.weights) and is_stabilised,
        dropout=_dropout(adapter, parameters),
        fan_in_fan_out=_are_all_in_out(layout for layout, _ in factors.values()),
    )
    config["bias"] = whole.bias
    if heads:
        config["ensure_weight_tying"] = True
    config["modules_to_save"] = said_alone(whole, factors.keys(), modules) or None
    return tensors | whole.tensors, config


def _parts(
    place: Place, names: Names, is_in_out: bool
) -> Iterator[tuple[str, Layout, Factors]]:
    """What PyTorch has for the weight at `place`: a layer of a stack each."""
    weight = place.node.as_lora()
    if (weight.rows, weight.columns) != infer_axes(place):
        raise ValueError(
            f"{place.dotted} has factors along the axes {weight.rows} and "
            f"{weight.columns}, which PEFT has not."
        )
    torch = template_for(place, names)
    batch = [weight.shape[axis] for axis in weight.batch_axes()]
    layout = layout_for(place, torch, batch, is_in_out)
    warn_of_convolution(place)
    b, a = np.asarray(weight.b), np.asarray(weight.a)
    for index, path in expanded(torch, batch):
        yield (
            path,
            layout,
            Factors(
                b[index], a[index], weight.alpha, weight.rank_stabilised, weight.rank
            ),
        )


def whole_modules(adapter: Adapter, places: Places, names: Names) -> Whole:
    """What has to be saved besides the factors: modules whole, of which some arrays
    were trained, but for biases where PEFT saves these alone."""
    by_path = {place.path: place for place in places.all}
    biases = trained_biases(adapter, places, names)
    owners = dict.fromkeys(
        by_path[path].owner for path in adapter.others if path not in biases.saved
    )
    paths: list[str] = []
    tensors: dict[str, Any] = dict(biases.tensors)
    saved = set(biases.saved)
    for owner in owners:
        if owner is None or not owner.path:
            raise ValueError("`also` names arrays that are in no module with a name.")
        if any(is_weight(place.node) for place in places.beneath(owner)):
            raise ValueError(
                f"`also` names arrays of {owner.dotted}, which has an adapter too; "
                "beside it PEFT saves the bias of a layer, and nothing else."
            )
        torch = template(names, owner.path)
        if torch is None:
            raise ValueError(f"`names` has nothing for {owner.dotted!r}.")
        for array in arrays_of(owner, places):
            saved.add(array.path)
            for index, path in expanded(torch, array.node.shape):
                paths.append(path)
                part = np.asarray(array.node[index])
                shape = torch_shape(array, part.shape)
                tensors[f"{path}.{array.path[-1]}"] = part.reshape(shape)
    return Whole(sorted(set(paths)), tensors, saved, biases.option)


def _are_all_in_out(layouts: Iterable[Layout]) -> bool:
    """Whether PyTorch's modules are to be expected to store `(in, out)`, as PEFT has it
    of linear layers and refuses it of parameters."""
    of_interest = [x for x in layouts if isinstance(x, Linear) or x.is_parameter]
    return bool(of_interest) and all(
        isinstance(x, Linear) and x.exchanged for x in of_interest
    )


def known_modules(places: Places, names: Names, adapted: Iterable[str]) -> set[str]:
    """The paths of all modules that are known to be in the model in PyTorch once these
    have adapters."""
    paths = {*modules_with_arrays(places, names), *adapted}
    inside = {f"{path}.{name}" for path in adapted for name in _INSIDE}
    return {around for path in paths | inside for around in upwards(path)}


def said_alone(whole: Whole, adapted: Collection[str], modules: set[str]) -> list[str]:
    """The modules of `whole` for `modules_to_save`, without those by whose names PEFT
    would mean others too. These it loads all the same, by the names of their arrays."""
    said = [path for path in whole.paths if is_said_alone(path, modules, adapted)]
    if left := [path for path in whole.paths if path not in said]:
        warnings.warn(
            f"PEFT takes what is in `modules_to_save` for the end of any path, and "
            f"cannot name {few(left)} alone. Written as arrays of the base, which PEFT "
            "puts into the model itself when it loads the adapter: the outputs are "
            "right, but training on there leaves them out, and so does switching the "
            "adapter off. Give the module in PyTorch a longer name to mend this.",
            stacklevel=4,
        )
    return said


def _dropout(adapter: Adapter, parameters: list[str]) -> float:
    """What PEFT has for all layers."""
    rates = {x.dropout for x in adapter.weights if x.dropout is not None}
    if len(rates) < 2 and not (parameters and any(rates)):
        return rates.pop() if rates else 0.0
    warnings.warn(
        "PEFT has one `lora_dropout` for all layers, which must be zero if there are "
        f"expert weights; here it is {', '.join(map(str, sorted(rates)))}. Written as "
        "zero, which only concerns those who train on.",
        stacklevel=4,
    )
    return 0.0

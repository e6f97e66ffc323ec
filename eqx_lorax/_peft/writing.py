"""From adapters here to the tensors and the configuration of PEFT."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from .._adapters import Adapter
from .._methods import is_weight, TokensWeight
from .._modules import infer_axes
from .._trees import Place, Places
from .biases import collect_biases
from .config import is_named_alone, list_ancestors, make_config, make_targets
from .methods import BY_METHOD, Layer, split_layers
from .pytorch import (
    expand,
    find_modules,
    find_own_arrays,
    find_template,
    list_paths,
    Names,
    require_template,
    to_torch_shape,
)
from .tensors import (
    check_order,
    choose_order,
    choose_part_layout,
    Factors,
    group_by_module,
    InOut,
    Layout,
    Linear,
    MAGNITUDE,
    make_prefixes,
    warn_of_convolution,
)
from .tied import DORA_OF_TIED, swap_for_head, Tied
from .tokens import name_rows, write_tokens


# The modules that PEFT puts inside an adapted module.
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
class SavedWhole:
    """The arrays that are saved as they are: modules whole, and biases."""

    paths: list[str]
    """The paths of the modules in PyTorch."""
    tensors: dict[str, Any]
    saved: set[tuple[str, ...]]
    """The paths of the arrays in the model here."""
    bias: str
    """PEFT's option for the biases that are saved."""


def export_adapter(
    adapter: Adapter,
    places: Places,
    names: Names,
    in_out: InOut,
    whole: SavedWhole,
    order: Sequence[str] | None,
    tied: Tied,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the configuration of an adapter in PEFT's format. Its
    `target_parameters` are in the order in which PEFT nests those of one module."""
    by_path = {place.path: place for place in places.all}
    for adapted in adapter.weights:
        if is_weight(by_path[adapted.path].node.w):
            raise ValueError(
                f"{adapted.dotted} has an adapter on top of an adapter, which PEFT has "
                "not. Merge the inner one first."
            )
    if adapter.weights and adapter.weights[0].method in BY_METHOD:
        return _export_other(adapter, places, names, in_out, whole, tied)
    tables = [x for x in adapter.weights if x.method == TokensWeight.method]
    adapter = dataclasses.replace(
        adapter, weights=[x for x in adapter.weights if x not in tables]
    )
    is_stabilised = all(x.settings["rank_stabilised"] for x in adapter.weights)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    heads: dict[str, str] = {}
    factors: dict[str, tuple[Layout, Factors]] = {}
    for adapted in adapter.weights:
        place = by_path[adapted.path]
        for torch, layout, part in _export_parts(place, names, place in in_out):
            if torch in factors:
                raise ValueError(f"`names` gives {torch!r} twice.")
            if place in tied.heads:
                if part.magnitude is not None:
                    raise ValueError(f"{adapted.dotted} has DoRA. {DORA_OF_TIED}.")
                heads[torch] = tied.heads[place]
            factors[torch] = layout, part
            ranks[torch] = layout.torch_rank(part.rank)
            alphas[torch] = part.alpha_for(ranks[torch], is_stabilised)
    pairs = {
        torch: layout.to_torch(part.b, part.a)
        for torch, (layout, part) in factors.items()
    }
    parameters = [torch for torch in factors if factors[torch][0].is_parameter]
    check_order(order, parameters)
    orders = [
        choose_order({path: [x.shape for x in pairs[path]] for path in paths}, order)
        for paths in group_by_module(parameters)
    ]
    prefix_of = {torch: f"{torch}." for torch in factors}
    for paths in orders:
        prefix_of |= make_prefixes(paths)
    tensors = {
        prefix_of[torch] + name: array
        for torch, pair in pairs.items()
        for name, array in zip(factors[torch][0].names, pair)
    }
    for torch, (layout, part) in factors.items():
        if part.magnitude is not None:
            magnitude = layout.magnitude_to_torch(part.magnitude)
            tensors[f"{torch}.{MAGNITUDE}"] = magnitude
    for torch, head in heads.items():
        pair = swap_for_head(factors[torch][0], *pairs[torch])
        tensors |= {f"{head}.{x}": y for x, y in zip(Linear.names, pair)}
        ranks[head], alphas[head] = ranks[torch], alphas[torch]
    modules = list_known_modules(places, names, ranks)
    config = make_config(
        ranks,
        alphas,
        parameters=[path for paths in orders for path in paths],
        modules=modules,
        rank_stabilised=bool(adapter.weights) and is_stabilised,
        use_dora=any(x.method == "dora" for x in adapter.weights),
        dropout=_choose_dropout(adapter, parameters),
        fan_in_fan_out=_are_all_in_out(layout for layout, _ in factors.values()),
    )
    config["bias"] = whole.bias
    if heads:
        config["ensure_weight_tying"] = True
    config["modules_to_save"] = (
        choose_modules_to_save(whole, factors.keys(), modules) or None
    )
    indices: dict[str, list[int]] = {}
    for table in tables:
        for torch, of_table, rows in write_tokens(by_path[table.path], names, modules):
            indices[torch] = of_table
            tensors[name_rows(torch)] = rows
    if indices:
        config["trainable_token_indices"] = indices
    return tensors | whole.tensors, config


def _export_other(
    adapter: Adapter,
    places: Places,
    names: Names,
    in_out: InOut,
    whole: SavedWhole,
    tied: Tied,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `export_adapter`, of a method beside LoRA and DoRA."""
    format = BY_METHOD[adapter.weights[0].method]
    by_path = {place.path: place for place in places.all}
    if whole.bias != "none":
        raise ValueError(
            f"`also` names biases, and PEFT trains none beside {format.peft_type}. "
            "Save it with `lorax.save_adapter`."
        )
    layers: dict[str, Layer] = {}
    for adapted in adapter.weights:
        place = by_path[adapted.path]
        if place in tied.heads:
            raise ValueError(
                f"{adapted.dotted} is in `tied`, which can be with LoRA alone. Convert "
                "it with `lorax.as_lora(model, rank)`, or untie the two."
            )
        for torch, layer in split_layers(format, place, names, in_out):
            if torch in layers:
                raise ValueError(f"`names` gives {torch!r} twice.")
            layers[torch] = layer
    tensors, options = format.write(layers)
    modules = list_known_modules(places, names, layers)
    config = {
        "peft_type": format.peft_type,
        "inference_mode": True,
        "target_modules": make_targets(layers, modules),
        "modules_to_save": choose_modules_to_save(whole, layers.keys(), modules)
        or None,
        **options,
    }
    if format.options.dropout is not None:
        config[format.options.dropout] = _choose_dropout(adapter, [])
    elif any(x.dropout for x in adapter.weights):
        warnings.warn(
            f"PEFT has no dropout of {format.peft_type}. Written without, which only "
            "matters for further training.",
            stacklevel=4,
        )
    return tensors | whole.tensors, config


def _export_parts(
    place: Place, names: Names, is_in_out: bool
) -> Iterator[tuple[str, Layout, Factors]]:
    """The path in PyTorch, the layout and the factors of each part of the weight at
    `place`: of each layer of a stack."""
    weight = place.node
    if (weight.rows, weight.columns) != infer_axes(place):
        raise ValueError(
            f"{place.dotted} has factors along the axes {weight.rows} and "
            f"{weight.columns}, which PEFT has not."
        )
    torch = require_template(place, names)
    batch = weight.batch_shape
    layout = choose_part_layout(place, torch, batch, is_in_out)
    warn_of_convolution(place)
    magnitude = getattr(weight, "magnitude", None)
    if magnitude is not None:
        _check_dora(place, layout)
    b, a, magnitude = jax.device_get((weight.b, weight.a, magnitude))
    b, a = np.asarray(b), np.asarray(a)
    for index, path in expand(torch, batch):
        settings = weight.alpha, weight.rank_stabilised, weight.rank
        of_layer = None if magnitude is None else np.asarray(magnitude)[index]
        part = Factors(b[index], a[index], *settings, of_layer, layout.outputs)
        yield path, layout, part


def _check_dora(place: Place, layout: Layout) -> None:
    if problem := layout.refuse_dora():
        raise ValueError(
            f"{place.dotted}: {problem}. Convert it with `lorax.as_lora(model, rank)`, "
            "or save it with `lorax.save_adapter`."
        )
    if place.node.outputs != layout.outputs:
        raise ValueError(
            f"{place.dotted} has the magnitude of its {place.node.outputs}, and in "
            f"PyTorch the outputs are its {layout.outputs}. Convert it with "
            "`lorax.as_lora(model, rank)`, or save it with `lorax.save_adapter`."
        )


def collect_whole(adapter: Adapter, places: Places, names: Names) -> SavedWhole:
    """What has to be saved besides the factors: the modules that have trained arrays,
    each as a whole, and the biases that PEFT saves alone."""
    by_path = {place.path: place for place in places.all}
    biases = collect_biases(adapter, places, names)
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
        torch = find_template(names, owner.path)
        if torch is None:
            raise ValueError(f"`names` has nothing for {owner.dotted!r}.")
        for array in find_own_arrays(owner, places):
            saved.add(array.path)
            for index, path in expand(torch, array.node.shape):
                paths.append(path)
                part = np.asarray(jax.device_get(array.node[index]))
                shape = to_torch_shape(array, part.shape)
                tensors[f"{path}.{array.path[-1]}"] = part.reshape(shape)
    return SavedWhole(sorted(set(paths)), tensors, saved, biases.option)


def _are_all_in_out(layouts: Iterable[Layout]) -> bool:
    """Whether `fan_in_fan_out` is set: PyTorch's linear layers store `(in, out)`. PEFT
    refuses the option for parameters."""
    linear = [x for x in layouts if isinstance(x, Linear) or x.is_parameter]
    return bool(linear) and all(isinstance(x, Linear) and x.a_has_rows for x in linear)


def list_known_modules(
    places: Places, names: Names, adapted: Iterable[str]
) -> set[str]:
    """The paths of all modules that are known to be in the model in PyTorch once those
    at `adapted` have adapters."""
    paths = {*find_modules(places, names), *adapted}
    inside = {f"{path}.{name}" for path in adapted for name in _INSIDE}
    return {around for path in paths | inside for around in list_ancestors(path)}


def choose_modules_to_save(
    whole: SavedWhole, adapted: Collection[str], modules: set[str]
) -> list[str]:
    """The modules of `whole` for `modules_to_save`, without those whose entries would
    match other modules too. PEFT loads these all the same, by the names of their
    arrays."""
    named = [path for path in whole.paths if is_named_alone(path, modules, adapted)]
    if unnamed := [path for path in whole.paths if path not in named]:
        warnings.warn(
            f"PEFT takes an entry of `modules_to_save` for the end of any path, and "
            f"cannot name {list_paths(unnamed)} alone. Written as arrays of the base, "
            "which PEFT puts into the model itself when it loads the adapter: the "
            "outputs are right, but training on there leaves them out, and so does "
            "switching the adapter off. Give the module in PyTorch a longer name to "
            "mend this.",
            stacklevel=4,
        )
    return named


def _choose_dropout(adapter: Adapter, parameters: list[str]) -> float:
    """The rate of dropout, which is one for all layers in PEFT."""
    rates = {x.dropout for x in adapter.weights if x.dropout is not None}
    if len(rates) < 2 and not (parameters and any(rates)):
        return rates.pop() if rates else 0.0
    warnings.warn(
        "PEFT has one `lora_dropout` for all layers, which must be zero if there are "
        f"expert weights; here it is {', '.join(map(str, sorted(rates)))}. Written as "
        "zero, which only matters for further training.",
        stacklevel=4,
    )
    return 0.0

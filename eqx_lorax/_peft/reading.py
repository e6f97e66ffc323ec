"""From the tensors and the configuration of PEFT to adapters here."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from .._adapters import Adapter, DetachedWeight
from .._trees import Place, Places
from .bases import find_other_bases
from .biases import read_biases
from .config import (
    Contents,
    find_missing,
    is_parameter_targeted,
    warn_of_unused_patterns,
)
from .methods import BY_TYPE, OPTIONS, read_layers
from .pytorch import (
    expand,
    find_modules,
    find_own_arrays,
    find_template,
    Index,
    is_module,
    list_paths,
    Names,
    to_torch_shape,
)
from .tensors import (
    check_order,
    Counterpart,
    Experts,
    Factors,
    find_counterparts,
    group_by_module,
    infer_order,
    InOut,
    is_possible,
    join_layers,
    list_names,
    make_prefix,
    make_prefixes,
    read_factors,
)
from .tied import check_tied_tensors, Tied
from .tokens import read_tokens


def import_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    places: Places,
    names: Names,
    in_out: InOut,
    order: Sequence[str] | None,
    allow_other_base: bool,
    tied: Tied,
) -> Adapter:
    """The adapter, for a model here, of a folder in PEFT's format.

    **Arguments:**

    - `config`: The configuration, which has been checked.
    - `tensors`: The tensors, by names without prefix.
    - `places`, `names`, `in_out`, `tied`: What `lorax.peft.load` was given.
    - `order`: The order of several parameters of one module, if it is known.
    - `allow_other_base`: Whether saved arrays of the base may differ from the model's.

    **Raises:**

    `ValueError` if any tensor has no place in the model, has the wrong shape, or lacks
    its other half.
    """
    if not tensors:
        raise ValueError(
            "there is not one tensor in it. Copy it again or, if PyTorch wrote it so "
            "(with FSDP and DeepSpeed the parts have to be gathered), save it again."
        )
    remaining = dict(zip(tensors, jax.device_get(list(tensors.values()))))
    known = dict(find_counterparts(places, names, in_out))
    contents = Contents(tensors)
    found = (
        _read_lora(config, places, names, known, remaining, order, tied, contents)
        if config["peft_type"] == "LORA"
        else _read_other(config, known, remaining, tied)
    )
    problems = found.problems
    for path in found.modules:
        head = tied.heads.get(known[path].place)
        for module in (path, head) if head else (path,):
            lines = list(find_other_bases(module, known[path], remaining))
            problems += [] if allow_other_base else lines
    others = dict(_read_whole_arrays(places, names, remaining)) | found.biases
    if remaining:
        problems.append(
            f"`names` leads nowhere in `model` for {list_paths(remaining)}. Known to "
            f"`names`: {list_paths(known) or 'nothing'}"
        )
    experts = [
        path for path, counterpart in known.items() if counterpart.layout.is_parameter
    ]
    problems += find_missing(
        config,
        contents,
        modules=[path for path in known if path not in experts],
        parameters=experts,
        arrays=find_modules(places, names),
        adapted=found.adapted,
    )
    if problems:
        raise ValueError(_list_problems(problems))
    if OPTIONS[config["peft_type"]].has_patterns:
        warn_of_unused_patterns(config, found.adapted)
    return Adapter(found.make_weights(), others)


class _Found(NamedTuple):
    """The adapted weights of a file and their biases."""

    make_weights: Callable[[], list[DetachedWeight]]
    modules: Collection[str]
    """The paths of the adapted modules in PyTorch."""
    adapted: list[str]
    """The same, with those of which tensors are lost, and with parameters."""
    biases: dict[tuple[str, ...], Any]
    problems: list[str]


def _read_other(
    config: Mapping[str, Any],
    known: Mapping[str, Counterpart],
    remaining: dict[str, Any],
    tied: Tied,
) -> _Found:
    """The weights of a method beside LoRA and DoRA."""
    kind = config["peft_type"]
    weights, adapted, problems = read_layers(BY_TYPE[kind], config, known, remaining)
    for path in adapted:
        if known[path].place in tied.heads:
            problems.append(f"{path} is in `tied`, which can be with LoRA alone")
    return _Found(lambda: weights, adapted, adapted, {}, problems)


def _read_lora(
    config: Mapping[str, Any],
    places: Places,
    names: Names,
    known: Mapping[str, Counterpart],
    remaining: dict[str, Any],
    order: Sequence[str] | None,
    tied: Tied,
    contents: Contents,
) -> _Found:
    """The weights of LoRA or DoRA."""
    experts = [
        path for path, counterpart in known.items() if counterpart.layout.is_parameter
    ]
    parameters = [x for x in experts if is_parameter_targeted(config, x, experts)]
    check_order(order, parameters)
    prefix_of = {path: f"{path}." for path in known}
    prefix_of |= _find_parameter_prefixes(
        config, {path: known[path] for path in parameters}, remaining, order
    )
    found: dict[Place, dict[Index, Factors]] = {}
    adapted: list[str] = []
    modules: dict[str, Factors] = {}
    problems: list[str] = []
    for path, counterpart in known.items():
        if counterpart.layout.is_parameter and path not in parameters:
            continue
        ends = list_names(config, counterpart.layout)
        keys = [prefix_of[path] + end for end in ends]
        here = [key for key in keys if key in remaining]
        arrays = [np.asarray(remaining.pop(key)) for key in here]
        is_whole = len(here) == len(keys)
        if here and not is_whole:
            problems.append(f"of {path} there is only {', '.join(here)}")
        if here and is_whole:
            factors = read_factors(config, path, counterpart, *arrays)
            found.setdefault(counterpart.place, {})[counterpart.index] = factors
            if not counterpart.layout.is_parameter:
                modules[path] = factors
        if counterpart.place in tied.heads:
            head = tied.heads[counterpart.place]
            pair = arrays if here and is_whole else None
            problems += check_tied_tensors(
                config, path, head, counterpart, pair, remaining
            )
        adapted += [path] * bool(here)
    biases, wrong = read_biases(
        config, places, names, remaining, adapted=modules, whole=contents.whole
    )
    problems += wrong
    tables, lost = read_tokens(config, known, remaining)
    problems += lost
    dropout = float(config.get("lora_dropout", 0.0))
    return _Found(
        lambda: [
            *(join_layers(place, parts, dropout) for place, parts in found.items()),
            *tables,
        ],
        modules,
        adapted,
        biases,
        problems,
    )


def _list_problems(problems: list[str]) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return (
        f"it is not what its configuration and `names` say:{lines}\nIf tensors were "
        "lost, copy or save it again. If the model in PyTorch has no such module, take "
        "it out of `names`, or out of the configuration."
    )


def _find_parameter_prefixes(
    config: Mapping[str, Any],
    counterparts: Mapping[str, Counterpart],
    tensors: Mapping[str, Any],
    order: Sequence[str] | None,
) -> dict[str, str]:
    found: dict[str, str] = {}

    def halves(prefix: str) -> list[np.ndarray]:
        keys = [prefix + name for name in Experts.names]
        return [np.asarray(tensors[key]) for key in keys if key in tensors]

    def fits(path: str, prefix: str) -> bool:
        pair = halves(prefix)
        return len(pair) < 2 or is_possible(config, path, counterparts[path], *pair)

    for paths in group_by_module(counterparts):
        depth = 0
        while halves(make_prefix(paths[0], depth)):
            depth += 1
        if depth:
            found |= make_prefixes(infer_order(paths, depth, fits, order))
    return found


def _read_whole_arrays(
    places: Places, names: Names, remaining: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The paths here and the arrays of modules that were saved whole. Their tensors are
    taken out of `remaining`."""
    for module in places.all:
        torch = find_template(names, module.path) if is_module(module) else None
        if torch is None:
            continue
        arrays = find_own_arrays(module, places)
        keys = {
            array: [f"{p}.{array.path[-1]}" for _, p in expand(torch, array.node.shape)]
            for array in arrays
        }
        every = [key for of_array in keys.values() for key in of_array]
        missing = [key for key in every if key not in remaining]
        if len(missing) == len(every):
            continue
        if missing:
            raise ValueError(f"of {torch} there is no {', '.join(missing[:8])}.")
        for array, of_array in keys.items():
            parts = [np.asarray(remaining.pop(key)) for key in of_array]
            wanted = to_torch_shape(array, array.node.shape[torch.count("{}") :])
            for key, part in zip(of_array, parts):
                if part.shape != wanted:
                    raise ValueError(
                        f"{key} has shape {part.shape}, but {array.dotted} is "
                        f"{wanted} in PyTorch."
                    )
            yield array.path, np.stack(parts).reshape(array.node.shape)

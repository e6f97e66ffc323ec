"""From the tensors and the configuration of PEFT to adapters here."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._adapter import Adapted, Adapter
from .._form import axes_of
from .._tree import Place, Places
from .biases import read_biases
from .config import alpha_of, rank_of
from .homes import Home, homes
from .layout import (
    arrays_of,
    Factors,
    is_module,
    modules_with_arrays,
    prefix_of,
    torch_shape,
    warn_of_convolution,
)
from .names import expanded, few, Index, Names, template
from .promises import (
    broken_promises,
    Contents,
    is_parameter_targeted,
    warn_of_idle_patterns,
)
from .sides import InOut
from .versions import layout_in_file


def adapter_from(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    places: Places,
    names: Names,
    in_out: InOut,
) -> Adapter:
    """What the tensors, named without prefix, are in this model.

    **Raises:**

    `ValueError` if any has no place in it, is misshapen, or lacks its other half.
    """
    if not tensors:
        raise ValueError(
            "there is not one tensor in it. Copy it again or, if PyTorch wrote it so "
            "(with FSDP and DeepSpeed the parts have to be gathered), save it again."
        )
    left = dict(tensors)
    known = dict(homes(places, names, in_out))
    experts = [path for path, home in known.items() if home.layout.is_parameter]
    parameters = [x for x in experts if is_parameter_targeted(config, x, experts)]
    found: dict[Place, dict[Index, Factors]] = {}
    adapted: list[str] = []
    modules: dict[str, Factors] = {}
    problems: list[str] = []
    for path, home in known.items():
        if home.layout.is_parameter and path not in parameters:
            continue
        prefix = prefix_of(path, home.layout, parameters)
        here = [prefix + name for name in home.layout.names if prefix + name in left]
        arrays = [np.asarray(left.pop(name)) for name in here]
        if len(here) == 1:
            problems.append(f"of {path} there is only {here[0]}")
        if len(here) == 2:
            factors = _factors(config, path, home, *arrays)
            found.setdefault(home.place, {})[home.index] = factors
            if not home.layout.is_parameter:
                modules[path] = factors
        adapted += [path] * bool(here)
    contents = Contents(tensors)
    biases, wrong = read_biases(
        config, places, names, left, adapted=modules, whole=contents.whole
    )
    problems += wrong
    others = dict(_whole_arrays(places, names, left)) | biases
    if left:
        problems.append(
            f"`names` leads nowhere in `model` for {few(left)}. Known to `names`: "
            f"{few(known) or 'nothing'}"
        )
    problems += broken_promises(
        config,
        contents,
        modules=[path for path in known if path not in experts],
        parameters=experts,
        arrays=modules_with_arrays(places, names),
        adapted=adapted,
    )
    if problems:
        raise ValueError(_as_lines(problems))
    warn_of_idle_patterns(config, adapted)
    dropout = float(config.get("lora_dropout", 0.0))
    joined = [_joined(place, parts, dropout) for place, parts in found.items()]
    return Adapter(joined, others)


def _as_lines(problems: list[str]) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return (
        f"it is not what its configuration and `names` say:{lines}\nIf tensors were "
        "lost, copy or save it again. If the model in PyTorch has no such module, take "
        "it out of `names`, or out of the configuration."
    )


def _factors(
    config: Mapping[str, Any],
    path: str,
    home: Home,
    first: np.ndarray,
    second: np.ndarray,
) -> Factors:
    warn_of_convolution(home.place)
    layout = layout_in_file(config, path, home, first, second)
    try:
        b, a = layout.from_torch(first, second)
    except ValueError as error:
        raise ValueError(
            f"{path}, of shapes {first.shape} and {second.shape}: {error}."
        ) from error
    rank = layout.torch_rank(b.shape[-1])
    if (b.shape, a.shape) != home.factor_shapes(b.shape[-1]):
        raise ValueError(
            f"{path} has factors {first.shape} and {second.shape}, which do not fit "
            f"the weight {home.shape} at {home.place.dotted}."
        )
    if rank != rank_of(config, path):
        raise ValueError(
            f"{path} has rank {rank}, but {rank_of(config, path)} in the configuration."
        )
    return Factors(b, a, alpha_of(config, path), bool(config.get("use_rslora")), rank)


def _joined(place: Place, parts: Mapping[Index, Factors], dropout: float) -> Adapted:
    """One weight here from the layers that it stacks."""
    depth = len(next(iter(parts)))
    stack = place.node.shape[:depth]
    missing = [index for index in np.ndindex(*stack) if index not in parts]
    if missing:
        raise ValueError(
            f"{place.dotted} stacks {tuple(stack)} layers, and there is no adapter for "
            f"{', '.join(map(str, missing[:8]))}."
        )
    of_stack = [parts[index] for index in np.ndindex(*stack)]
    scales = {(part.alpha, part.rank, part.counted) for part in of_stack}
    if len(scales) > 1:
        raise ValueError(
            f"{place.dotted} stacks layers, which must have one alpha and one rank; "
            f"here there are {sorted((alpha, rank) for alpha, rank, _ in scales)}."
        )
    b, a = (
        np.stack(arrays).reshape(*stack, *arrays[0].shape)
        for arrays in zip(*((part.b, part.a) for part in of_stack))
    )
    rows, columns = axes_of(place)
    part = of_stack[0]
    return Adapted(
        path=place.path,
        method="lora",
        shape=tuple(place.node.shape),
        dtype=jnp.dtype(place.node.dtype).name,
        settings={
            "alpha": part.scaled_for(part.rank, part.rank_stabilised),
            "rows": rows,
            "columns": columns,
            "rank_stabilised": part.rank_stabilised,
        },
        dropout=dropout,
        arrays={"b": b, "a": a},
    )


def _whole_arrays(
    places: Places, names: Names, left: dict[str, Array]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The arrays of modules that were saved whole, taken out of `left`."""
    for module in places.all:
        torch = template(names, module.path) if is_module(module) else None
        if torch is None:
            continue
        arrays = arrays_of(module, places)
        keys = {
            array: [
                f"{p}.{array.path[-1]}" for _, p in expanded(torch, array.node.shape)
            ]
            for array in arrays
        }
        every = [key for of_array in keys.values() for key in of_array]
        missing = [key for key in every if key not in left]
        if len(missing) == len(every):
            continue
        if missing:
            raise ValueError(f"of {torch} there is no {', '.join(missing[:8])}.")
        for array, of_array in keys.items():
            parts = [np.asarray(left.pop(key)) for key in of_array]
            wanted = torch_shape(array, array.node.shape[torch.count("{}") :])
            for key, part in zip(of_array, parts):
                if part.shape != wanted:
                    raise ValueError(
                        f"{key} has shape {part.shape}, but {array.dotted} is "
                        f"{wanted} in PyTorch."
                    )
            yield array.path, np.stack(parts).reshape(array.node.shape)

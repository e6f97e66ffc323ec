"""From the tensors and the configuration of PEFT to adapters here."""

from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._adapter import Adapted, Adapter
from .._fresh import axes_of
from .._tree import Place, Places
from .config import alpha_of, rank_of
from .homes import Home, homes
from .layout import arrays_of, Factors, prefix_of, torch_shape, warn_of_convolution
from .names import expanded, Index, Names, template
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
    left = dict(tensors)
    found_homes = dict(homes(places, names, in_out))
    wanted = config.get("target_parameters") or []
    parameters = [
        path
        for path, home in found_homes.items()
        if home.layout.is_parameter
        and any(f".{path}".endswith(f".{name}") for name in wanted)
    ]
    found: dict[Place, dict[Index, Factors]] = {}
    for path, home in found_homes.items():
        if home.layout.is_parameter and path not in parameters:
            continue
        prefix = prefix_of(path, home.layout, parameters)
        here = [prefix + name for name in home.layout.names if prefix + name in left]
        if len(here) == 1:
            raise ValueError(f"of {path} there is only {here[0]}.")
        if here:
            first, second = (np.asarray(left.pop(name)) for name in here)
            factors = _factors(config, path, home, first, second)
            found.setdefault(home.place, {})[home.index] = factors
    others = dict(_whole_arrays(places, names, left))
    if left:
        listed = ", ".join(list(left)[:8])
        more = f", and {len(left) - 8} more" if len(left) > 8 else ""
        raise ValueError(
            f"`names` leads nowhere in `model` for {listed}{more}. Known to `names`: "
            f"{', '.join(list(found_homes)[:8]) or 'nothing'}."
        )
    dropout = float(config.get("lora_dropout", 0.0))
    adapted = [_joined(place, parts, dropout) for place, parts in found.items()]
    return Adapter(adapted, others)


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
        torch = template(names, module.path) if _is_module(module) else None
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


def _is_module(place: Place) -> bool:
    return isinstance(place.node, eqx.Module) and bool(place.path)

"""The layers of one weight: read from tensors and joined, or split to be written."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapters import DetachedWeight
from ..._modules import infer_axes
from ..._shared import promote
from ..._trees import Place
from ..pytorch import expand, Index, Names, require_template
from ..tensors import choose_part_layout, Counterpart, InOut
from .format import ELSE, Format, Layer


class Found(NamedTuple):
    """The adapted weights of a file."""

    weights: list[DetachedWeight]
    adapted: list[str]
    """The paths of their modules in PyTorch."""
    problems: list[str]


def read_layers(
    format: Format,
    config: Mapping[str, Any],
    known: Mapping[str, Counterpart],
    remaining: dict[str, Any],
) -> Found:
    """The weights of all tensors of a format, which are taken out of the `remaining`
    ones.

    **Arguments:**

    - `known`: The arrays here that can be adapted, by paths in PyTorch.

    **Raises:**

    `ValueError` if tensors do not fit the arrays here.
    """
    shared = _take(remaining, {name: name for name in format.shared})
    parts: dict[Place, dict[Index, Layer]] = {}
    adapted: list[str] = []
    problems: list[str] = []
    for path, counterpart in known.items():
        keys = {name: f"{path}.{name}" for name in format.names}
        tensors = _take(remaining, keys)
        if not tensors:
            continue
        adapted.append(path)
        wanted = format.list_wanted(tensors)
        if lost := set(wanted) - set(tensors):
            problems.append(f"of {path} there is no {', '.join(sorted(lost))}")
            continue
        problem = format.refuse(counterpart)
        if extra := set(tensors) - set(wanted):
            problem = f"{', '.join(sorted(extra))} cannot be read here: {_MERGE}"
        try:
            if problem := problem or _find_open_order(config, counterpart):
                raise ValueError(problem)
            layer = format.read(config, path, counterpart, tensors, shared)
        except ValueError as error:
            hint = f" {_NAME_IT}" if counterpart.is_order_open else ""
            raise ValueError(f"{path}: {error}.{hint}") from error
        parts.setdefault(counterpart.place, {})[counterpart.index] = layer
    if left := [f"`{x}={config[x]}`" for x in format.untrained if config.get(x)]:
        warnings.warn(
            f"{' and '.join(left)} of {format.peft_type} are not here. They only "
            "matter for further training, which goes on without.",
            stacklevel=5,
        )
    dropout = float(config.get(format.options.dropout or "", 0.0))
    joined = [_join(format, place, x, dropout) for place, x in parts.items()]
    return Found(joined, adapted, problems)


_NAME_IT = (
    "If it is stored `(..., in, out)` here, name it in `transposed`; `transposed=[]` "
    "says that nothing is."
)


def _find_open_order(config: Mapping[str, Any], counterpart: Counterpart) -> str | None:
    """What is unknown of a square array that PyTorch stores `(in, out)`: whether it is
    stored so here."""
    is_square = len(set(counterpart.shape)) == 1
    if config.get("fan_in_fan_out") and counterpart.is_order_open and is_square:
        return (
            "it is stored `(in, out)` in PyTorch (`fan_in_fan_out`), and whether "
            f"{counterpart.dotted} {counterpart.shape} is so too cannot be seen"
        )
    return None


_MERGE = "merge it in PyTorch, by `merge_and_unload()`, and load the merged weights"


def _take(remaining: dict[str, Any], keys: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(remaining.pop(key))
        for name, key in keys.items()
        if key in remaining
    }


def _join(
    format: Format, place: Place, parts: Mapping[Index, Layer], dropout: float
) -> DetachedWeight:
    """One weight here from the layers that it stacks. Those without an adapter get
    arrays that add nothing."""
    stack = place.node.shape[: len(next(iter(parts)))]
    rows, columns = infer_axes(place)
    like = max(parts.values(), key=lambda x: sum(y.size for y in x.arrays.values()))
    matched = {index: format.match(like, layer) for index, layer in parts.items()}
    every = [
        matched[index].arrays if index in parts else format.fill(like)
        for index in np.ndindex(*stack)
    ]
    arrays = {
        name: np.stack(
            [x[name].astype(promote(*(y[name].dtype for y in every))) for x in every]
        ).reshape(*stack, *like.arrays[name].shape)
        for name in like.arrays
    }
    settings = {"rows": rows, "columns": columns, **like.settings}
    settings |= {x: None for x in format.weight.axes if x not in arrays}
    return DetachedWeight(
        path=place.path,
        method=format.weight.method,
        shape=tuple(place.node.shape),
        dtype=jnp.dtype(place.node.dtype).name,
        settings=settings,
        dropout=dropout,
        arrays=arrays,
    )


def split_layers(
    format: Format, place: Place, names: Names, in_out: InOut
) -> Iterator[tuple[str, Layer]]:
    """The paths in PyTorch and the layers of the weight at `place`.

    **Raises:**

    `ValueError` if PEFT has no form for it.
    """
    weight = place.node
    if (weight.rows, weight.columns) != infer_axes(place):
        raise ValueError(
            f"{place.dotted} has the axes {weight.rows} and {weight.columns} for rows "
            f"and columns, which PEFT has not. {ELSE}."
        )
    torch = require_template(place, names)
    batch = weight.batch_shape
    layout = choose_part_layout(place, torch, batch, place in in_out)
    fields = list(weight.array_axes())
    arrays = jax.device_get({name: getattr(weight, name) for name in fields})
    settings = {
        name: getattr(weight, name)
        for name in vars(weight)
        if name not in ("w", "rows", "columns", *format.weight.axes)
    }
    for index, path in expand(torch, batch):
        counterpart = Counterpart(place, index, layout, False)
        problem = format.refuse(counterpart)
        if layout.is_parameter:
            problem = f"PEFT has no {format.weight.method!r} of parameters"
        if problem:
            raise ValueError(f"{place.dotted}: {problem}. {ELSE}.")
        here = {name: np.asarray(x)[index] for name, x in arrays.items()}
        yield path, Layer(counterpart, here, settings)

"""Several adapters of one model beside each other, place by place."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.lax as lax
import numpy as np
from jaxtyping import Array, ArrayLike, Num

from .._layers import is_layer, replace_fields
from .._methods import (
    base_of,
    FactoredWeight,
    is_missing,
    is_weight,
    LoraWeight,
    unfuse,
)
from .._shared import as_array
from .._trees import flatten_one_level, Place, Places, rebuild


Path = tuple[str, ...]
# A number for each adapter.
Weights: TypeAlias = Sequence[ArrayLike] | Num[Array | np.ndarray, " adapters"]


@dataclasses.dataclass(frozen=True)
class Column:
    """What several adapters have at one place."""

    place: Place
    """In the tree that has everything that any of them has."""

    nodes: list[Any]
    """The weight or array of each, or `None`."""

    @property
    def is_factored(self) -> bool:
        return is_weight(self.place.node)

    @property
    def first(self) -> Any:
        return next(node for node in self.nodes if node is not None)


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Several adapters, column by column."""

    union: Any
    """A tree with all that any of them has."""

    columns: list[Column]

    def filled(self, new: Sequence[Any]) -> Any:
        """An adapter with these weights and arrays, one for each column."""
        edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
            column.place.indices: lambda _, value=value: value
            for column, value in zip(self.columns, new, strict=True)
        }
        return rebuild(self.union, edits)


def align(adapters: Sequence[Any], name: str) -> Aligned:
    """The adapters, `None` for one that does nothing, whose ranks and targets may
    differ; `name` is the function that was called.

    **Raises:**

    `ValueError` if they are not of one model, or if one has factors where another has
    an array of its own.
    """
    given = {i: adapter for i, adapter in enumerate(adapters) if adapter is not None}
    union = unite_trees([*given.values()])
    places = [place for place in Places(union).all if place.is_array]
    if not any(is_weight(place.node) for place in places):
        raise ValueError(
            f"There is no adapter in what was passed to `{name}`. Pass the `params` of "
            "`lorax.partition`."
        )
    found = {i: _find_arrays(adapter) for i, adapter in given.items()}
    columns = []
    for place in places:
        nodes = [found.get(i, {}).get(place.path) for i in range(len(adapters))]
        if is_weight(place.node):
            nodes = [_find_update(place, node) for node in nodes]
        if any(node is not None for node in nodes):
            _check_alike(place, nodes)
            columns.append(Column(place, nodes))
    return Aligned(union, columns)


def unite_trees(nodes: Sequence[Any], path: Path = ()) -> Any:
    """A tree with everything that any of the trees has. An array that is adapted in one
    of them is adapted in it; the rest is taken from the first tree that has it."""
    nodes = [node for node in nodes if node is not None]
    weights = [node for node in nodes if is_weight(node)]
    layers = [node for node in nodes if is_layer(node)]
    if len(nodes) <= 1 or weights:
        return next(iter(weights or nodes), None)
    if layers:
        wrapped = [node.wrapped if is_layer(node) else node for node in nodes]
        return replace_fields(layers[0], wrapped=unite_trees(wrapped, path))
    levels = [level for level in map(flatten_one_level, nodes) if level is not None]
    if len(levels) < len(nodes):
        return nodes[0]
    names = [[name for name, _ in named] for named, _ in levels]
    for other in names[1:]:
        if other != names[0]:
            raise ValueError(
                "The adapters are of different models: at "
                f"{'.'.join(path) or 'the root'} one has {', '.join(names[0])} and "
                f"another {', '.join(other)}."
            )
    below = [
        unite_trees([named[i][1] for named, _ in levels], (*path, name))
        for i, name in enumerate(names[0])
    ]
    return levels[0][1].unflatten(below)


def _find_arrays(adapter: Any) -> dict[Path, Any]:
    return {p.path: p.node for p in Places(adapter).all if p.is_array}


def find_base_arrays(base: Any) -> Mapping[Path, Any]:
    """The arrays of a model by path, without adapters. `None` has none."""
    return {path: base_of(node) for path, node in _find_arrays(base).items()}


def find_base_array(column: Column, base: Mapping[Path, Any], name: str) -> Any:
    """The base's own array where an adapter has none.

    **Raises:**

    `ValueError` if it is not known, or of another shape.
    """
    place = column.place
    array = base.get(place.path)
    if array is None:
        why = "is not in `base`" if base else f"is not known to `{name}`"
        raise ValueError(
            f"{place.dotted} was trained too, but not in all adapters, and what it is "
            f"in the base {why}. Pass the model without adapters, `base=model`."
        )
    if array.shape != column.first.shape:
        raise ValueError(
            f"{place.dotted} has shape {array.shape} in `base` and "
            f"{column.first.shape} in the adapters. Pass the model they were made for."
        )
    return array


def _find_update(place: Place, node: Any) -> Any:
    if node is None:
        return None
    if not is_weight(node):
        # In a whole model where this is no target it is the base.
        return None if not is_missing(place.node.w) else node
    if not jax.tree.leaves(node):
        # It is not in the `params`.
        return None
    weight = unfuse(node)
    if isinstance(weight, LoraWeight):
        return weight
    if isinstance(weight, FactoredWeight):
        return LoraWeight.from_factored(weight.form)
    # Those of another method have factors only together with their frozen part, and
    # some have a gain.
    if is_missing(weight.w):
        # Of some the base may be quantised, which its structure still tells.
        w = unfuse(place.node).w
        is_same = is_weight(w) or is_weight(weight.w) or not is_missing(w)
        return weight if is_same else weight.with_base(w)
    if (form := weight.factored()).gain is not None:
        return weight
    return LoraWeight.from_factored(form)


def _check_alike(place: Place, nodes: Sequence[Any]) -> None:
    there = [(i, node) for i, node in enumerate(nodes) if node is not None]
    first, node = there[0]
    for i, other in there[1:]:
        wrong = _find_mismatch(node, other)
        if wrong:
            raise ValueError(
                f"{place.dotted} differs in {wrong} between the adapters {first} and "
                f"{i}."
            )


def _find_mismatch(x: Any, y: Any) -> str | None:
    if is_weight(x) != is_weight(y):
        return "kind, factors and a whole array,"
    if not is_weight(x):
        return None if x.shape == y.shape else f"shape, {x.shape} and {y.shape},"
    if type(x) is not type(y):
        return f"method, {type(x).__name__} and {type(y).__name__},"
    if not isinstance(x, LoraWeight):
        shapes = [jax.tree.map(lambda leaf: leaf.shape, z) for z in (x, y)]
        return None if shapes[0] == shapes[1] else "shape or settings"
    if (x.rows, x.columns) != (y.rows, y.columns):
        return "rows and columns"
    without_rank = [(z.b.shape[:-1], _shape_without_rank(z)) for z in (x, y)]
    return None if without_rank[0] == without_rank[1] else "shape"


def _shape_without_rank(weight: LoraWeight) -> tuple[int, ...]:
    axis = find_rank_axis(weight)
    return (*weight.a.shape[:axis], *weight.a.shape[axis + 1 :])


def find_rank_axis(weight: LoraWeight) -> int:
    """The axis of `a` that is the rank."""
    return weight.a.ndim - 1 - len(weight.columns)


def rescale_like(first: LoraWeight, weight: LoraWeight, scale: ArrayLike) -> LoraWeight:
    """`scale * (b · a)` with the static fields of `first`, so that it fits the same
    frozen model. The ratio of the scales goes into `b`, which is rounded once."""
    new = first.replace(b=weight.b, a=weight.a)
    factor = scale / new.scale
    if isinstance(factor, float) and factor == 1:
        return new
    return new.scaled(factor)


def share_rank(column: Column) -> list[LoraWeight | None]:
    """The weights, padded to the largest rank, with the scale of the first one at that
    rank."""
    weights = [weight for weight in column.nodes if weight is not None]
    rank = max(weight.rank for weight in weights)
    if len({(weight.b.dtype, weight.a.dtype) for weight in weights}) > 1:
        raise ValueError(
            f"{column.place.dotted} has factors of several dtypes: cast them to one."
        )
    return [
        None
        if weight is None
        else rescale_like(weights[0], _pad_rank(weight, rank), weight.scale)
        for weight in column.nodes
    ]


def _pad_rank(weight: LoraWeight, rank: int) -> LoraWeight:
    more = rank - weight.rank
    if not more:
        return weight
    axis = find_rank_axis(weight)
    b, a = weight.b, weight.a
    return weight.replace(b=_pad_axis(b, b.ndim - 1, more), a=_pad_axis(a, axis, more))


def _pad_axis(x: Array, axis: int, more: int) -> Array:
    padding = [(0, more if i == axis else 0, 0) for i in range(x.ndim)]
    return lax.pad(x, as_array(0, x.dtype), padding)

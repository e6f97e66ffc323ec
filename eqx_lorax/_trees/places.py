"""Models as trees of places, and the replacement of nodes.

Trees are flattened by JAX, one level at a time. In this way containers,
`jax.tree_util.Partial` and bound methods are entered too, which attribute paths would
not reach.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._factored import stands_for_array
from .._layers import is_layer
from .._shared import is_array


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A node of a model, with its path.

    An adapted layer and the module inside it are one place, so that adaptation changes
    no paths. Their `indices` differ.
    """

    path: tuple[str, ...]
    """The names on the way from the root."""

    indices: tuple[int, ...]
    """The index of each child on the way from the root."""

    node: Any
    """The node. An adapted layer is the layer itself."""

    owner: "Place | None"
    """The place of the innermost module around it."""

    @property
    def module(self) -> Any:
        """The node. An adapted layer is the module that it stands for."""
        return self.node.wrapped if is_layer(self.node) else self.node

    @property
    def is_array(self) -> bool:
        """Whether there is an array here, or what stands for one."""
        return stands_for_array(self.node) or is_array(self.node)

    @property
    def dotted(self) -> str:
        """The path as filters and messages have it."""
        return ".".join(self.path) or "<the model itself>"

    def holds(self, other: "Place") -> bool:
        """Whether `other` is this place or beneath it."""
        return other.indices[: len(self.indices)] == self.indices


def join_path(path: Sequence[str]) -> str:
    """The path as one string, which no other path has: dots inside names are
    escaped."""
    return ".".join(name.replace("\\", r"\\").replace(".", r"\.") for name in path)


def flatten_one_level(node: Any) -> tuple[list[tuple[str, Any]], Any] | None:
    """The named children of `node`, and the treedef to put it together again; `None`
    for leaves. What stands for an array, such as a weight, counts as a leaf."""
    if stands_for_array(node) or node is None:
        return None
    keyed, treedef = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if keyed and not keyed[0][0]:
        return None
    return [(_name(key), child) for (key,), child in keyed], treedef


def _walk(model: Any) -> Iterator[Place]:
    def visit(place: Place) -> Iterator[Place]:
        yield place
        yield from beneath(place, place.node, place.indices)

    def beneath(place: Place, node: Any, indices: tuple[int, ...]) -> Iterator[Place]:
        level = flatten_one_level(node)
        if level is None:
            return
        owner = place if _is_module(place.node) else place.owner
        for step, (name, child) in enumerate(level[0]):
            below = (*indices, step)
            if child is None:
                continue
            if is_layer(node):
                # The layer's other fields, such as dropout, are not the model's.
                if child is node.wrapped:
                    yield from beneath(place, child, below)
            else:
                yield from visit(Place((*place.path, name), below, child, owner))

    yield from visit(Place((), (), model, None))


class Places:
    """All places of a model, each before those beneath it."""

    def __init__(self, model: Any):
        self.all = list(_walk(model))
        self._index = {place: i for i, place in enumerate(self.all)}

    @property
    def root(self) -> Place:
        return self.all[0]

    def beneath(self, place: Place) -> Iterator[Place]:
        """`place`, and all places beneath it."""
        rest = itertools.islice(self.all, self._index[place], None)
        return itertools.takewhile(place.holds, rest)


def rebuild(model: Any, edits: Mapping[tuple[int, ...], Callable[[Any], Any]]) -> Any:
    """`model` with each edit applied to the node at its indices, innermost first. A
    node that is not on the way to an edit remains the same object."""
    on_the_way = {indices[:i] for indices in edits for i in range(len(indices))}

    def visit(node: Any, indices: tuple[int, ...]) -> Any:
        if indices in on_the_way:
            level = flatten_one_level(node)
            assert level is not None
            named, treedef = level
            node = treedef.unflatten(
                [visit(child, (*indices, i)) for i, (_, child) in enumerate(named)]
            )
        return edits[indices](node) if indices in edits else node

    return visit(model, ())


def _is_module(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _name(key: Any) -> str:
    match key:
        case jtu.GetAttrKey(name=name):
            return name
        case jtu.SequenceKey(idx=index):
            return str(index)
        case jtu.DictKey(key=name) | jtu.FlattenedIndexKey(key=name):
            return str(name)
    return str(key).strip(".[]'\"")

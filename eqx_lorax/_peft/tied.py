"""Tied embeddings: tables of words that are heads too.

PEFT adapts modules, not the array that two modules share. With tied embeddings it
adapts the lookup alone, and the head goes on with the base. Here the array is adapted,
and so everything that reads it. Both compute the same if the head has the same adapter
in PEFT, which its option `ensure_weight_tying` makes.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._adapters import Adapter
from .._methods import is_weight
from .._trees import Place, Places
from .config import find_alpha, find_rank
from .pytorch import path_in_names
from .tensors import Counterpart, Embedding, Layout, Linear


@dataclasses.dataclass(frozen=True)
class Tied:
    """The tables here that two modules of PyTorch read."""

    heads: Mapping[Place, str]
    """The path in PyTorch of the second module."""
    is_stated: bool
    """Whether the user named these tables, be it an empty mapping."""


def find_tied_tables(places: Places, tied: Mapping[str, str] | None) -> Tied:
    """The tables that `tied` names, a mapping from paths here to paths in PyTorch.

    **Raises:**

    `ValueError` if a path is neither that of an array nor that of a module with a
    weight.
    """
    heads: dict[Place, str] = {}
    for path, head in (tied or {}).items():
        found = [
            place
            for place in places.all
            if place.is_array and path in (place.dotted, ".".join(path_in_names(place)))
        ]
        if not found:
            raise ValueError(
                f"`tied` has {path!r}, which is the path of no array in `model`, and "
                "of no module with a `weight`."
            )
        heads[found[0]] = head
    return Tied(heads, tied is not None)


def check_ties(
    places: Places, adapter: Adapter, tied: Tied, task_type: str | None
) -> None:
    """Checks that PEFT can say what shares the arrays of an adapter. Warns if an array
    may be read by another module, which cannot be seen here.

    **Raises:**

    `ValueError` if an array of the adapter is read by several modules and `tied` does
    not say so.
    """
    shared = _find_shared_arrays(places)
    by_path = {place.path: place for place in places.all}
    for place in (by_path[path] for path in adapter.others):
        if place in tied.heads or any(place.node is array for array in shared):
            raise ValueError(
                f"{place.dotted} is trained as it is and has more than one reader; "
                "PEFT trains it for one of them. Train an adapter of it, or untie it: "
                "give the other reader a copy of the array."
            )
    for place in (by_path[adapted.path] for adapted in adapter.weights):
        if place in tied.heads:
            continue
        path = ".".join(path_in_names(place))
        if any(place.node is array for array in shared):
            raise ValueError(
                f"{path} is shared by `eqx.nn.Shared`, and with it its adapter. "
                f"{_explain(path)}"
            )
        if tied.is_stated or not _is_table(place):
            continue
        entries = place.node.shape[-2]
        others = (x for x in places.all if x.is_array and x is not place)
        if any(entries in x.node.shape for x in others):
            continue
        message = (
            f"{path} has an adapter, and nothing else in `model` has its {entries} "
            f"entries. If it is the head as well (`x @ {path}.weight.T`), the head has "
            f"its update too. {_explain(path)} If it is no head, say so with "
            "`tied={}`."
        )
        if task_type in _WITH_A_HEAD:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)


_WITH_A_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _explain(path: str) -> str:
    return (
        "PEFT adapts modules, one by one, and of a tied model the others go on with "
        f"the base. Pass `tied={{{path!r}: ...}}` with the path of the other module in "
        "PyTorch, which then has the same adapter (`ensure_weight_tying`), or untie "
        "them here: give the head a copy of the array."
    )


def _is_table(place: Place) -> bool:
    return place.owner is not None and isinstance(place.owner.module, eqx.nn.Embedding)


def swap_for_head(
    layout: Layout, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`(A, B)` of the head for the two tensors of the table, an embedding or a linear
    layer."""
    return (second.T, first.T) if isinstance(layout, Embedding) else (first, second)


DORA_OF_TIED = (
    "Its magnitude is that of the outputs, which are the entries in a head and not in "
    "an embedding, so that no DoRA of both is one of the table that they share. Untie "
    "them here: give the head a copy of the array"
)


def check_tied_tensors(
    config: Mapping[str, Any],
    path: str,
    head: str,
    counterpart: Counterpart,
    pair: Sequence[np.ndarray] | None,
    remaining: dict[str, Any],
) -> Iterator[str]:
    """Takes the tensors of the head at `head` out of the `remaining` ones, and yields a
    line for each way in which they differ from those of the table at `path`, which are
    `pair`."""
    keys = [f"{head}.{name}" for name in Linear.names]
    of_head = [np.asarray(remaining.pop(key)) for key in keys if key in remaining]
    if not of_head and pair is None:
        return
    if config.get("use_dora"):
        yield f"{path} and {head} have DoRA. {DORA_OF_TIED}"
        return
    fix = (
        f"Here both read {counterpart.dotted}. Train it with `ensure_weight_tying` "
        "in PEFT, or untie them here: give the head a copy of the array"
    )
    if pair is None or len(of_head) < 2:
        only = head if pair is None else path
        other = path if pair is None else head
        yield f"PEFT has adapted {only} and not {other}. {fix}"
        return
    same = all(
        np.array_equal(x, y)
        for x, y in zip(of_head, swap_for_head(counterpart.layout, *pair))
    )
    scales = {(find_alpha(config, x), find_rank(config, x)) for x in (path, head)}
    if not same or len(scales) > 1:
        yield f"{path} and {head} have adapters that differ. {fix}"


def _find_shared_arrays(places: Places) -> list[Any]:
    """The arrays that `eqx.nn.Shared` puts into several places."""
    found: list[Any] = []
    for place in places.all:
        if type(place.node) is eqx.nn.Shared:
            found += jax.tree.leaves(
                place.node.get(place.node.pytree), is_leaf=is_weight
            )
    return found

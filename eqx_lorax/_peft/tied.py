"""Tables of words that are heads too.

PEFT adapts a module and never the array that two modules share: of a model with tied
embeddings it adapts the lookup alone, and the head goes on with the base. Here the
array is adapted, and with it everything that reads it. The two agree where the head has
an adapter there too, of the same numbers, which `ensure_weight_tying` makes.
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
from .config import alpha_of, rank_of
from .pytorch import named
from .tensors import Embedding, Home, Layout, Linear


@dataclasses.dataclass(frozen=True)
class Tied:
    """The tables here that another module of PyTorch reads too."""

    heads: Mapping[Place, str]
    """The path in PyTorch of that module."""
    is_stated: bool
    """Whether these were named, be they none."""


def tied_tables(places: Places, tied: Mapping[str, str] | None) -> Tied:
    """What `tied`, from paths here to paths in PyTorch, names.

    **Raises:**

    `ValueError` if a path is that of no array, and no module with a weight.
    """
    heads: dict[Place, str] = {}
    for path, head in (tied or {}).items():
        found = [
            place
            for place in places.all
            if place.is_array and path in (place.dotted, ".".join(named(place)))
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
    """**Raises:**

    `ValueError` if anything of the adapter is read in several places and `tied` does
    not say so. A `UserWarning` if that may be.
    """
    shared = _shared_arrays(places)
    by_path = {place.path: place for place in places.all}
    for place in (by_path[path] for path in adapter.others):
        if place in tied.heads or any(place.node is array for array in shared):
            raise ValueError(
                f"{place.dotted} is trained as it is and has more than one reader, of "
                "which PEFT trains one. Train an adapter of it, or untie it: give the "
                "other reader a copy of the array."
            )
    for place in (by_path[adapted.path] for adapted in adapter.weights):
        if place in tied.heads:
            continue
        path = ".".join(named(place))
        if any(place.node is array for array in shared):
            raise ValueError(
                f"{path} is shared by `eqx.nn.Shared`, and with it its adapter. "
                f"{_explained(path)}"
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
            f"its update too. {_explained(path)} If it is no head, say so with "
            "`tied={}`."
        )
        if task_type in _WITH_A_HEAD:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)


_WITH_A_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def _explained(path: str) -> str:
    return (
        "PEFT adapts modules, one by one, and of a tied model the others go on with "
        f"the base. Pass `tied={{{path!r}: ...}}` with the path of the other module in "
        "PyTorch, which then has the same adapter (`ensure_weight_tying`), or untie "
        "them here: give the head a copy of the array."
    )


def _is_table(place: Place) -> bool:
    return place.owner is not None and isinstance(place.owner.module, eqx.nn.Embedding)


def tied_pair(
    layout: Layout, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`(A, B)` of the linear layer that reads what these two are of."""
    return (second.T, first.T) if isinstance(layout, Embedding) else (first, second)


def check_tied_tensors(
    config: Mapping[str, Any],
    path: str,
    head: str,
    home: Home,
    pair: Sequence[np.ndarray] | None,
    left: dict[str, Any],
) -> Iterator[str]:
    """Takes what the head at `head` has out of `left`; in what it differs from the
    table at `path`, whose tensors are `pair`."""
    keys = [f"{head}.{name}" for name in Linear.names]
    of_head = [np.asarray(left.pop(key)) for key in keys if key in left]
    if not of_head and pair is None:
        return
    fix = (
        f"Here both read {home.place.dotted}. Train it with `ensure_weight_tying` in "
        "PEFT, or untie them here: give the head a copy of the array"
    )
    if pair is None or len(of_head) < 2:
        only = head if pair is None else path
        other = path if pair is None else head
        yield f"PEFT has adapted {only} and not {other}. {fix}"
        return
    same = all(
        np.array_equal(x, y) for x, y in zip(of_head, tied_pair(home.layout, *pair))
    )
    scales = {(alpha_of(config, x), rank_of(config, x)) for x in (path, head)}
    if not same or len(scales) > 1:
        yield f"{path} and {head} have adapters that differ. {fix}"


def _shared_arrays(places: Places) -> list[Any]:
    """What `eqx.nn.Shared` puts elsewhere too."""
    found: list[Any] = []
    for place in places.all:
        if type(place.node) is eqx.nn.Shared:
            found += jax.tree.leaves(
                place.node.get(place.node.pytree), is_leaf=is_weight
            )
    return found

"""Trained rows of a table: PEFT's option `trainable_token_indices`.

PEFT has the new rows themselves, and a weight here what is added to the old ones.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import DetachedWeight
from .._methods import TokensWeight
from .._modules import infer_axes
from .._shared import accumulation_dtype, promote, replicate
from .._trees import Place
from .config import is_named_alone
from .pytorch import expand, Names, require_template
from .tensors import Counterpart


_ROWS = "token_adapter.trainable_tokens_delta"


def write_tokens(
    place: Place, names: Names, modules: Collection[str]
) -> Iterator[tuple[str, list[int], np.ndarray]]:
    """The path in PyTorch, the indices and the new rows of the table at `place`, or of
    each table of a stack.

    **Arguments:**

    - `modules`: The paths of all modules of the model that are known.

    **Raises:**

    `ValueError` if it is no embedding, or if PEFT cannot name it alone.
    """
    weight = place.node
    _check_table(place)
    torch = require_template(place, names)
    indices = list(weight.indices)
    table, delta = (
        np.asarray(jax.device_get(replicate(x))) for x in (weight.w, weight.delta)
    )
    for index, path in expand(torch, table.shape):
        if not is_named_alone(path, modules, ()):
            raise ValueError(
                f"PEFT takes a key of `trainable_token_indices` for the end of any "
                f"path, and cannot name {path} alone. Give the module in PyTorch a "
                "longer name, or save it with `lorax.save_adapter`."
            )
        rows = table[index][indices]
        new = rows.astype(accumulation_dtype(delta.dtype)) + delta[index]
        yield path, indices, new.astype(promote(table.dtype, delta.dtype))


def name_rows(path: str) -> str:
    """The name of the tensor with the new rows of the table at `path`."""
    return f"{path}.{_ROWS}"


def read_tokens(
    config: Mapping[str, Any],
    known: Mapping[str, Counterpart],
    remaining: dict[str, Any],
) -> tuple[list[DetachedWeight], list[str]]:
    """The weights of all tables with new rows, and a line for each problem. Their
    tensors are taken out of the `remaining` ones.

    **Raises:**

    `ValueError` if new rows do not fit the table here.
    """
    option = config.get("trainable_token_indices")
    # A list is for the embedding of the model, which only its code names.
    entries = option if isinstance(option, Mapping) else {"": option} if option else {}
    used: set[str] = set()
    weights: list[DetachedWeight] = []
    for path, counterpart in known.items():
        if name_rows(path) not in remaining:
            continue
        # As PEFT does, by the last characters.
        entry = next((x for x in entries if path.endswith(x)), None)
        if entry is None:
            continue
        used.add(entry)
        rows = np.asarray(remaining.pop(name_rows(path)))
        weights.append(_read_table(path, counterpart, entries[entry], rows))
    lost = [entry for entry in entries if entry not in used and entries[entry]]
    return weights, [
        f"`trainable_token_indices` has {entry or entries[entry]!r}, for which there "
        "is no tensor"
        for entry in lost
    ]


def _read_table(
    path: str, counterpart: Counterpart, indices: Any, rows: np.ndarray
) -> DetachedWeight:
    place = counterpart.place
    _check_table(place)
    if counterpart.index:
        raise ValueError(
            f"{path} has trained rows, and {place.dotted} is a stack of tables. Make a "
            "list of tables of the stack."
        )
    entries, size = counterpart.shape
    is_list = isinstance(indices, list) and all(type(x) is int for x in indices)
    if not is_list or not all(0 <= x < entries for x in indices):
        raise ValueError(
            f"`trainable_token_indices` has {indices!r} for {path}, where a list of "
            f"numbers from 0 to {entries - 1} belongs. If the table in PyTorch was "
            "made larger, make that of `model` as large."
        )
    if rows.shape != (len(indices), size):
        raise ValueError(
            f"{name_rows(path)} has shape {rows.shape}, and for {place.dotted} it is "
            f"{(len(indices), size)}. The file is for a model with other sizes, or "
            "`names` leads to another layer."
        )
    old = np.asarray(jax.device_get(replicate(place.node)))[indices]
    wide = accumulation_dtype(promote(rows.dtype, old.dtype))
    axes = infer_axes(place)
    return DetachedWeight(
        path=place.path,
        method=TokensWeight.method,
        shape=tuple(place.node.shape),
        dtype=jnp.dtype(place.node.dtype).name,
        settings={"indices": tuple(indices), "rows": axes[0], "columns": axes[1]},
        dropout=0.0,
        arrays={"delta": (rows.astype(wide) - old).astype(rows.dtype)},
    )


def _check_table(place: Place) -> None:
    if place.owner is None or not isinstance(place.owner.module, eqx.nn.Embedding):
        raise ValueError(
            f"{place.dotted} has trained rows and is no embedding, which PEFT trains "
            "alone so. Save it with `lorax.save_adapter`."
        )

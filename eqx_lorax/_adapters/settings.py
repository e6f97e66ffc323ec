"""The static settings of adapted weights, which are in no array: scales, the axes of
factors, dropout. A checkpoint has them, so that a run does not go on with others
unnoticed."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.tree_util as jtu
import numpy as np

from .._layers import is_layer
from .._methods import AbstractLoraWeight, FactoredWeight, is_weight, unfuse
from .._shared import is_array, list_some
from .._trees import join_path, Places
from .fingerprint import fingerprint


def collect_state_settings(state: Any) -> dict[str, Any]:
    """The settings of the weights in the state of a run, by name."""
    return {
        f"state{jtu.keystr(path)}": _collect_static(node)
        for path, node in jtu.tree_leaves_with_path(state, is_leaf=is_weight)
        if is_weight(node)
    }


def collect_frozen_settings(frozen: Any) -> dict[str, Any]:
    """The settings of the weights, and of the layers around them, in the frozen part of
    a model, by path. For weights this has fingerprints of what is frozen besides the
    base."""
    found: dict[str, Any] = {}
    for place in Places(frozen).all:
        node = place.node
        if is_weight(node):
            others = {name: getattr(node, name) for name in node.frozen if name != "w"}
            found[join_path(place.path)] = _collect_static(node) | {
                name: fingerprint(x) for name, x in others.items() if is_array(x)
            }
        elif is_layer(node) and node.has_dropout:
            rate = 0.0 if node.dropout is None else float(node.dropout.p)
            found[join_path(place.path)] = {"dropout": rate}
    return found


def find_changes(written: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each change between two collections of settings, with the places that
    have it: often all weights do, and the state of the optimizer too."""
    where: dict[str, list[str]] = {}
    for name in (name for name in found if name in written):
        old, new = written[name], found[name]
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                change = f"`{key}` was {old.get(key)!r} and is {new.get(key)!r}"
                where.setdefault(change, []).append(name)
    for change, names in where.items():
        yield f"{change} at {list_some(names, 4)}"


def _collect_static(weight: AbstractLoraWeight) -> dict[str, Any]:
    # What says how to multiply, and not with what, is left out.
    weight = unfuse(weight)
    if isinstance(weight, FactoredWeight):
        return _collect_form(weight)
    fields = {
        field.name: _to_plain(getattr(weight, field.name))
        for field in dataclasses.fields(weight)
        if field.metadata.get("static", False)
    }
    below = {"below": _collect_static(weight.w)} if is_weight(weight.w) else {}
    return {"kind": type(weight).__name__, **fields, **below}


def _collect_form(weight: FactoredWeight) -> dict[str, Any]:
    """As of a `LoraWeight` with these settings, where there are any of that name."""
    form = weight.form
    fields = {name: _to_plain(getattr(form, name)) for name in ("rows", "columns")}
    order = _to_plain(form.permutation)
    below = {"below": _collect_static(weight.w)} if is_weight(weight.w) else {}
    return {
        "kind": "LoraWeight",
        "scale": form.scale,
        "order": order,
        **fields,
        **below,
    }


def _to_plain(x: Any) -> Any:
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, list | tuple):
        return [_to_plain(y) for y in x]
    if x is None or isinstance(x, bool | int | float | str):
        return x
    return re.sub(" at 0x[0-9a-f]+", "", repr(x))

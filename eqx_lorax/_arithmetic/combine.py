"""Putting together what `lorax.partition` took apart."""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np

from .._factored import stands_for_array
from .._layers import is_layer
from .._methods import (
    base_of,
    FactoredWeight,
    find_misfits,
    is_missing,
    is_weight,
    list_missing,
    LoraWeight,
)
from .._shared import is_array, list_some
from .._trees import flatten_one_level


_Model = TypeVar("_Model")
_MEANT = (
    "Pass the two results of one `lorax.partition`. To put an adapter into another "
    "model of the same base, call `lorax.attach(model, params)`."
)


def combine(params: _Model, frozen: _Model) -> _Model:
    """The model that `lorax.partition` split into `(params, frozen)`.

    This is `equinox.combine`, and says so if the two do not belong together.

    !!! example

        ```python
        params, frozen = lorax.partition(model)
        model = lorax.combine(params, frozen)
        ```

    **Arguments:**

    - `params`: What is trained: the adapter. Any other adapter with the same targets
        and static settings, such as alpha, will do, of any rank.
    - `frozen`: The rest.

    **Returns:**

    The model: its arrays are the very same.

    **Raises:**

    `ValueError` or `TypeError`, with the paths, if the two are of different structure
    or have different settings, if an array is in both, or in neither, or if factors do
    not have the shapes that go with their base.
    """
    params = _match_bases(params, frozen)
    frozen = _match_kinds(params, frozen)
    new, structure = jax.tree.flatten(params, is_leaf=_is_none)
    old, there = jax.tree.flatten(frozen, is_leaf=_is_none)
    if structure != there:
        _check_call(params, frozen)
        found = list(_differences(params, frozen, ()))
        raise ValueError(_message("do not belong together", found))
    if any(x is not None and y is not None for x, y in zip(new, old)):
        raise ValueError(_message("overlap", list(_overlaps(params, frozen))))
    both = [y if x is None else x for x, y in zip(new, old)]
    model = jax.tree.unflatten(structure, both)
    _check_weights(params, model)
    return model


def _is_none(x: Any) -> bool:
    return x is None


def _match_bases(params: Any, frozen: Any) -> Any:
    """`params` with bases missing as they are in `frozen`. One may be of a model with
    quantised bases, and the other one of a model without."""
    new, structure = jax.tree.flatten(params, is_leaf=_is_weight_or_none)
    old, there = jax.tree.flatten(frozen, is_leaf=_is_weight_or_none)
    if structure != there:
        return params
    return structure.unflatten(list(map(_match_base, new, old)))


def _match_base(x: Any, y: Any) -> Any:
    if not (is_weight(x) and is_weight(y)) or is_missing(y.w):
        return x
    if is_weight(y.w):
        below = x.w
        matched = _match_base(below, y.w) if is_weight(below) else below
        return x if matched is below else x.with_base(matched)
    missing = jax.tree.map(lambda _: None, y.w)
    is_other = jax.tree.structure(x.w) != jax.tree.structure(missing)
    return x.with_base(missing) if is_missing(x.w) and is_other else x


def _match_kinds(params: Any, frozen: Any) -> Any:
    """`frozen` with the bases for weights of another kind in `params`: mixtures out of
    an `AdapterBank`, and updates that were stacked or added up, have normal forms."""
    new, structure = jax.tree.flatten(params, is_leaf=_is_weight_or_none)
    old, there = jax.tree.flatten(frozen, is_leaf=_is_weight_or_none)
    if structure != there or all(type(x) is type(y) for x, y in zip(new, old)):
        return frozen

    def match(x: Any, y: Any) -> Any:
        if not (is_weight(x) and is_weight(y)) or type(x) is type(y):
            return y
        if not is_missing(x.w) or is_missing(y.w) or not _is_mixture(x, y):
            return y
        return jax.tree.map(lambda _: None, x).with_base(y.w)

    return structure.unflatten(list(map(match, new, old)))


def _is_mixture(new: Any, old: Any) -> bool:
    """Whether `new` has factors for the base of `old`, as it is stored there."""
    is_low_rank = isinstance(new, LoraWeight | FactoredWeight)
    has_axes = isinstance(old, LoraWeight | FactoredWeight)
    if not is_low_rank or isinstance(new, FactoredWeight) and new.permutation:
        return False
    return not has_axes or _axes(new) == _axes(old)


def _axes(weight: Any) -> Any:
    form = weight.form if isinstance(weight, FactoredWeight) else weight
    return form.rows, form.columns


def _is_weight_or_none(x: Any) -> bool:
    return is_weight(x) or x is None


def _check_call(params: Any, frozen: Any) -> None:
    weights = jax.tree.leaves(frozen)
    if isinstance(params, list | tuple) and weights and all(map(_is_number, weights)):
        raise TypeError(
            "`lorax.combine(params, frozen)` is the partner of `lorax.partition`. To "
            "add adapters up, call `lorax.weighted_sum(adapters, weights)`."
        )


def _is_number(x: Any) -> bool:
    is_plain = isinstance(x, int | float | complex | np.generic)
    return is_plain or is_array(x) and x.ndim < 2


def _message(what: str, problems: list[str]) -> str:
    listed = list_some(problems, separator="\n  ")
    return f"`params` and `frozen` {what}:\n  {listed}\n{_MEANT}"


def _check_weights(params: Any, model: Any) -> None:
    """Raises `ValueError` if a weight of `model` lacks an array, or has arrays that do
    not fit each other, or if a layer has no arrays."""
    nodes = jax.tree.leaves(model, is_leaf=_is_checked)
    if all(_is_whole(node) for node in nodes):
        parts = jax.tree.leaves(params, is_leaf=is_weight)
        if any(is_weight(x) and base_of(x) is not None for x in parts):
            raise ValueError(
                "`params` has the frozen base: the arguments are exchanged. Call "
                "`lorax.combine(params, frozen)`, in the order in which "
                "`lorax.partition` returns them."
            )
        return
    found = [
        f"{_path(path)}: {line}"
        for path, node in jax.tree_util.tree_leaves_with_path(model, _is_checked)
        for line in _wrong(node)
    ]
    raise ValueError(_message("do not belong together", found))


def _is_checked(node: Any) -> bool:
    return is_weight(node) or _is_empty(node)


def _is_empty(node: Any) -> bool:
    """Whether it is a layer that should have arrays and has none."""
    return (
        isinstance(node, eqx.Module)
        and getattr(node, "use_bias", False) is True
        and getattr(node, "weight", False) is None
        and getattr(node, "bias", False) is None
    )


def _is_whole(weight: Any) -> bool:
    return not any(True for _ in _wrong(weight))


def _wrong(weight: Any) -> Iterator[str]:
    if not is_weight(weight):
        if _is_empty(weight):
            yield "its arrays are in neither"
        return
    if base_of(weight) is None:
        yield "the base is in neither"
        return
    lacking = list_missing(weight)
    if lacking:
        yield f"{', '.join(f'`{name}`' for name in lacking)} in neither"
    elif is_array(base_of(weight)) or stands_for_array(base_of(weight)):
        yield from find_misfits(weight)
    if is_weight(weight.w):
        yield from _wrong(weight.w)


def _path(keys: Any) -> str:
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    return ".".join(name for name in names if name != "wrapped") or "the root"


def _overlaps(params: Any, frozen: Any) -> Iterator[str]:
    def both(path: Any, x: Any, y: Any) -> str | None:
        return None if x is None or y is None else f"{_path(path)} is in both"

    found = jax.tree_util.tree_map_with_path(both, params, frozen, is_leaf=_is_none)
    return iter(jax.tree.leaves(found))


def _differences(x: Any, y: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Where two trees differ in structure or in static fields."""
    where = ".".join(path) or "the root"
    is_in = [
        f"{_kind(node)} in `{name}`" for node, name in ((x, "params"), (y, "frozen"))
    ]
    if type(x) is not type(y):
        yield f"{where}: {is_in[0]}, {is_in[1]}"
        return
    if is_weight(x):
        yield from _settings(x, y, where)
        if is_weight(x.w) or is_weight(y.w):
            yield from _differences(x.w, y.w, (*path, "w"))
        return
    level, partner_level = flatten_one_level(x), flatten_one_level(y)
    if level is None or partner_level is None:
        return
    (mine, structure), (theirs, other) = level, partner_level
    names = [[name for name, _ in named] for named in (mine, theirs)]
    if names[0] != names[1]:
        apart = sorted({*names[0]} ^ {*names[1]})
        yield f"{where}: only one has {', '.join(apart[:8])}"
        return
    if structure != other:
        yield from _settings(x, y, where)
    for (name, child), (_, partner) in zip(mine, theirs):
        inner = is_layer(x) and child is x.wrapped
        below = path if inner else (*path, name)
        if _has_structure(child) or _has_structure(partner):
            yield from _differences(child, partner, below)


def _has_structure(node: Any) -> bool:
    """Whether it is neither a leaf nor `None`."""
    return is_weight(node) or node is not None and flatten_one_level(node) is not None


def _kind(node: Any) -> str:
    return "nothing" if node is None else f"a {type(node).__name__}"


def _settings(x: Any, y: Any, where: str) -> Iterator[str]:
    named = dataclasses.fields(x) if dataclasses.is_dataclass(x) else ()
    static = [field.name for field in named if field.metadata.get("static", False)]
    differ = [
        (name, *(getattr(node, name, None) for node in (x, y)))
        for name in static
        if getattr(x, name, None) != getattr(y, name, None)
    ]
    for name, mine, theirs in differ:
        yield f"{where}: `{name}` is {mine!r} in `params` and {theirs!r} in `frozen`"
    if not differ and not is_weight(x):
        yield f"{where}: two {type(x).__name__} with other static fields"

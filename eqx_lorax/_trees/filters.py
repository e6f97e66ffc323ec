"""Filters: from the names that a user gives to places in a model."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._factored import stands_for_array
from .._layers import is_known_layer
from .._shared import list_some
from .places import flatten_one_level, Place, Places


Pattern: TypeAlias = str | re.Pattern[str]
"""A pattern for paths. A string without dots is a glob for the last name of a path, one
with dots is matched name by name from the root, where `**` stands for any number of
names; a compiled regular expression has to match the full dotted path."""

Filter: TypeAlias = Any
"""What to choose in a model: `None`, a `lorax.Pattern` or a list of them, a predicate
on modules or a type, or a filter spec, that is a pytree prefix of the model with bools
or predicates at its leaves. See `lorax.loraify`."""

IsEligible: TypeAlias = Callable[[Place], bool]
"""Whether a place is one of the arrays among which a filter chooses."""

_JIT_WRAPPER = type(eqx.filter_jit(lambda: None))


@dataclasses.dataclass(frozen=True)
class FilterMatch:
    """The places that one part of a filter, such as one pattern of a list, names."""

    label: str
    """The part of the filter as the user wrote it, for messages."""

    places: list[Place]
    """The places that it names directly. There is at least one."""

    is_leafwise: bool = False
    """Whether it marks each leaf, as a filter spec does. A rule, such as a pattern, may
    also name places that the user did not mean."""

    is_shallow: bool = False
    """Whether naming a module means its own arrays only, unless it is a known layer. So
    it is for regular expressions. Naming a container otherwise means all inside it."""

    def find_covered(self, places: Places) -> Iterator[Place]:
        """All places that are meant: those that are named, and places beneath them."""
        for root in self.places:
            for place in places.beneath(root):
                is_own = place is root or place.owner is root
                if is_own or not self.is_shallow or is_known_layer(root.module):
                    yield place


def match_filter(
    model: Any, places: Places, filter: Filter, argument: str, is_eligible: IsEligible
) -> list[FilterMatch]:
    """Finds the places in `model` that each part of `filter` names. `places` are all
    places of the model; the filter chooses among the eligible ones.

    **Raises:**

    `ValueError` if any part of the filter names nothing, or if a filter spec does not
    fit the model. `TypeError` if `filter` is not a filter.
    """
    if _is_rule(filter, model):
        return [_match_rule(places, filter, argument, is_eligible)]
    if isinstance(filter, list | tuple | set | frozenset):
        if not filter:
            raise ValueError(
                f"`{argument}={filter!r}` names nothing: it is empty. Available: "
                f"{list_available(places, is_eligible)}."
            )
        if all(_is_rule(x, model) for x in filter):
            return [_match_rule(places, x, argument, is_eligible) for x in filter]
    if type(filter) is type(model) or isinstance(
        filter, bool | np.bool_ | dict | list | tuple
    ):
        return [_match_spec(places, filter, argument, is_eligible)]
    raise TypeError(
        f"`{argument}={filter!r}` is not a filter. Pass a path pattern such as "
        "'blocks.*.attention.query' or a list of them, a predicate on modules such as "
        "`lambda node: isinstance(node, eqx.nn.Linear)`, or a pytree of bools."
    )


def exclude_places(
    model: Any,
    places: Places,
    exclude: Filter,
    among: Sequence[Place],
    is_eligible: IsEligible,
) -> list[Place]:
    """`among` without the places that `exclude` names and those beneath them.

    **Raises:**

    `ValueError` if any part of `exclude` takes nothing away, or if nothing is left.
    """
    if exclude is None:
        return list(among)
    gone: set[Place] = set()
    for part in match_filter(model, places, exclude, "exclude", is_eligible):
        covered = set(part.find_covered(places))
        if covered.isdisjoint(among):
            raise ValueError(
                f"{part.label} excludes nothing: what it names, "
                f"{list_briefly(part.places)}, was not chosen in the first place. "
                f"Chosen: {list_briefly(among) or 'nothing'}."
            )
        gone |= covered
    left = [place for place in among if place not in gone]
    if not left:
        raise ValueError(
            f"`exclude={exclude!r}` leaves nothing of what was chosen: "
            f"{list_briefly(among)}."
        )
    return left


def matches(pattern: Pattern, path: Sequence[str]) -> bool:
    """Whether `pattern` names the place at `path`.

    A compiled regular expression must match the full dotted path. A glob without a dot
    matches the last name of a path. One with dots is matched name by name from the
    root, and `**` stands for any number of names.
    """
    dotted = ".".join(path)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(dotted) is not None
    names = dotted.split(".")
    if "." not in pattern:
        return bool(path) and fnmatch.fnmatchcase(names[-1], pattern)
    return _matches_globs(pattern.split("."), names)


def matches_around(pattern: Pattern, path: Sequence[str]) -> bool:
    """Whether `pattern` names the place at `path` or, unless it is a regular
    expression, anything around it."""
    if isinstance(pattern, re.Pattern):
        return matches(pattern, path)
    return any(matches(pattern, path[:i]) for i in range(len(path) + 1))


def explain_no_match(argument: str, label: str, names: Iterable[Sequence[str]]) -> str:
    """The message for a pattern that matches none of the paths `names`. It suggests
    similar ones."""
    paths = [".".join(path) for path in names]
    components = list(dict.fromkeys(part for path in paths for part in path.split(".")))
    near = [f"**.{label}"] if _matches_any(f"**.{label}", paths) else []
    if "." not in label:
        near += difflib.get_close_matches(label, components)
    near += difflib.get_close_matches(label, paths)
    near = list(dict.fromkeys(near))[:3]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"`{argument}={label!r}` matched nothing.{hint}"


def list_available(places: Places, is_eligible: IsEligible) -> str:
    """A short list of the eligible arrays. Numbered siblings are one item."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for place in places.all:
        if type(place.node) is _JIT_WRAPPER:
            return (
                f"nothing inside the `eqx.filter_jit` at {place.dotted}, which hides "
                "its modules; adapt the model first and jit it after"
            )
        if is_eligible(place):
            path = re.sub(r"(?<![^.])\d+(?![^.])", "*", place.dotted)
            shapes.setdefault(path, []).append(tuple(place.node.shape))
    listed = []
    for path, found in shapes.items():
        kinds = list(dict.fromkeys(map(str, found)))
        several = f" × {len(found)}" if len(found) > 1 else ""
        listed.append(f"{path} {' or '.join(kinds[:3])}{several}")
    if not listed:
        return "no array in this model that could be"
    return list_some(listed, 20)


def list_briefly(places: Sequence[Place]) -> str:
    """The paths of the first few places."""
    return list_some(place.dotted for place in places)


def _match_pattern(
    places: Places, pattern: str, argument: str, is_eligible: IsEligible
) -> FilterMatch:
    found = [place for place in places.all if matches(pattern, place.path)]
    if not found:
        raise _no_match_error(places, pattern, places.all, argument, is_eligible)
    # If it names modules and arrays, the modules are meant: `"*"` means every layer.
    modules = [place for place in found if not place.is_array]
    return FilterMatch(f"`{argument}={pattern!r}`", modules or found)


def _match_regex(
    places: Places, pattern: re.Pattern[str], argument: str, is_eligible: IsEligible
) -> FilterMatch:
    # Containers are not matched. Otherwise a pattern that leaves something out, such as
    # `(?!head).+`, would match the containers around it.
    owners = {place.owner for place in places.all if place.is_array}
    layers = [x for x in places.all if x in owners or is_known_layer(x.module)]
    arrays = [x for x in places.all if x.is_array]
    known = [x for x in layers if is_known_layer(x.module) and matches(pattern, x.path)]
    inside = {below for layer in known for below in places.beneath(layer)}
    found = [x for x in arrays if matches(pattern, x.path) and x not in inside]
    chosen = {array.owner for array in found if is_eligible(array)}
    for layer in layers:
        if matches(pattern, layer.path) and layer not in inside | chosen:
            found.append(layer)
    found = sorted([*known, *found], key=lambda place: place.indices)
    if not found:
        seen = [*layers, *arrays]
        raise _no_match_error(places, pattern, seen, argument, is_eligible)
    return FilterMatch(f"`{argument}={pattern.pattern!r}`", found, is_shallow=True)


def _no_match_error(
    places: Places,
    pattern: Pattern,
    candidates: Iterable[Place],
    argument: str,
    is_eligible: IsEligible,
) -> ValueError:
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    message = explain_no_match(argument, text, [place.path for place in candidates])
    if text == "all-linear" and argument == "filter":
        message += " That is PEFT's word: here `filter=None` adapts all layers."
    elif any(matches(pattern, place.path) for place in places.all):
        message += (
            " A regular expression has to match the full path of a layer or of an "
            rf"array, not that of a container. '{text}\..*' matches what is beneath."
        )
    return ValueError(f"{message} Available: {list_available(places, is_eligible)}.")


def _match_predicate(
    places: Sequence[Place], predicate: Callable[[Any], Any], argument: str
) -> FilterMatch:
    if isinstance(predicate, type):
        kind = predicate
        label = f"`{argument}={kind.__name__}`"
        predicate = lambda node: isinstance(node, kind)  # noqa: E731
    else:
        label = f"the predicate `{argument}`"
    nodes = [place for place in places if not place.is_array]
    modules = [place for place in nodes if isinstance(place.node, eqx.Module)]
    found = [place for place in modules if predicate(place.node)]
    if not found:
        kinds = sorted({type(place.module).__name__ for place in modules})
        raise ValueError(
            f"{label} matched nothing. It sees the modules, not the arrays, of the "
            f"model; these are of the types {', '.join(kinds) or '(none)'}."
        )
    return FilterMatch(label, found)


def _match_spec(
    places: Places, spec: Any, argument: str, is_eligible: IsEligible
) -> FilterMatch:
    by_indices = {place.indices: place for place in places.all}
    marked: list[Place] = []

    def visit(spec: Any, node: Any, indices: tuple[int, ...], path: str) -> None:
        if isinstance(spec, bool | np.bool_):
            if spec and indices in by_indices:
                marked.append(by_indices[indices])
            return
        level = flatten_one_level(node)
        if stands_for_array(node):
            if type(spec) is type(node) and any(jtu.tree_leaves(spec)):
                marked.append(by_indices[indices])
            return
        spec_level = flatten_one_level(spec)
        if level is not None and spec_level is not None and spec_level[1] == level[1]:
            for i, ((name, child), (_, spec_child)) in enumerate(
                zip(level[0], spec_level[0])
            ):
                visit(spec_child, child, (*indices, i), f"{path}.{name}".lstrip("."))
        elif _is_predicate(spec) and indices in by_indices:
            below = list(places.beneath(by_indices[indices]))
            marked.extend(_match_predicate(below, spec, argument).places)
        elif spec is not None or node is not None:
            raise ValueError(
                f"`{argument}` is a filter spec whose structure does not fit the "
                f"model: at {path or 'the root'} it has a {type(spec).__name__} where "
                f"the model has a {type(node).__name__}. Make it from the model: "
                "`jax.tree.map(lambda _: False, model)`, then `eqx.tree_at(...)`."
            )

    visit(spec, places.root.node, (), "")
    # Marks without an array, such as that of an activation function, are ignored.
    found = [x for x in marked if any(y.is_array for y in places.beneath(x))]
    if not found:
        raise ValueError(
            f"`{argument}` is a filter spec that marks nothing as `True`. Available: "
            f"{list_available(places, is_eligible)}."
        )
    return FilterMatch(f"the filter spec `{argument}`", found, is_leafwise=True)


def _is_predicate(spec: Any) -> bool:
    """Whether a leaf of a filter spec is a predicate, not a module of the model."""
    return callable(spec) and not isinstance(spec, eqx.Module)


def _matches_globs(globs: Sequence[str], names: Sequence[str]) -> bool:
    if not globs:
        return not names
    if globs[0] == "**":
        return any(_matches_globs(globs[1:], names[i:]) for i in range(len(names) + 1))
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], globs[0])
        and _matches_globs(globs[1:], names[1:])
    )


def _matches_any(pattern: str, paths: Iterable[str]) -> bool:
    return any(matches(pattern, path.split(".")) for path in paths)


def _is_rule(filter: Any, model: Any) -> bool:
    """Whether `filter` is a pattern or a predicate, not a filter spec. Filter specs may
    be callable too, since they have the type of the model."""
    is_pattern = isinstance(filter, str | re.Pattern)
    return is_pattern or callable(filter) and type(filter) is not type(model)


def _match_rule(
    places: Places, rule: Any, argument: str, is_eligible: IsEligible
) -> FilterMatch:
    if isinstance(rule, re.Pattern):
        return _match_regex(places, rule, argument, is_eligible)
    if isinstance(rule, str):
        return _match_pattern(places, rule, argument, is_eligible)
    return _match_predicate(places.all, rule, argument)

"""Options that may differ between targets."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from .._trees import explain_no_match, matches_around, Pattern, Place
from .targets import list_targets, Target


_Value = TypeVar("_Value")
PerTarget: TypeAlias = _Value | Mapping[Pattern, _Value]
"""One value for all targets, or a mapping from patterns to values: each target has the
value of the first `lorax.Pattern` that matches it or a container around it."""

_Paths: TypeAlias = list[tuple[str, ...]]


def resolve_per_array(
    option: Any, targets: Sequence[Target], argument: str, default: Any
) -> dict[Place, Any]:
    """The value of `option` for each array of each target: `option` itself or, if it is
    a mapping from patterns, the value of the first that matches, or else `default`.

    **Raises:**

    `ValueError` if a pattern is the first match of no array.
    """
    arrays = [(target, array) for target in targets for array in target.arrays]
    paths = [[array.path, *_list_paths(target)] for target, array in arrays]
    values = _resolve(option, paths, targets, argument, default)
    return {array: value for (_, array), value in zip(arrays, values)}


def resolve_per_target(
    option: Any, targets: Sequence[Target], argument: str, default: Any
) -> list[Any]:
    """Like `resolve_per_array`, but one value for all arrays of a target."""
    paths = [
        [*_list_paths(target), *(array.path for array in target.arrays)]
        for target in targets
    ]
    return _resolve(option, paths, targets, argument, default)


def group_by_pattern(
    patterns: Iterable[Pattern], targets: Sequence[Target]
) -> dict[Pattern, list[Place]]:
    """For each pattern the arrays of which it is the first match. Patterns without such
    arrays are left out."""
    patterns = list(patterns)
    found: dict[Pattern, list[Place]] = {}
    for target in targets:
        for array in target.arrays:
            for pattern in _find_first(patterns, [array.path, *_list_paths(target)]):
                found.setdefault(pattern, []).append(array)
    return {pattern: found[pattern] for pattern in patterns if pattern in found}


def _list_paths(target: Target) -> _Paths:
    owners = [array.owner.path for array in target.arrays if array.owner is not None]
    return [target.place.path, *owners]


def _find_first(patterns: Iterable[Pattern], paths: _Paths) -> list[Pattern]:
    """The first pattern that matches any of the paths, if one does."""
    for pattern in patterns:
        if any(matches_around(pattern, path) for path in paths):
            return [pattern]
    return []


def _resolve(
    option: Any,
    paths: Sequence[_Paths],
    targets: Sequence[Target],
    argument: str,
    default: Any,
) -> list[Any]:
    if not isinstance(option, Mapping):
        return [option] * len(paths)
    firsts = [_find_first(option, one) for one in paths]
    used = {pattern for first in firsts for pattern in first}
    for pattern in option:
        if pattern not in used:
            raise ValueError(_explain_unused(pattern, paths, targets, argument))
    return [option[first[0]] if first else default for first in firsts]


def _explain_unused(
    pattern: Pattern,
    paths: Sequence[_Paths],
    targets: Sequence[Target],
    argument: str,
) -> str:
    if any(_find_first([pattern], one) for one in paths):
        return (
            f"`{argument}` has a pattern {pattern!r} without effect: others before it "
            "match all of its targets. The first that matches counts, so put the "
            "general ones last."
        )
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    known = [target.place.path for target in targets]
    message = explain_no_match(argument, text, known)
    return f"{message} It has to match a target of `filter`: {list_targets(targets)}."

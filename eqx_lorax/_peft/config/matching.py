"""Which modules the entries of a configuration match, by PEFT's own rules."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard


# PEFT's value of `target_modules` for a model where nothing is adapted.
NO_TARGETS = "dummy-target-modules"
# PEFT's value of `target_modules` for all linear layers but the head of the model.
ALL_LINEAR = "all-linear"


def ends_with(path: str, entry: str) -> bool:
    """Whether the names of `entry` are the last ones of `path`."""
    return not entry or f".{path}".endswith(f".{entry}")


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether `target_modules` matches the module at `path`. `ALL_LINEAR`, which PEFT
    replaces by a list of modules when it saves, matches none here."""
    targets = config.get("target_modules")
    if not targets or is_excluded(config, path):
        return False
    if is_expression(targets):
        return bool(re.fullmatch(targets, path))
    if isinstance(targets, str):
        return False
    if path in targets:
        return True
    return any(ends_with(path, entry) for entry in targets) and _is_of_layers(
        config, path
    )


def is_expression(targets: Any) -> TypeGuard[str]:
    """Whether `target_modules` is a regular expression."""
    is_name = str(targets).lower() in (ALL_LINEAR, NO_TARGETS)
    return isinstance(targets, str) and not is_name


def is_excluded(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT leaves out the module at `path` although it is targeted."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        by_name = bool(re.fullmatch(excluded, path))
    else:
        by_name = any(ends_with(path, entry) for entry in excluded)
    whole = config.get("modules_to_save") or []
    return by_name or any(_is_hidden_by(entry, path) for entry in whole)


def is_saved_whole(entry: str, path: str) -> bool:
    """Whether an entry of `modules_to_save` matches the module at `path`, or one around
    it. PEFT compares the last characters of the paths, not their last names."""
    return any(around.endswith(entry) for around in list_ancestors(path))


def is_named_alone(path: str, modules: Iterable[str], adapted: Iterable[str]) -> bool:
    """Whether `path` in `modules_to_save` matches this module and no other of
    `modules`, and hides none of the `adapted` modules from PEFT."""
    try:
        hides = any(_is_hidden_by(path, other) for other in adapted)
    except re.error:
        return False
    return not hides and not any(
        other.endswith(path) for other in modules if other != path
    )


def follows_pattern(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the module at
    `path`."""
    return bool(re.match(rf"(.*\.)?({pattern})$", path))


def make_pattern(path: str, paths: Collection[str]) -> str:
    """A key of `rank_pattern` that matches `path` alone among `paths`. This is the path
    itself where that is enough, which PEFT before 0.15 understands too."""
    try:
        matched = [other for other in paths if follows_pattern(path, other)]
    except re.error:
        matched = []
    return path if matched == [path] else "^" + re.escape(path)


def make_targets(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """A `target_modules` that matches the modules at `paths` and no others: a list if
    none of the other `modules` ends with an entry, or else a regular expression. A
    single name is the end of many paths, so it is never an entry of a list."""
    wanted = list(paths)
    if not wanted:
        return NO_TARGETS
    others = set(modules) - set(wanted)
    is_exact = all("." in path for path in wanted) and not any(
        ends_with(other, path) for path in wanted for other in others
    )
    return wanted if is_exact else "|".join(map(re.escape, wanted))


def list_ancestors(path: str) -> Iterator[str]:
    """The path itself, and the paths of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _is_hidden_by(entry: str, path: str) -> bool:
    return bool(re.match(rf"(^|.*\.){entry}($|\..*)", path))


def _is_of_layers(config: Mapping[str, Any], path: str) -> bool:
    """Whether `layers_to_transform` has the number of the layer at `path`, the first of
    its numbers or, in PEFT up to 0.17, the last."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    named = config.get("layers_pattern") or [r"[^.]*"]
    named = [named] if isinstance(named, str) else named
    before = r"(?:^|{}\.)" if config.get("layers_pattern") else r"{}\."
    for name in named:
        numbers = [
            re.match(rf"{before.format(any_)}{name}\.(\d+)\.", path)
            for any_ in (".*?", ".*")
        ]
        if None not in numbers:
            return all(int(number[1]) in wanted for number in numbers if number)
    return False

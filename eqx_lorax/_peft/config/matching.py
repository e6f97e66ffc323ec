"""What the entries of a configuration match, by PEFT's own rules."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard


# What PEFT takes for `target_modules` where nothing has an adapter.
NO_TARGETS = "dummy-target-modules"
# What it takes for all linear layers, the head of the model left out.
ALL_LINEAR = "all-linear"


def ends_with(path: str, entry: str) -> bool:
    """Whether the last names of `path` are those of `entry`."""
    return not entry or f".{path}".endswith(f".{entry}")


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether `target_modules` means the module at `path`. `ALL_LINEAR`, which PEFT
    replaces by what it means when it saves, says nothing of any one module."""
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
    """Whether an entry of `modules_to_save` means the module at `path`, or one around
    it. PEFT compares the ends of the paths, and not of their names."""
    return any(around.endswith(entry) for around in upwards(path))


def is_said_alone(path: str, modules: Iterable[str], adapted: Iterable[str]) -> bool:
    """Whether `path` in `modules_to_save` means this module and none else of `modules`,
    and keeps PEFT from adapting none of those that are `adapted`."""
    try:
        hides = any(_is_hidden_by(path, other) for other in adapted)
    except re.error:
        return False
    return not hides and not any(
        other.endswith(path) for other in modules if other != path
    )


def follows_pattern(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means the module at `path`."""
    return bool(re.match(rf"(.*\.)?({pattern})$", path))


def pattern_for(path: str, paths: Collection[str]) -> str:
    """A key of `rank_pattern` that means `path` alone among `paths`. The path itself
    where it does, which PEFT before 0.15 understands too."""
    try:
        means = [other for other in paths if follows_pattern(path, other)]
    except re.error:
        means = []
    return path if means == [path] else "^" + re.escape(path)


def targets_for(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that means the modules at `paths` and none else: a list if none
    of the other `modules` ends like an entry, or else a regular expression. One name
    alone is the end of many paths, so it is never an entry of a list."""
    wanted = list(paths)
    if not wanted:
        return NO_TARGETS
    others = set(modules) - set(wanted)
    is_exact = all("." in path for path in wanted) and not any(
        ends_with(other, path) for path in wanted for other in others
    )
    return wanted if is_exact else "|".join(map(re.escape, wanted))


def upwards(path: str) -> Iterator[str]:
    """The path, and those of the modules around it."""
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

"""Whether a file has all the tensors that its configuration mentions."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ..pytorch import list_paths
from .matching import (
    ALL_LINEAR,
    ends_with,
    follows_pattern,
    is_excluded,
    is_expression,
    is_saved_whole,
    is_targeted,
)


# The names that PEFT adds to `modules_to_save` for a task, whether the model has such
# modules or not.
_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


# The names of the tensors of adapters, with the paths of their modules.
_OF_ADAPTER = re.compile(
    r"(.*)\.(?:lora_|hada_|lokr_|vera_lambda_|ia3_l$|ranknum$|token_adapter\.).*"
)


class Contents:
    """The modules of PyTorch for which a file has tensors."""

    def __init__(self, tensors: Iterable[str]):
        """**Arguments:**

        - `tensors`: The names of the tensors, without prefix.
        """
        self.adapted: set[str] = set()
        """The modules with an adapter, or a part of one."""
        self.whole: set[str] = set()
        """The modules with arrays of their own besides a bias."""
        for name in tensors:
            adapted = _OF_ADAPTER.fullmatch(name)
            owner, _, array = name.rpartition(".")
            if adapted is not None:
                self.adapted.add(_strip_wrappers(adapted[1]))
            elif owner and array != "bias" and not owner.endswith(".base_layer"):
                self.whole.add(owner)

    def has(self, entry: str) -> bool:
        """Whether there is a module whose path ends with `entry`."""
        return any_ends_with(self.adapted | self.whole, entry)


def find_missing(
    config: Mapping[str, Any],
    contents: Contents,
    *,
    modules: Collection[str],
    parameters: Collection[str],
    arrays: Collection[str],
    adapted: Collection[str],
) -> Iterator[str]:
    """A line for each thing that is missing.

    **Arguments:**

    - `modules`, `parameters`: The paths of the modules, and of the parameters, that
        `names` knows and that can have an adapter.
    - `arrays`: The paths of the modules that `names` knows and that have arrays.
    - `adapted`: Those of `modules` and `parameters` that have an adapter.
    """
    present = contents.adapted | contents.whole
    lost = [
        *(
            path
            for path in modules
            if is_targeted(config, path) and path not in present
        ),
        *_find_lost_siblings(config, modules, present),
        *(x for x in parameters if is_parameter_targeted(config, x, parameters)),
    ]
    lost = [path for path in lost if path not in adapted]
    if lost:
        yield f"it targets {list_paths(lost)}, for which there is no adapter"
    for entry in _list_entries(config, "target_modules"):
        if not (
            contents.has(entry)
            or is_excluded(config, entry)
            or any_ends_with(lost, entry)
        ):
            yield f"`target_modules` has {entry!r}, for which there is no tensor"
    for entry in _list_entries(config, "target_parameters"):
        module = entry.rpartition(".")[0]
        if not (contents.has(module) or any_ends_with(lost, entry)):
            yield f"`target_parameters` has {entry!r}, for which there is no tensor"
    targets = config.get("target_modules")
    if is_expression(targets) and not lost:
        if not any(re.fullmatch(targets, path) for path in present):
            yield f"`target_modules` is {targets!r}, for which there is no tensor"
    yield from _find_lost_heads(config, contents, arrays)


def any_ends_with(paths: Iterable[str], entry: str) -> bool:
    return any(ends_with(path, entry) for path in paths)


def is_parameter_targeted(
    config: Mapping[str, Any], path: str, parameters: Collection[str]
) -> bool:
    """Whether `target_parameters` matches the parameter at `path`. An entry that is the
    whole path of a parameter is taken to match no other."""
    return any(
        entry == path or (ends_with(path, entry) and entry not in parameters)
        for entry in _list_entries(config, "target_parameters")
    )


def warn_of_unused_patterns(
    config: Mapping[str, Any], adapted: Collection[str]
) -> None:
    """Warns if a key of `rank_pattern` or `alpha_pattern` matches no module."""
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        unused = [
            x for x in patterns if not any(follows_pattern(x, path) for path in adapted)
        ]
        if unused:
            warnings.warn(
                f"`{option}` has {list_paths(map(repr, unused))}, which no adapted "
                "module of the file follows. PEFT ignores these too: see whether it "
                "was trained as was meant.",
                stacklevel=4,
            )


def _find_lost_siblings(
    config: Mapping[str, Any], modules: Collection[str], adapted: Collection[str]
) -> Iterator[str]:
    """If the targets are `ALL_LINEAR`, which leaves out the head: the modules without
    an adapter whose paths differ from that of an adapted module in numbers alone."""
    if str(config.get("target_modules")).lower() == ALL_LINEAR:
        families = {re.sub(r"\d+", "*", path) for path in adapted}
        for path in modules:
            if path not in adapted and re.sub(r"\d+", "*", path) in families:
                yield path


def _find_lost_heads(
    config: Mapping[str, Any], contents: Contents, arrays: Collection[str]
) -> Iterator[str]:
    by_peft = _HEADS.get(str(config.get("task_type")), set())
    entries = _list_entries(config, "modules_to_save")
    there = {
        entry
        for entry in entries
        if any(is_saved_whole(entry, path) for path in contents.whole)
    }
    for entry in entries:
        lost = [
            path
            for path in arrays
            if is_saved_whole(entry, path)
            and path not in contents.whole | contents.adapted
        ]
        if lost:
            yield f"`modules_to_save` has {entry!r}, and there is no {list_paths(lost)}"
        elif entry not in there and not (there and entry in by_peft):
            yield f"`modules_to_save` has {entry!r}, for which there is no tensor"


def _list_entries(config: Mapping[str, Any], option: str) -> list[str]:
    found = config.get(option) or []
    return [] if isinstance(found, str) else list(found)


def _strip_wrappers(path: str) -> str:
    return ".".join(name for name in path.split(".") if name != "base_layer")

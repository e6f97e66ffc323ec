"""From paths here to paths in PyTorch, by the user's argument `names`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ..._shared import list_some
from ..._trees import matches


Names: TypeAlias = Mapping[str, str] | Callable[[str], str | None]
"""The path of a module in PyTorch for its path here: a mapping, or a function of the
dotted path. A mapping may have `*` in its keys. Each `*` matches one name, which then
replaces one `{}`, in order. Any other `{}` in a path of PyTorch stands for the index of
a layer in a stack."""

Index: TypeAlias = tuple[int, ...]


def find_template(names: Names, path: Sequence[str]) -> str | None:
    """The path in PyTorch, with `{}` for each axis of a stack; `None` for a path that
    `names` lacks."""
    dotted = ".".join(path)
    if not isinstance(names, Mapping):
        try:
            return names(dotted)
        except LookupError:
            return None
    if dotted in names:
        return names[dotted]
    for pattern, torch in names.items():
        globs = pattern.split(".")
        if "*" not in globs or not matches(pattern, path):
            continue
        for glob, name in zip(globs, path):
            torch = torch.replace("{}", name, 1) if glob == "*" else torch
        return torch
    return None


def expand(template: str, shape: Sequence[int]) -> Iterator[tuple[Index, str]]:
    """The paths of the modules of a stack, with their positions in it. The leading axes
    of `shape` are those of the stack, one for each `{}`."""
    axes = template.count("{}")
    for index in np.ndindex(*shape[:axes]):
        filled = template
        for position in index:
            filled = filled.replace("{}", str(position), 1)
        yield tuple(map(int, index)), filled


def list_paths(paths: Iterable[str]) -> str:
    """A few of the paths, each once, for a message."""
    return list_some(dict.fromkeys(paths))

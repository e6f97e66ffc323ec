"""Where the arrays of a traced program come from."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """An array as it was made."""

    name: str
    """The operation, or the name that a model has given to what it makes."""
    scope: str
    """The named scopes around it, without those of transformations."""
    is_backward: bool
    """Whether the backward pass has made it, or made it again."""
    shape: tuple[int, ...]
    dtype: str


def make_origin(aval: Any, name: str, scope: str) -> Origin:
    """The origin of an array of this shape and dtype. `scope` has the names of all
    equations around it, and of the transformations: `transpose(jvp(block))/norm`."""
    inner = re.sub(r"\w+\(|\)", "", scope).split("/")
    path = "/".join(part for part in inner if part and part not in _CHECKPOINT)
    # Tokens have neither a shape nor a dtype.
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", "")
    return Origin(name, path, "transpose(" in scope, tuple(shape), str(dtype))


def slice_origin(aval: Any, whole: Origin, scope: str) -> Origin:
    """That of a slice, which a loop takes for a round."""
    origin = make_origin(aval, f"slice of {whole.name}", scope)
    return dataclasses.replace(origin, scope=whole.scope)


def reshape_origin(origin: Origin, aval: Any) -> Origin:
    """The same origin for an array of this shape."""
    return dataclasses.replace(origin, shape=aval.shape)


_CHECKPOINT = {"checkpoint", "rematted_computation"}

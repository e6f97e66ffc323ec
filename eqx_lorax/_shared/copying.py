"""Making modules without their `__init__`, which may refuse parts of a partition."""

import dataclasses
from typing import Any, TypeVar


_Module = TypeVar("_Module")


def make_unchecked(kind: type[_Module], **fields: Any) -> _Module:
    """A module of this type with these values of its fields."""
    new = object.__new__(kind)
    for name, value in fields.items():
        # Modules are frozen.
        object.__setattr__(new, name, value)
    return new


def replace_unchecked(module: _Module, **changes: Any) -> _Module:
    """A copy of a module with some fields replaced."""
    names = [field.name for field in dataclasses.fields(module)]  # pyright: ignore[reportArgumentType]
    fields = {name: changes.get(name, getattr(module, name)) for name in names}
    return make_unchecked(type(module), **fields)

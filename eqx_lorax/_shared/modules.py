"""Modules of Equinox whose Python is cheap: made without their `__init__`, which may
refuse parts of a partition, and with attributes at the speed of any other object."""

import dataclasses
import functools
import types
from typing import Any, TYPE_CHECKING, TypeVar

import equinox as eqx


_Module = TypeVar("_Module")


class AbstractQuickModule(eqx.Module):
    """A module that is quick to flatten and whose methods are quick to call.

    Equinox looks at every attribute that is read of a module, in Python, for the bound
    methods among them, which it makes pytrees. A step flattens a model several times,
    and each time reads an attribute of every module. Here the methods themselves do
    what Equinox does, and everything else is read as usual."""

    if not TYPE_CHECKING:
        __getattribute__ = object.__getattribute__

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            is_special = name.startswith("__") and name.endswith("__")
            if not is_special and isinstance(value, types.FunctionType):
                setattr(cls, name, _PytreeMethod(value))


class _PytreeMethod:
    """A function in a class whose bound methods are pytrees: those of Equinox, made
    without their `__init__`."""

    def __init__(self, function: Any):
        functools.wraps(function)(self)  # pyright: ignore[reportArgumentType]
        self.function = function
        self.fields = dict(vars(_BoundMethod(function, None)))

    @property
    def __isabstractmethod__(self) -> bool:
        return getattr(self.function, "__isabstractmethod__", False)

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.function
        bound = object.__new__(_BoundMethod)
        object.__setattr__(bound, "__dict__", {**self.fields, "__self__": module})
        return bound


class _Example(eqx.Module):
    def method(self) -> None:
        pass


# The type has no public name.
_BoundMethod: Any = type(_Example().method)


def make_unchecked(kind: type[_Module], **fields: Any) -> _Module:
    """A module of this type with these values of its fields."""
    new = object.__new__(kind)
    # Modules are frozen. All at once, since there is one for each product.
    object.__setattr__(new, "__dict__", fields)
    return new


def replace_unchecked(module: _Module, **changes: Any) -> _Module:
    """A copy of a module with some fields replaced."""
    names = [field.name for field in dataclasses.fields(module)]  # pyright: ignore[reportArgumentType]
    fields = {name: changes.get(name, getattr(module, name)) for name in names}
    return make_unchecked(type(module), **fields)

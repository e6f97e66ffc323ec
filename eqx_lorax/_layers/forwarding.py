"""The attributes, methods and operators of a module, for the layer in its place.

Whatever the module's own code computes is run through `lorax.lora`, so that weights
stay factored. A part of the module that it returns, such as a layer inside it, comes
back with its adapters.
"""

import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .._factored import stands_for_array
from .._functions import call_with_weights, CallOptions
from .._shared import AbstractQuickModule


NORMS = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)
"""The modules that rewrite a weight of the layer inside them in every call."""

ARRAY_PROTOCOLS = ("__array__", "__jax_array__")
"""The special methods that NumPy and JAX look up in an object, not in its type."""


def run_module(layer: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`fn(module, *args, **kwargs)` for the module that `layer` stands for. To `fn`,
    its factored weights are arrays."""
    module = layer.wrapped
    result = call_with_weights(
        _encode_result(fn), (module, *args), kwargs, _interpreter_options(module)
    )
    match result:
        case _SameModule():
            return layer
        case _Iterated(items=items):
            return iter(items)
        case _Closure():
            # It was made while `fn` was traced, so each call has to make it again.
            return lambda *more, **named: run_module(
                layer,
                lambda module, *more, **named: fn(module, *args, **kwargs)(
                    *more, **named
                ),
                *more,
                **named,
            )
    is_changed = type(result) is type(module) and any(
        map(stands_for_array, jax.tree.leaves(result, is_leaf=stands_for_array))
    )
    return replace_fields(layer, wrapped=result) if is_changed else result


def get_attribute(layer: Any, name: str) -> Any:
    """The attribute `name` of the module that `layer` stands for."""
    module = layer.wrapped
    if name in vars(module):
        return getattr(module, name)
    kind = type(module)
    definition = inspect.getattr_static(kind, name, None)
    if isinstance(definition, staticmethod | classmethod):
        return getattr(module, name)
    is_descriptor = hasattr(type(definition), "__get__")
    if isinstance(definition, _METHODS) or callable(definition) and is_descriptor:
        return eqx.module_update_wrapper(_Method(layer, name))
    if is_descriptor or definition is None and hasattr(kind, "__getattr__"):
        return run_module(layer, lambda module: getattr(module, name))
    return getattr(module, name)


def replace_fields(layer: Any, **changes: Any) -> Any:
    """`layer` with other values in some of its fields."""
    return type(layer)(*get_fields(layer, **changes))


def get_fields(layer: Any, **changes: Any) -> tuple[Any, ...]:
    """The values of the fields of `layer`, with `changes`."""
    names = [field.name for field in dataclasses.fields(type(layer))]
    return tuple(changes.get(name, getattr(layer, name)) for name in names)


class SpecialMethod:
    """A special method of the module, as a descriptor of the layer's type: Python looks
    special methods up there, and only the instance knows whether its module has it."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        kind = type(layer.wrapped)
        own, inherited = (_look_up(x, self.name) for x in (kind, eqx.Module))
        if own is not None and own is not inherited:
            return functools.partial(
                run_module,
                layer,
                lambda module, *args: getattr(module, self.name)(*args),
            )
        if inherited is not None:
            return inherited.__get__(layer)
        if self.name in _BUILT_IN:
            function, names = _BUILT_IN[self.name]
            if any(_look_up(kind, name) is not None for name in names):
                return functools.partial(run_module, layer, function)
        if self.name == "__bool__":
            return lambda: True
        if self.name in _BINARY:
            return lambda *_: NotImplemented
        raise _Missing(f"'{kind.__name__}' object has no `{self.name}`")


class _Missing(AttributeError, TypeError):
    """`hasattr` expects an `AttributeError`; `len` and the like a `TypeError`."""


# Special methods that Python derives from others: how, and from which.
_BUILT_IN: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "__bool__": (bool, ("__len__",)),
    "__contains__": (operator.contains, ("__iter__", "__getitem__")),
    "__iter__": (iter, ("__getitem__",)),
    "__reversed__": (reversed, ("__getitem__",)),
}

_BINARY = [
    f"__{side}{name}__"
    for name in (
        *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod"),
        *("pow", "lshift", "rshift", "and", "xor", "or"),
    )
    for side in ("", "r")
]

# Without `__float__`, `__int__` and the like: an object whose type has them passes for
# a number, and a traced array cannot become a number of Python's.
SPECIAL_METHODS = (
    *("__len__", "__getitem__", *_BUILT_IN, "__enter__", "__exit__"),
    *("__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__neg__", "__pos__", "__abs__", "__invert__", *_BINARY),
)


class _Method(AbstractQuickModule):
    """A method of the module, bound to its layer: a pytree, like Equinox's methods."""

    layer: Any
    name: str = eqx.field(static=True)

    @property
    def __wrapped__(self) -> Any:
        return getattr(self.layer.wrapped, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def method(module: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(module, self.name)(*args, **kwargs)

        return run_module(self.layer, method, *args, **kwargs)


_METHODS = (functools.partialmethod, functools.singledispatchmethod)


def _look_up(kind: type, name: str) -> Any:
    """Looks up a special method as Python does: in the type, not in its metaclass."""
    return next((vars(x)[name] for x in kind.__mro__ if name in vars(x)), None)


class _SameModule(NamedTuple):
    """Stands for the module itself, where that was returned."""


class _Iterated(NamedTuple):
    """Stands for an iterator, which would end with the trace in which it was made."""

    items: tuple[Any, ...]


class _Closure(NamedTuple):
    """Stands for a function that will compute with the module."""


def _encode_result(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with its result encoded so that only leaves of it are traced."""

    def run_and_encode(module: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = fn(module, *args, **kwargs)
        if result is module:
            return _SameModule()
        if isinstance(result, Iterator):
            return _Iterated(tuple(result))
        if isinstance(result, KeysView | ValuesView | ItemsView):
            return tuple(result)
        return _Closure() if _is_function(result) else result

    return run_and_encode


def _is_function(x: Any) -> bool:
    if isinstance(x, types.FunctionType):
        return x.__closure__ is not None
    if isinstance(x, eqx.Module):
        return isinstance(x, eqx.Partial) or hasattr(type(x), "__wrapped__")
    if isinstance(x, types.MethodType | functools.partial):
        return True
    inner = inspect.unwrap(x) if callable(x) else x
    return inner is not x and _is_function(inner)


def _interpreter_options(module: Any) -> CallOptions:
    name = type(module).__name__
    return CallOptions(
        on_materialise="allow" if isinstance(module, NORMS) else "warn",
        advice=f"It is done by a {name}, which `lorax.loraify` adapted: leave that "
        "array out with `exclude`, or, if it is meant, ignore the warning: "
        "`warnings.filterwarnings('ignore', category=lorax.MaterialiseWarning)`.",
        traced=f"An adapted {name} is traced, as by `jax.jit`, also where nothing else "
        "is, because it runs through `lorax.lora`: Python's own control flow cannot "
        "depend in it on the values of arrays. Use `jax.lax.cond`, `jax.numpy.where` "
        "and the like there, or leave its arrays out with `exclude` in "
        "`lorax.loraify`.",
        keeps_weights=True,
    )

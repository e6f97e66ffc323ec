"""Methods by name."""

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from .weight import AbstractLoraWeight


def list_methods() -> dict[str, list[type[AbstractLoraWeight]]]:
    """The classes of weights that have a `method`, by its name: all that there are,
    those of other packages too. One that was defined again, as in a notebook, counts
    once, as it was defined last."""
    found: dict[str, dict[str, type[AbstractLoraWeight]]] = {}
    left = [AbstractLoraWeight]
    while left:
        kind = left.pop(0)
        left += kind.__subclasses__()
        if "method" in vars(kind):
            found.setdefault(kind.method, {})[_full_name(kind)] = kind
    return {name: list(kinds.values()) for name, kinds in found.items()}


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def find_method(method: str | type[AbstractLoraWeight]) -> type[AbstractLoraWeight]:
    """The class of this name, or the class itself.

    **Raises:**

    `ValueError` if there is none, with the near misses, or if there are two;
    `TypeError` if it is neither a name nor a class of weights.
    """
    if isinstance(method, type) and issubclass(method, AbstractLoraWeight):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"`method={method!r}` must be the name of a method, or a subclass of "
            "`lorax.AbstractLoraWeight`."
        )
    known = list_methods()
    if method not in known:
        near = difflib.get_close_matches(method, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`method={method!r}` is unknown.{hint} There are "
            f"{', '.join(map(repr, sorted(known)))}. A method of your own has to be "
            "imported first."
        )
    kinds = known[method]
    if len(kinds) > 1:
        raise ValueError(
            f"Two classes have the method {method!r}: {_full_name(kinds[0])} and "
            f"{_full_name(kinds[1])}. Give one of them another name, or pass the class."
        )
    return kinds[0]


def assign_options(
    methods: Collection[type[AbstractLoraWeight]],
    options: Mapping[str, Any],
    call: str,
    others: Collection[str],
) -> dict[type[AbstractLoraWeight], dict[str, Any]]:
    """For each method those of the options that it takes: the keywords of its `create`.

    **Arguments:**

    - `call`: The function that was given the options, for error messages.
    - `others`: The arguments of that function itself.

    **Raises:**

    `TypeError` if none of the methods takes an option, with the near miss, or if one
    needs an option that is not there.
    """
    taken = {method: _list_options(method) for method in methods}
    known = {name for parameters in taken.values() for name in parameters}
    for name in options:
        if name not in known:
            raise TypeError(_explain_unknown(name, call, taken, [*others, *known]))
    for method, parameters in taken.items():
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in options:
                raise TypeError(
                    f"`method={method.method!r}` needs the option `{name}`: "
                    f"`{call}(..., method={method.method!r}, {name}=...)`."
                )
    return {
        method: {name: options[name] for name in parameters if name in options}
        for method, parameters in taken.items()
    }


def _list_options(method: type[AbstractLoraWeight]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(method.create).parameters
    return {x: y for x, y in parameters.items() if y.kind is y.KEYWORD_ONLY}


def _explain_unknown(
    name: str,
    call: str,
    taken: Mapping[type[AbstractLoraWeight], Collection[str]],
    known: Collection[str],
) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"here it is `{near[0]}`" if near else f"there are {', '.join(known)}"
    options = "; ".join(
        f"{kind.method!r} takes {', '.join(map('`{}`'.format, names)) or 'none'}"
        for kind, names in taken.items()
    )
    return f"`{call}` has no argument `{name}`: {hint}. Of options, {options}."

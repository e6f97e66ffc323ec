"""Hints for keywords that people know from other libraries."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def suggest_keywords(
    **here: str,
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """A decorator that adds a hint to the error for an unknown keyword: its name here,
    if `here` has it, or else the most similar keyword."""

    def decorate(fn: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        parameters = inspect.signature(fn).parameters
        known = [name for name, x in parameters.items() if x.kind is not x.VAR_KEYWORD]
        takes_any = len(known) < len(parameters)

        @functools.wraps(fn)
        def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            unknown = [name for name in kwargs if name not in known]
            if takes_any:
                unknown = [name for name in unknown if name in here]
            if unknown:
                raise TypeError(" ".join(_answer(fn, x, here, known) for x in unknown))
            return fn(*args, **kwargs)

        return checked

    return decorate


def _answer(fn: Any, name: str, here: dict[str, str], known: list[str]) -> str:
    close = [f"`{x}`" for x in difflib.get_close_matches(name, known, 1)]
    near = [here[name]] if name in here else close
    hint = f"here it is {near[0]}" if near else f"there are {', '.join(known)}"
    return f"`lorax.{fn.__name__}` has no argument `{name}`: {hint}."

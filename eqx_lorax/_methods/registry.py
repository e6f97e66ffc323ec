"""Methods by name."""

import difflib

from .weight import AbstractLoraWeight


def list_methods() -> dict[str, type[AbstractLoraWeight]]:
    """The classes of weights that have a `method`, by its name: all that there are,
    those of other packages too.

    **Raises:**

    `ValueError` if two classes have the same name. One that was defined again, as in a
    notebook, counts once, as it was defined last.
    """
    found: dict[str, type[AbstractLoraWeight]] = {}
    left = [AbstractLoraWeight]
    while left:
        kind = left.pop(0)
        left += kind.__subclasses__()
        if "method" not in vars(kind):
            continue
        other = found.setdefault(kind.method, kind)
        if _full_name(other) != _full_name(kind):
            raise ValueError(
                f"Two classes have the method {kind.method!r}: {_full_name(other)} and "
                f"{_full_name(kind)}. Give one of them another name."
            )
        found[kind.method] = kind
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def find_method(method: str | type[AbstractLoraWeight]) -> type[AbstractLoraWeight]:
    """The class of this name, or the class itself.

    **Raises:**

    `ValueError` if there is none, with the near misses; `TypeError` if it is neither a
    name nor a class of weights.
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
    return known[method]

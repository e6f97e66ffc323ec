"""Several adapted parameters of one module.

PEFT wraps the module once for each of them, in the order in which the module defines
them, so that the last one is outermost, and its tensors are named by their depth alone.
That order is in no file: neither the configuration's `target_parameters`, which PEFT
sorts, nor the tensors tell it.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence


Fits = Callable[[str, str], bool]


def prefix_at(parameter: str, depth: int) -> str:
    """The prefix of the tensors of a parameter that is wrapped `depth` times more."""
    module, _, _ = parameter.rpartition(".")
    return f"{module}." + "base_layer." * depth


def prefixes(order: Sequence[str]) -> dict[str, str]:
    """The prefix of the tensors of each parameter of one module, in its order."""
    return {path: prefix_at(path, i) for i, path in enumerate(reversed(order))}


def by_module(parameters: Iterable[str]) -> list[list[str]]:
    """The parameters, those of one module together."""
    modules: dict[str, list[str]] = {}
    for path in parameters:
        modules.setdefault(path.rpartition(".")[0], []).append(path)
    return list(modules.values())


def in_order(paths: Sequence[str], order: Sequence[str] | None) -> list[str] | None:
    """Those of one module as `order` has them, which names paths or the ends of them;
    `None` if it does not have them all."""
    positions = {
        path: position
        for position, name in reversed(list(enumerate(order or ())))
        for path in paths
        if f".{path}".endswith(f".{name}")
    }
    if set(positions) != set(paths):
        return None
    return sorted(paths, key=lambda path: positions[path])


def check_order(order: Sequence[str] | None, paths: Iterable[str]) -> None:
    """**Raises:**

    `TypeError` if it is no list, and `ValueError` if any name in it names nothing.
    """
    if isinstance(order, str):
        raise TypeError(f"`parameter_order={order!r}` must be a list of names.")
    known = list(paths)
    for name in order or ():
        if not any(f".{path}".endswith(f".{name}") for path in known):
            raise ValueError(
                f"`parameter_order` has {name!r}, which is the end of no path of a "
                f"parameter: {', '.join(known[:8]) or 'there is none'}."
            )


def found_order(
    paths: Sequence[str], depth: int, fits: Fits, order: Sequence[str] | None
) -> list[str]:
    """The order of the parameters of one module in a file that has `depth` of them;
    `fits` says whether the tensors with a prefix can be those of a parameter.

    **Raises:**

    `ValueError` if there is none, or several and `order` is not one of them.
    """
    module, _, _ = paths[0].rpartition(".")
    listed = ", ".join(path.rpartition(".")[2] for path in paths)
    if depth != len(paths):
        raise ValueError(
            f"{module} has adapters for {depth} of its parameters, and `names` and "
            f"`target_parameters` have {len(paths)} of them: {listed}."
        )
    if len(paths) == 1:
        return list(paths)
    said = in_order(paths, order)
    if said is not None:
        return said
    possible = [
        list(each)
        for each in itertools.permutations(paths)
        if all(fits(path, prefix) for path, prefix in prefixes(each).items())
    ]
    if len(possible) > 1:
        raise ValueError(
            f"{module} has adapters for the parameters {listed}, and no file tells "
            f"which is whose where shapes do not. {_FIX}"
        )
    return possible[0] if possible else list(paths)


_FIX = (
    "Pass `parameter_order`, their names in the order in which PyTorch's module "
    "defines them, such as `parameter_order=['gate_proj', 'up_proj']`."
)


def order_to_write(
    shapes: Mapping[str, object], order: Sequence[str] | None
) -> list[str]:
    """The order of the parameters of one module, which is taken to be that of `shapes`
    where these would tell PEFT of another.

    **Raises:**

    `ValueError` if it would not, and `order` does not say it.
    """
    said = in_order(list(shapes), order)
    if said is not None:
        return said
    for one, other in itertools.combinations(shapes, 2):
        if shapes[one] == shapes[other]:
            raise ValueError(
                f"PEFT cannot tell the adapters of {one} and {other} apart, which are "
                "of the same shapes, if their module defines them in another order. "
                f"{_FIX}"
            )
    return list(shapes)

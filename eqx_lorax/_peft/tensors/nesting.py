"""The order of several adapted parameters of one module.

PEFT wraps the module once for each parameter, in the order in which the module defines
them. The last one is outermost, and the names of its tensors tell only how deep it is.
The order itself is in no file: PEFT sorts `target_parameters` in the configuration, and
the tensors do not tell it.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence


Fits = Callable[[str, str], bool]


def make_prefix(parameter: str, depth: int) -> str:
    """The prefix of the tensors of a parameter that is inside `depth` other
    wrappers."""
    module, _, _ = parameter.rpartition(".")
    return f"{module}." + "base_layer." * depth


def make_prefixes(order: Sequence[str]) -> dict[str, str]:
    """The prefixes of the tensors of the parameters of one module, which are given in
    the order in which it defines them."""
    return {path: make_prefix(path, i) for i, path in enumerate(reversed(order))}


def group_by_module(parameters: Iterable[str]) -> list[list[str]]:
    """A list of parameters for each module."""
    modules: dict[str, list[str]] = {}
    for path in parameters:
        modules.setdefault(path.rpartition(".")[0], []).append(path)
    return list(modules.values())


def sort_as(paths: Sequence[str], order: Sequence[str] | None) -> list[str] | None:
    """The parameters of one module, sorted as in `order`, which has paths or the ends
    of paths; `None` if it lacks one of them."""
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
    """Checks that `order` is a list of the ends of `paths`.

    **Raises:**

    `TypeError` if it is a string; `ValueError` if a name in it is the end of no path.
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


def infer_order(
    paths: Sequence[str], depth: int, fits: Fits, order: Sequence[str] | None
) -> list[str]:
    """The order of the parameters of one module in a file.

    **Arguments:**

    - `paths`: The parameters.
    - `depth`: How many parameters of the module have tensors in the file.
    - `fits`: Whether the tensors with a prefix can be those of a parameter.
    - `order`: The order that the user gave, or the file has, if any.

    **Raises:**

    `ValueError` if `depth` is not the number of parameters, or if several orders are
    possible and `order` does not say which it is.
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
    said = sort_as(paths, order)
    if said is not None:
        return said
    possible = [
        list(each)
        for each in itertools.permutations(paths)
        if all(fits(path, prefix) for path, prefix in make_prefixes(each).items())
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


def choose_order(
    shapes: Mapping[str, object], order: Sequence[str] | None
) -> list[str]:
    """The order of the parameters of one module to be written. Without `order` it is
    that of `shapes`, if these differ: PEFT then notices if the order is another one.

    **Raises:**

    `ValueError` if two shapes are the same and `order` does not say which comes first.
    """
    said = sort_as(list(shapes), order)
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

"""How far the weights of a model are from those of another, as after quantising."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._bases import is_quantised
from .._factored import dense, stands_for_array
from .._methods import base_of, check_whole, is_weight, unfuse
from .._shared import format_table, is_abstract, name_group, star_numbers
from .._trees import Place, Places


@dataclasses.dataclass(frozen=True)
class TargetError:
    """How far one weight is from that of another model."""

    path: str
    """Where it is in the model."""
    shape: tuple[int, ...]
    """That of the array it stands for."""
    format: str
    """How it is stored: a format of `lorax.quantise`, or a dtype."""
    error: float
    """The Frobenius norm of the difference, over that of the other weight."""
    update_error: float | None
    """The same over the norm of the update that the other model has there: where it is
    above one, more was lost than the adapter had learned. `None` where there is no
    adapter."""


@dataclasses.dataclass(frozen=True)
class QuantisationError:
    """What `lorax.quantisation_error` found. Its `str` is a table."""

    targets: tuple[TargetError, ...]
    """The weights, in the order of the model."""

    @property
    def worst(self) -> float:
        """The largest error of any weight."""
        return max(target.error for target in self.targets)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The table as a string.

        **Arguments:**

        - `full`: Whether each weight has a line of its own. Otherwise weights whose
            paths differ only in numbers, of the same shape and format, are one line,
            with the largest errors.
        """
        groups: dict[Any, list[TargetError]] = {}
        for x in self.targets:
            line = x.path if full else (star_numbers(x.path), x.shape, x.format)
            groups.setdefault(line, []).append(x)
        lines = [star_numbers(group[0].path) for group in groups.values()]
        count = collections.Counter(lines)
        rows = [
            (
                name_group([x.path for x in group], count[line] == 1),
                "×".join(map(str, group[0].shape)),
                group[0].format,
                f"{max(x.error for x in group):.2%}",
                _format_largest([x.update_error for x in group]),
            )
            for line, group in zip(lines, groups.values())
        ]
        columns = ("target", "shape", "format", "error", "of update")
        return format_table(columns, columns[3:], rows)


def _format_largest(errors: list[float | None]) -> str:
    known = [x for x in errors if x is not None]
    return f"{max(known):.2%}" if known else ""


def quantisation_error(model: Any, reference: Any) -> QuantisationError:
    """Measures how far the weights of a model are from those of another one: what
    `lorax.quantise` has rounded away, how much of that LoftQ has saved, or what is left
    of an adapter after `lorax.unloraify(..., requantise=True)`.

    !!! example

        ```python
        print(lorax.quantisation_error(lorax.quantise(model), model))
        ```

    **Arguments:**

    - `model`: A model, or a tree of parameters, with or without adapters. Each weight
        counts as a whole, with its adapter.
    - `reference`: Another one with the same paths.

    **Returns:**

    A `lorax.QuantisationError`, with an entry for each weight that is quantised or has
    an adapter in either of the two. As a string it is a table. One weight after the
    other is formed, in float32 or wider.

    **Raises:**

    `ValueError` if there is no such weight, if one is not in both, if there are shapes
    instead of numbers, or if either is a part of `lorax.partition`.
    """
    check_whole(model, "lorax.quantisation_error({}, reference)")
    check_whole(reference, "lorax.quantisation_error(model, {})", "reference")
    found = tuple(_measure_all(Places(model), Places(reference)))
    if not found:
        raise ValueError(
            "Neither `model` nor `reference` has a quantised weight or an adapter. "
            "Call `lorax.quantise` first."
        )
    return QuantisationError(found)


def _measure_all(places: Places, others: Places) -> Iterator[TargetError]:
    arrays, there = ({x.path: x for x in y.all if x.is_array} for y in (places, others))
    for path in [*arrays, *(path for path in there if path not in arrays)]:
        pair = arrays.get(path), there.get(path)
        if not any(x is not None and stands_for_array(x.node) for x in pair):
            continue
        place, other = pair
        if place is None or other is None or place.node.shape != other.node.shape:
            shapes = ["none" if x is None else str(tuple(x.node.shape)) for x in pair]
            raise ValueError(
                f"{'.'.join(path)} is of shape {shapes[0]} in `model` and {shapes[1]} "
                "in `reference`. Pass two states of one model."
            )
        if is_abstract((place.node, other.node)):
            raise ValueError(
                f"{place.dotted} has a shape in the place of numbers. Call "
                "`lorax.quantisation_error` with models that have arrays."
            )
        yield _measure(place, other)


def _measure(place: Place, other: Place) -> TargetError:
    lost, size, update = map(float, jax.device_get(_norms(place.node, other.node)))
    base = base_of(place.node)
    return TargetError(
        path=place.dotted,
        shape=tuple(place.node.shape),
        format=name_format(base),
        error=_ratio(lost, size),
        update_error=_ratio(lost, update) if is_weight(other.node) else None,
    )


def name_format(base: Any) -> str:
    """How an array is stored: a format of `lorax.quantise`, or a dtype."""
    return base.format.name if is_quantised(base) else jnp.dtype(base.dtype).name


def _ratio(x: float, y: float) -> float:
    return 0.0 if x == 0 else x / y if y else math.inf


@jax.jit
def _norms(node: Any, other: Any) -> tuple[Array, Array, Array]:
    """The Frobenius norms of the difference, of `other`, and of its update."""
    node, other = unfuse(node), unfuse(other)
    found, wanted, base = map(_form, (node, other, base_of(other)))
    pairs = found - wanted, wanted, wanted - base
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x))))  # noqa: E731
    return norm(pairs[0]), norm(pairs[1]), norm(pairs[2])


def _form(x: Any) -> Array:
    array = dense(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))

"""The form of a fresh adapter: its rank, axes and scale."""

import dataclasses
import glob
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._layers import find_axes, is_known_layer, list_adapted_names
from .._methods import AbstractLoraWeight, find_method
from .._shared import list_some, Placement
from .._trees import LoraSpec, Pattern, Place
from .options import group_by_pattern, resolve_per_array
from .targets import Target


Axes = tuple[int, ...]

_DEFAULT_RANK = 8


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of the fresh adapter of one array."""

    rank: int
    rows: Axes
    columns: Axes
    alpha: float
    rank_stabilised: bool
    sharding: Placement
    method: type[AbstractLoraWeight]


def resolve_forms(
    targets: Sequence[Target],
    *,
    rank: Any,
    alpha: Any,
    rank_stabilised: bool,
    sharding: Any,
    method: Any,
) -> dict[Place, Form]:
    """Finds the form for each array of each target. The options are those of `loraify`.

    **Raises:**

    `ValueError` or `TypeError` if an option is out of range for any array, or if axes
    would have to be guessed and the guess is implausible.
    """
    ranks = resolve_per_array(rank, targets, "rank", None)
    alphas = resolve_per_array(alpha, targets, "alpha", None)
    shardings = resolve_per_array(sharding, targets, "sharding", None)
    methods = resolve_per_array(method, targets, "method", "lora")
    requests = {array: _Request(array, value) for array, value in ranks.items()}
    _check_fit([x for x in requests.values() if x.is_invalid], rank, targets)
    forms = {}
    for array, request in requests.items():
        spec = request.spec
        numerator = alphas[array] if spec.alpha is None else spec.alpha
        _check_alpha(array, numerator)
        forms[array] = Form(
            spec.rank,
            request.rows,
            request.columns,
            float(spec.rank if numerator is None else numerator),
            rank_stabilised or spec.rank_stabilised,
            shardings[array] if spec.sharding is None else spec.sharding,
            find_method(methods[array]),
        )
    return forms


def infer_axes(array: Place) -> tuple[Axes, Axes]:
    """The default row and column axes of an array of a module, counted from the end."""
    assert array.owner is not None
    return find_axes(array.owner.module, array.path[-1], len(array.node.shape))


class _Request:
    """The form of one array that `rank` asks for, before it is checked."""

    def __init__(self, array: Place, value: Any):
        _check_rank(value)
        self.array = array
        self.shape = tuple(array.node.shape)
        spec = value if isinstance(value, LoraSpec) else LoraSpec(value or 0)
        has_axes = not (spec.rows is None and spec.columns is None and not spec.batch)
        try:
            axes = spec.axes(len(self.shape)) if has_axes else infer_axes(array)
        except ValueError as error:
            raise ValueError(f"{array.dotted} {self.shape}: {error}") from None
        self.rows, self.columns = axes
        # The axes of known layers and convolutions are known. In any other array of
        # several axes, the last two may or may not be a matrix.
        is_matrix = len(self.shape) == 2
        self.is_guess = not (has_axes or is_matrix or _has_known_axes(array))
        self.requested = _DEFAULT_RANK if value is None else spec.rank
        rank = min(self.requested, self.limit) if value is None else self.requested
        self.spec = dataclasses.replace(spec, rank=rank)

    @property
    def sides(self) -> tuple[int, int]:
        """The size of the rows, and that of the columns."""
        rows, columns = (
            math.prod(self.shape[axis] for axis in axes)
            for axes in (self.rows, self.columns)
        )
        return rows, columns

    @property
    def limit(self) -> int:
        """The largest rank: the smaller side."""
        return min(self.sides)

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of elements of the adapter, and of the base."""
        base, matrix = math.prod(self.shape), math.prod(self.sides)
        return self.spec.rank * sum(self.sides) * (base // matrix), base

    @property
    def is_invalid(self) -> bool:
        """Whether the rank is too large, or the axes are a guess that gives an adapter
        as large as the array."""
        is_large = self.is_guess and self.sizes[0] >= self.sizes[1]
        return self.spec.rank > self.limit or is_large

    @property
    def suggestion(self) -> Any:
        """A value of `rank` that would be valid."""
        if not self.is_guess:
            spec = dataclasses.replace(self.spec, rank=self.limit)
            return spec.rank if spec == LoraSpec(spec.rank) else spec
        # One adapter for the whole array, with the axes split where the factors are
        # smallest: between the axes of heads and the axis of the model.
        shape, ndim = self.shape, len(self.shape)
        cut = min(
            range(1, ndim), key=lambda i: math.prod(shape[:i]) + math.prod(shape[i:])
        )
        limit = min(math.prod(shape[:cut]), math.prod(shape[cut:]))
        return dataclasses.replace(
            self.spec,
            rank=min(self.requested, limit),
            rows=tuple(range(cut)),
            columns=tuple(range(cut, ndim)),
        )

    @property
    def confirmation(self) -> LoraSpec:
        """The guess as an explicit spec."""
        ndim = len(self.shape)
        return dataclasses.replace(
            self.spec,
            rank=min(self.spec.rank, self.limit),
            rows=(ndim - 2,),
            columns=(ndim - 1,),
            batch=tuple(range(ndim - 2)),
        )


def _has_known_axes(array: Place) -> bool:
    assert array.owner is not None
    module = array.owner.module
    if array.path[-1] not in list_adapted_names(module):
        return False
    return is_known_layer(module) or infer_axes(array) != ((-2,), (-1,))


def _check_fit(wrong: Sequence[_Request], rank: Any, targets: Sequence[Target]) -> None:
    if not wrong:
        return
    groups = _group_problems(wrong, targets)
    listed = [_describe_problems(pattern, found) for pattern, found in groups.items()]
    fix: dict[Pattern, Any] = {
        pattern: found[0].suggestion for pattern, found in groups.items()
    }
    others = rank if isinstance(rank, Mapping) else {} if rank is None else {"*": rank}
    fix |= {pattern: value for pattern, value in others.items() if pattern not in fix}
    items = ", ".join(
        f"{pattern!r}: {_format(fix[pattern])}"
        for pattern in group_by_pattern(fix, targets)
    )
    guesses = [x for x in wrong if x.is_guess]
    if guesses:
        hint = (
            f"Say which axes are rows and which are columns: `rank={{{items}}}`. Where "
            "leading axes do number layers or experts, they are `batch`: "
            f"`{_format(guesses[0].confirmation)}`."
        )
    else:
        hint = f"Give these a rank of their own, `rank={{{items}}}`, or no rank at all"
        hint += ", which takes what fits; or leave them out, with `exclude`."
    raise ValueError(f"{list_some(listed, 5, separator='; ')}. {hint}")


def _describe_problems(pattern: Pattern, found: Sequence[_Request]) -> str:
    first, count = found[0], len(found)
    name = pattern if count > 1 else first.array.dotted
    several = f" × {count}" if count > 1 else ""
    what = f"{name} {first.shape}{several}"
    if not first.is_guess:
        return (
            f"`rank={first.spec.rank}` exceeds the smaller side, {first.limit}, of "
            f"{what}"
        )
    adapter, base = first.sizes
    *batch, rows, columns = first.shape
    return (
        f"{what} was taken for {math.prod(batch)} matrices {(rows, columns)}, which "
        f"`rank={first.spec.rank}` gives {adapter:,} trained numbers over {base:,} "
        "frozen ones"
    )


def _group_problems(
    wrong: Sequence[_Request], targets: Sequence[Target]
) -> dict[Pattern, list[_Request]]:
    """Groups the problems by patterns that match nothing else. Numbered siblings with
    the same suggestion are one group."""
    alike: dict[tuple[str, str], list[_Request]] = {}
    for one in wrong:
        names = [glob.escape(name) for name in one.array.dotted.split(".")]
        siblings = ".".join("*" if name.isdigit() else name for name in names)
        alike.setdefault((siblings, repr(one.suggestion)), []).append(one)
    groups: dict[Pattern, list[_Request]] = {}
    for (siblings, _), found in alike.items():
        arrays = {one.array for one in found}
        if len(found) > 1 and set(_match_arrays(siblings, targets)) == arrays:
            groups[siblings] = found
            continue
        for one in found:
            exact: Pattern = glob.escape(one.array.dotted)
            if _match_arrays(exact, targets) != [one.array]:
                exact = re.compile(re.escape(one.array.dotted))
            groups[exact] = [one]
    return groups


def _match_arrays(pattern: Pattern, targets: Sequence[Target]) -> list[Place]:
    return group_by_pattern([pattern], targets).get(pattern, [])


def _format(value: Any) -> str:
    """The code that makes `value`."""
    if not isinstance(value, LoraSpec):
        return repr(value)
    others = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if field.name != "rank" and getattr(value, field.name) != field.default
    ]
    return f"lorax.LoraSpec({', '.join([str(value.rank), *others])})"


def _check_rank(value: Any) -> None:
    rank = value.rank if isinstance(value, LoraSpec) else value
    if rank is None and not isinstance(value, LoraSpec):
        return
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"`rank={value!r}` must be an integer or a `lorax.LoraSpec`.")
    if rank < 1:
        raise ValueError(f"`rank={value}` must be at least 1.")


def _check_alpha(array: Place, alpha: Any) -> None:
    if alpha is None:
        return
    if not isinstance(alpha, int | float | np.number) or isinstance(alpha, bool):
        raise TypeError(
            f"`alpha={alpha!r}` must be a Python number: it is static, not trained."
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"`alpha={alpha}` for {array.dotted} must be positive and finite; "
            "`alpha=None` makes the scale 1."
        )

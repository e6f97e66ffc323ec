"""The spectra of updates, as a table and as a picture."""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._shared import format_table, name_group, star_numbers
from .drawing import draw_spectra


@dataclasses.dataclass(frozen=True)
class TargetSpectrum:
    """The singular values of the update of one weight, or of one layer of a stack."""

    path: str
    """Where the weight is in the model."""
    layer: tuple[int, ...]
    """The index of the layer in its stack; empty where there is none."""
    shape: tuple[int, int]
    """The numbers of rows and of columns, with all axes of a side in one."""
    rank: int
    """The number of the singular values that may be other than zero."""
    values: tuple[float, ...]
    """These singular values, the largest first."""
    size: float
    """The Frobenius norm of the update over that of the base."""
    spectral_size: float | None
    """The largest singular value of the update over that of the base. Like all below,
    it is known only if intruders were counted."""
    similarities: tuple[float, ...] | None
    """For each of the leading left singular vectors of the merged weight the largest
    cosine similarity that it has with one of the base's."""
    intruders: int | None
    """How many of these are below the threshold."""

    @property
    def name(self) -> str:
        """The path, with the index of the layer: `"layers.weight[2]"`."""
        if not self.layer:
            return self.path
        return f"{self.path}[{', '.join(map(str, self.layer))}]"

    @property
    def effective_rank(self) -> float:
        """`exp` of the entropy of the singular values, which are normalised to the sum
        one: `rank` if they are all equal, 1 if there is only one, 0 if none.

        ??? cite

            Roy and Vetterli, *The effective rank: a measure of effective
            dimensionality*, 2007.
        """
        total = sum(self.values)
        if total == 0:
            return 0.0
        shares = [value / total for value in self.values if value > 0]
        return math.exp(-sum(share * math.log(share) for share in shares))

    @property
    def stable_rank(self) -> float:
        """The sum of the squares of the singular values over the largest square. Small
        ones count less than in the effective rank."""
        if not self.values or self.values[0] == 0:
            return 0.0
        return sum((value / self.values[0]) ** 2 for value in self.values)

    @property
    def tail(self) -> float:
        """The smallest of the singular values over the largest."""
        if not self.values or self.values[0] == 0:
            return 0.0
        return self.values[-1] / self.values[0]


@dataclasses.dataclass(frozen=True)
class Spectra:
    """What `lorax.spectra` found. Its `str` is a table."""

    targets: tuple[TargetSpectrum, ...]
    """In the order of the model, each layer of a stack apart."""

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The table as a string: for each target its rank, its effective and its stable
        rank, its `tail`, its `size`, and its intruders if they were counted.

        **Arguments:**

        - `full`: Whether each target, and each layer of a stack, has a line of its own.
            Otherwise those whose names differ only in numbers, and that have the same
            shape and rank, are one line, with the smallest and the largest of each
            number, and all intruders together.
        """
        groups = [(x.name, [x]) for x in self.targets] if full else self._groups()
        has_intruders = any(x.intruders is not None for x in self.targets)
        columns = _COLUMNS + ("intruders",) * has_intruders
        rows = [
            (name, *_format_group(group), *_count_intruders(group) * has_intruders)
            for name, group in groups
        ]
        table = format_table(columns, columns[2:], rows)
        return "\n".join([table, *_judge(self.targets)])

    def _groups(self) -> list[tuple[str, list[TargetSpectrum]]]:
        alike: dict[Any, list[TargetSpectrum]] = {}
        for target in self.targets:
            key = _star(target), target.shape, target.rank
            alike.setdefault(key, []).append(target)
        count = collections.Counter(star for star, *_ in alike)
        return [
            (_name(group, count[star] == 1), group)
            for (star, *_), group in alike.items()
        ]

    def plot(
        self, file: str | os.PathLike[str] | None = None, *, most: int = 64
    ) -> Any:
        """Draws a heat map: a row for each target, sorted by kind, a column for each
        singular value, relative to the largest of its row, and beside it the size of
        the update relative to its base.

        Needs Matplotlib: `pip install "eqx-lorax[plots]"`.

        **Arguments:**

        - `file`: Where to write the picture, as a PNG, PDF or SVG by its name.
        - `most`: The most singular values that are drawn of a row.

        **Returns:**

        The `matplotlib.figure.Figure`.
        """
        kinds = list(dict.fromkeys(map(_star, self.targets)))
        targets = sorted(self.targets, key=lambda x: kinds.index(_star(x)))
        width = max([1, *(min(most, len(x.values)) for x in targets)])
        heat = np.full((len(targets), width), np.nan)
        for row, target in zip(heat, targets):
            values = np.array(target.values[:width])
            row[: len(values)] = values / max(values.max(initial=0), 1e-30)
        figure = draw_spectra(
            heat,
            names=[x.name for x in targets],
            sizes=[x.size for x in targets],
            kinds=[_star(x) for x in targets],
        )
        if file is not None:
            figure.savefig(os.fspath(file), dpi=150)
        return figure


_COLUMNS = ("target", "shape", "rank", "effective", "stable", "tail", "size")


def _star(target: TargetSpectrum) -> str:
    return star_numbers(target.path) + "[*]" * bool(target.layer)


def _name(group: Sequence[TargetSpectrum], is_only: bool) -> str:
    if not group[0].layer or len(group) == 1:
        return name_group([x.name for x in group], is_only)
    # Layers of one stack, or of several, whose paths differ in numbers.
    paths = list(dict.fromkeys(x.path for x in group))
    name, _, _ = name_group(paths, is_only).partition(" × ")
    return f"{name}[*] × {len(group)}"


def _format_group(group: Sequence[TargetSpectrum]) -> tuple[str, ...]:
    first = group[0]
    return (
        "×".join(map(str, first.shape)),
        str(first.rank),
        _range(group, lambda x: f"{x.effective_rank:.1f}", lambda x: x.effective_rank),
        _range(group, lambda x: f"{x.stable_rank:.1f}", lambda x: x.stable_rank),
        _range(group, lambda x: f"{x.tail:.2g}", lambda x: x.tail),
        _range(group, lambda x: f"{x.size:.2%}", lambda x: x.size),
    )


def _range(
    group: Sequence[TargetSpectrum],
    text: Callable[[TargetSpectrum], str],
    number: Callable[[TargetSpectrum], float],
) -> str:
    ends = text(min(group, key=number)), text(max(group, key=number))
    return "–".join(dict.fromkeys(ends))


def _count_intruders(group: Sequence[TargetSpectrum]) -> tuple[str]:
    found = sum(x.intruders or 0 for x in group)
    return (f"{found} of {sum(len(x.similarities or ()) for x in group)}",)


def _judge(targets: Sequence[TargetSpectrum]) -> list[str]:
    """Two lines: how many targets use all of their rank, and how many little of it."""
    # A rank of one is always used, and a full one cannot be too small.
    judged = [x for x in targets if 1 < x.rank < min(x.shape)]
    shares = [x.effective_rank / x.rank for x in judged]
    full, spare = sum(x > 0.9 for x in shares), sum(x < 0.5 for x in shares)
    of_all = f"of {len(targets):,}  with an effective rank"
    return [
        f"full   {full:>5,} {of_all} above 90 % of the rank: a larger one may help",
        f"spare  {spare:>5,} {of_all} below 50 % of the rank: a smaller one may do",
    ]

"""What the weights of all methods with rows and columns have in common."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .._factored import factor_shapes, Factored, Labels
from .._shared import axes_from_end, multiply
from .fresh import compute_scale
from .missing import is_missing
from .parts import find_misfits
from .weight import AbstractLoraWeight


_Self = TypeVar("_Self", bound="AbstractSidedWeight")


class AbstractSidedWeight(AbstractLoraWeight):
    """A weight that declares the axes of its arrays, for methods with one file each.

    The axes of the base are *rows*, *columns* and, all the others, *batch* axes, which
    come first in every array.
    """

    rows: eqx.AbstractVar[tuple[int, ...]]
    columns: eqx.AbstractVar[tuple[int, ...]]

    axes: ClassVar[dict[str, tuple[str, ...]]]
    """For each array beside the base, by field, what its axes are after the batch axes:
    `"rows"`, `"columns"` or any other word, such as `"rank"`. Axes with the same word
    have the same size."""

    def __check_init__(self):
        if is_missing(self.w):
            return
        if problems := list(find_misfits(self)):
            raise ValueError(
                f"The arrays of a {type(self).__name__} do not fit each other: "
                f"{'; '.join(problems)}."
            )

    def array_axes(self) -> dict[str, Labels]:
        sides = {"rows": self.rows, "columns": self.columns}
        batch = self.batch_axes()
        return {
            name: [*batch, *(x for word in words for x in sides.get(word, (word,)))]
            for name, words in self.used_axes().items()
        }

    def used_axes(self) -> dict[str, tuple[str, ...]]:
        """Those of `axes` whose arrays this weight has. All, unless its settings say
        that there are none."""
        return self.axes

    def batch_axes(self) -> list[int]:
        """The batch axes of the base, counted from the end."""
        owned = {*self.rows, *self.columns}
        return [axis for axis in axes_from_end(self.w.ndim) if axis not in owned]

    def to_form(self, b: Any, a: Any, scale: float = 1.0, **others: Any) -> Factored:
        """The normal form on this base, with these factors.

        **Raises:**

        `ValueError` if the base or an array is missing.
        """
        base, rows, columns = self.base_form(), self.rows, self.columns
        return Factored(base, b, a, scale, rows, columns, **others)

    def with_scaled(self: _Self, name: str, factor: ArrayLike) -> _Self:
        """A copy with one array `factor` times as large, rounded once to its dtype."""
        x = getattr(self, name)
        return self.with_base(self.w, **{name: multiply(x, factor).astype(x.dtype)})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return tuple(self.w.shape[axis] for axis in self.batch_axes())

    def flatten(self, x: Any, *words: str) -> Array:
        """`x` with one axis for each of `words`, its axes after the batch axes."""
        sides = {"rows": self.rows, "columns": self.columns}
        shape = list(x.shape)
        sizes: list[int] = []
        for word in reversed(words):
            count = len(sides.get(word, (word,)))
            sizes.insert(0, math.prod(shape[len(shape) - count :]))
            del shape[len(shape) - count :]
        return jnp.reshape(x, (*shape, *sizes))

    def unflatten_rows(self, b: Array) -> Array:
        """A row factor of shape `(*batch, rows, rank)` with all its rows' axes."""
        rows = [self.w.shape[axis] for axis in self.rows]
        return b.reshape(*b.shape[:-2], *rows, b.shape[-1])

    def unflatten_columns(self, a: Array) -> Array:
        """A column factor of shape `(*batch, rank, columns)` with all its columns'
        axes."""
        columns = [self.w.shape[axis] for axis in self.columns]
        return a.reshape(*a.shape[:-1], *columns)

    def lay_out(self, x: Any, owned: Sequence[int]) -> Array:
        """`x`, which has the batch axes and these axes of the base, with all axes of
        the base: of size one along the others."""
        kept = [*self.batch_axes(), *owned]
        x = jnp.transpose(x, [kept.index(axis) for axis in sorted(kept)])
        stored = axes_from_end(self.w.ndim)
        absent = [i for i, axis in enumerate(stored) if axis not in kept]
        return jnp.expand_dims(x, absent)

    def without_factors(self, dtype: Any, **others: Any) -> Factored:
        """The normal form of a weight without a low-rank update: with factors of
        zeros, of rank one."""
        shapes = factor_shapes(self.w.shape, self.rows, self.columns, 1)
        b, a = (jnp.zeros(shape, dtype) for shape in shapes)
        return self.to_form(b, a, **others)

    @property
    def rank(self) -> int:
        """The size of the axis `"rank"`."""
        # Of two parts of a model each has only some of the arrays.
        name, words = next(
            (name, words)
            for name, words in self.axes.items()
            if "rank" in words and getattr(self, name) is not None
        )
        sides = {"rows": self.rows, "columns": self.columns}
        after = words[words.index("rank") + 1 :]
        count = sum(len(sides.get(word, (word,))) for word in after)
        return getattr(self, name).shape[-1 - count]


def split_whole(x: Any) -> tuple[Array, Array]:
    """Matrices as their products with the identity, on the smaller side."""
    rows, columns = x.shape[-2:]
    identity = jnp.eye(min(rows, columns), dtype=x.dtype)
    identity = jnp.broadcast_to(identity, (*x.shape[:-2], *identity.shape))
    return (identity, x) if rows <= columns else (x, identity)


def choose_some(
    argument: str, numbers: Sequence[int], count: int, what: str
) -> tuple[int, ...]:
    """The numbers, as integers.

    **Raises:**

    `ValueError` if there are none, or if they are not different and from 0 to below
    `count`.
    """
    chosen = tuple(int(i) for i in numbers)
    if not chosen or len(set(chosen)) < len(chosen) or not {*chosen} <= {*range(count)}:
        raise ValueError(
            f"`{argument}={list(chosen)}` must be different {what}, from 0 to "
            f"{count - 1}. If there are to be more, append them to it first."
        )
    return chosen


class AbstractScaledWeight(AbstractSidedWeight):
    """A weight whose update is multiplied by `alpha / rank`."""

    alpha: eqx.AbstractVar[float]
    rank_stabilised: eqx.AbstractVar[bool]

    @property
    def scale(self) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised."""
        return compute_scale(self.alpha, self.rank, self.rank_stabilised)

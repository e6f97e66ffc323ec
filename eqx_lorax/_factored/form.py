"""The normal form of every adapted weight: a base plus a product of two factors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp

from .._shared import (
    AbstractQuickModule,
    AnyArray,
    axes_from_end,
    make_unchecked,
    multiply,
    replace_unchecked,
)
from .products import Label, Labels, RANK


# An array, another `Factored`, or anything registered with the functions of `base`.
Base: TypeAlias = Any


class Factored(AbstractQuickModule):
    """`gain * (base + scale * (b · gate · a))`; the product of the factors is never
    formed.

    This is what a `lorax.AbstractLoraWeight` computes with. Each axis of the base is a
    *row* axis (owned by `b`), a *column* axis (owned by `a`) or else a *batch* axis,
    which all arrays have.
    """

    base: Base
    """What is adapted: an array, another `Factored`, or anything that is registered
    with the functions of `base`."""

    b: AnyArray
    """The row factor, of shape `(*batch, *rows, rank)`."""

    a: AnyArray
    """The column factor, of shape `(*batch, rank, *columns)`."""

    scale: float = eqx.field(static=True, default=1.0)
    """What multiplies `b · a`."""

    # Counted from the end, because `scan` and `vmap` take leading axes away.
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    """The axes of the base that `b` owns, counted from the end."""

    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    """The axes of the base that `a` owns, counted from the end."""

    permutation: tuple[int, ...] | None = eqx.field(static=True, default=None)
    """For each axis of `shape` the stored axis of the base, counted from its end;
    `None` if the orders are the same."""

    gain: AnyArray | None = None
    """Multiplies base and update. It has all stored axes of the base: of full size
    along batch axes, of full size or one along rows and columns."""

    gate: AnyArray | None = None
    """Multiplies each component of the rank, of shape `(*batch, rank)`."""

    fuses: bool | None = eqx.field(static=True, default=None)
    """Whether a product forms base + update and multiplies once, in the place of three
    times; `None` where that is faster. See `lorax.merged_forward`."""

    has_frozen_base: bool = eqx.field(static=True, default=True)
    """Whether no derivative is taken in the base. `False` once a trained array was
    concatenated to it."""

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[-1 - len(self.columns)]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        if self.permutation is None:
            return tuple(self.base.shape)
        return tuple(self.base.shape[axis] for axis in self.logical_axes())

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return self.base.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.base.dtype

    @staticmethod
    def of(
        base: Base,
        b: AnyArray,
        a: AnyArray,
        scale: float,
        rows: tuple[int, ...],
        columns: tuple[int, ...],
    ) -> "Factored":
        """The form with these parts. The constructor, by Equinox, takes longer than a
        small product."""
        return make_unchecked(
            Factored,
            base=base,
            b=b,
            a=a,
            scale=scale,
            rows=rows,
            columns=columns,
            permutation=None,
            gain=None,
            gate=None,
            fuses=None,
            has_frozen_base=True,
        )

    def replace(self, **changes: Any) -> "Factored":
        """A copy with some fields replaced, unchecked."""
        return replace_unchecked(self, **changes)

    def check_shapes(self) -> None:
        """**Raises:**

        `ValueError` if base and factors do not fit each other, as after `vmap` or
        `scan` over an axis that is no batch axis.
        """
        ndim = self.base.ndim
        shapes = None
        has_axes = all(axis >= -ndim for axis in (*self.rows, *self.columns))
        if has_axes and len(self.a.shape) > len(self.columns):
            shapes = factor_shapes(self.base.shape, self.rows, self.columns, self.rank)
        if shapes != (tuple(self.b.shape), tuple(self.a.shape)):
            raise not_of_one_weight(self.base, self.b, self.a)

    def differentiable_base(self) -> Base:
        """The base, with its gradient stopped if it is frozen."""
        return lax.stop_gradient(self.base) if self.has_frozen_base else self.base

    def without_gate(self) -> "Factored":
        """The same without a gate, which is multiplied into the smaller factor. That is
        not rounded to a narrow dtype."""
        gate = self.gate
        if gate is None:
            return self
        if self.b.size <= self.a.size:
            gate = jnp.expand_dims(gate, range(gate.ndim - 1, self.b.ndim - 1))
            return self.replace(b=multiply(self.b, gate), gate=None)
        gate = jnp.expand_dims(gate, range(gate.ndim, self.a.ndim))
        return self.replace(a=multiply(self.a, gate), gate=None)

    def logical_axes(self) -> tuple[int, ...]:
        """The stored axes, counted from the end, in the order of `shape`."""
        ndim = self.base.ndim
        if self.permutation is None:
            return tuple(axes_from_end(ndim))
        # Leading axes that `scan` or `vmap` took away are no longer there, and those
        # that they added come first.
        logical = tuple(axis for axis in self.permutation if axis >= -ndim)
        return (*range(-ndim, -len(logical)), *logical)

    def transpose(self, axes: Sequence[int]) -> "Factored":
        """A view with the axes in another order, as in `jax.numpy.transpose`. Nothing
        is moved."""
        logical = self.logical_axes()
        return self.with_axes([logical[axis] for axis in axes])

    def with_axes(self, logical: Sequence[int]) -> "Factored":
        """A view that shows the stored axes in this order."""
        is_stored = tuple(logical) == tuple(axes_from_end(len(logical)))
        return self.replace(permutation=None if is_stored else tuple(logical))

    def stored_labels(self, labels: Labels) -> tuple[Label, ...]:
        """`labels`, one for each axis of `shape`, in the order of the stored axes."""
        if self.permutation is None:
            return tuple(labels)
        by_axis = dict(zip(self.logical_axes(), labels, strict=True))
        return tuple(by_axis[axis] for axis in axes_from_end(self.base.ndim))

    def batch_axes(self) -> tuple[int, ...]:
        """The stored axes that are neither rows nor columns, counted from the end."""
        owned = {*self.rows, *self.columns}
        return tuple(x for x in axes_from_end(self.base.ndim) if x not in owned)

    def b_labels(self, stored: Labels) -> list[Label]:
        """The labels of the axes of `b`, given those of the stored axes."""
        return [stored[axis] for axis in (*self.batch_axes(), *self.rows)] + [RANK]

    def a_labels(self, stored: Labels) -> list[Label]:
        """The labels of the axes of `a`, given those of the stored axes."""
        batch = [stored[axis] for axis in self.batch_axes()]
        return [*batch, RANK, *(stored[axis] for axis in self.columns)]

    def gain_labels(self, stored: Labels) -> list[Label]:
        """The labels of the axes of the gain; `None` where it has size one and the base
        has not."""
        assert self.gain is not None
        is_full = [x == y for x, y in zip(self.gain.shape, self.base.shape)]
        return [x if full else None for x, full in zip(stored, is_full)]

    def gate_labels(self, stored: Labels) -> list[Label]:
        """The labels of the axes of the gate, given those of the stored axes."""
        return [*(stored[axis] for axis in self.batch_axes()), RANK]

    def map_factors(
        self, fn: Callable[[Any, Labels], Any], labels: Labels
    ) -> "Factored":
        """A copy in which every array but the base is `fn(array, its labels)`. The
        argument `labels` has one for each stored axis."""
        gain, gate = self.gain, self.gate
        return self.replace(
            b=fn(self.b, self.b_labels(labels)),
            a=fn(self.a, self.a_labels(labels)),
            gain=None if gain is None else fn(gain, self.gain_labels(labels)),
            gate=None if gate is None else fn(gate, self.gate_labels(labels)),
        )


def is_factored(x: Any) -> TypeGuard[Factored]:
    """Whether `x` is in normal form, rather than an array."""
    return isinstance(x, Factored)


def not_of_one_weight(base: Any, b: Any, a: Any) -> ValueError:
    """The error for a base and factors that do not fit each other."""
    return ValueError(
        f"A weight has the base {tuple(base.shape)} and the factors {tuple(b.shape)} "
        f"and {tuple(a.shape)}, which do not belong together. Was it sliced, by `vmap` "
        "or `scan`, along an axis that its factors do not share? For layers that are "
        "stacked along the first axis adapt with `lorax.LoraSpec(rank, batch=(0,))`."
    )


def factor_shapes(
    shape: Sequence[int], rows: Sequence[int], columns: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `b` and `a` for a base of this shape."""
    b, a = (
        tuple(rank if axis == RANK else shape[axis] for axis in axes)
        for axes in factor_axes(len(shape), rows, columns)
    )
    return b, a


def factor_axes(
    ndim: int, rows: Sequence[int], columns: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """The axes of `b` and `a`: those of the base, counted from its end, and `RANK`."""
    batch = [axis for axis in axes_from_end(ndim) if axis not in {*rows, *columns}]
    return [*batch, *rows, RANK], [*batch, RANK, *columns]

"""LoRA itself: the weight `w + scale * (b · a)`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array

from .._factored import Label, Labels, RANK
from .._shared import (
    inherit_sharding,
    known_sharding,
    multiply,
    Placement,
    resolve_sharding,
    weight_document,
)
from .weight import AbstractLoraWeight, Factor, Weight, without_base, without_factors


class LoraWeight(AbstractLoraWeight):
    """`gain * (stop_gradient(w) + scale * (b · a))`: low-rank adaptation of a weight.

    The axes of `w` are *rows* (owned by `b`), *columns* (owned by `a`) and, all the
    others, *batch* axes that the three share, such as the layers of a stack: slicing
    every leaf along a leading batch axis, as `jax.lax.scan` and `jax.vmap` do, gives a
    valid `LoraWeight`. For the weight of a linear layer that is

    - `w`: `(*batch, out, in)`,
    - `b`: `(*batch, out, rank)`,
    - `a`: `(*batch, rank, in)`.

    `scale` is `alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised. There is a
    `gain` only where code has multiplied the weight with something constant along its
    rows or its columns.

    ??? cite

        [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685),
        section 4.1; [A Rank Stabilization Scaling Factor for Fine-Tuning with
        LoRA](https://arxiv.org/abs/2312.03732).
    """

    w: Weight
    b: Factor
    a: Factor
    # Static on purpose: as a scalar array `alpha` would be trained by `jax.grad` over
    # the tree, and could not be sliced by a `scan` over stacked layers.
    alpha: float = eqx.field(static=True, default=1.0)
    # Counted from the end, because `scan` and `vmap` take leading axes away.
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)
    # The axes of `w` in the order in which this weight shows them, `None` if the same.
    order: tuple[int, ...] | None = eqx.field(static=True, default=None)
    # With all the axes of `w`: of their size along the batch axes, of that or one along
    # others.
    gain: Array | None = None
    # With all the axes of `b` but its rows. How much of each part of the rank there is:
    # `lorax.AdapterBank` has several adapters side by side.
    gate: Array | None = None
    # Set by `lorax.merged_forward`.
    is_merged: bool = eqx.field(static=True, default=False)
    # A base that was joined with an array has the derivatives of that array: what of it
    # is frozen was stopped before.
    has_frozen_base: bool = eqx.field(static=True, default=True)

    method = "lora"
    frozen = ("w", "gain", "gate")

    def __init__(
        self,
        w: Weight,
        b: Factor,
        a: Factor,
        alpha: int | float = 1.0,
        rows: Sequence[int] = (-2,),
        columns: Sequence[int] = (-1,),
        *,
        rank_stabilised: bool = False,
    ):
        """The factors of a convolution's kernel may also have the shapes that they have
        in jax-lorax, with `a` of shape `(1, ..., 1, rank, out)`.

        **Arguments:**

        - `w`: The base, of any shape with two axes or more and of inexact dtype.
        - `b`: The row factor, of shape `(*batch, *rows, rank)`.
        - `a`: The column factor, of shape `(*batch, rank, *columns)`. The dtype of the
            factors may be wider than that of `w`.
        - `alpha`: The numerator of the scale.
        - `rows`: The axes of `w` that `b` owns.
        - `columns`: The axes of `w` that `a` owns.
        - `rank_stabilised`: Whether the scale is `alpha / sqrt(rank)`.

        **Raises:**

        `ValueError` if the three shapes do not fit each other.
        """
        if _is_kernel_of_jax_lorax(w, b, a) and (rows, columns) == ((-2,), (-1,)):
            a, rows, columns = a.reshape(a.shape[-2:]), range(-w.ndim, -1), (-1,)
        self.w = w
        self.b = b
        self.a = a
        self.alpha = float(alpha)
        self.rows = _from_the_end(rows, w.ndim, "rows")
        self.columns = _from_the_end(columns, w.ndim, "columns")
        self.rank_stabilised = rank_stabilised
        self.order = None
        self.gain = None
        self.gate = None
        self.is_merged = False
        self.has_frozen_base = True

        if set(self.rows) & set(self.columns) or not (self.rows and self.columns):
            raise ValueError(
                f"`rows={tuple(rows)}` and `columns={tuple(columns)}` must name "
                f"different axes of `w`, at least one each; `w` has shape {w.shape}."
            )
        rank = a.shape[-1 - len(self.columns)] if a.ndim > len(self.columns) else 0
        factors = factor_shapes(w.shape, self.rows, self.columns, rank)
        if (b.shape, a.shape) != factors or rank == 0:
            raise ValueError(
                f"`b` {b.shape} and `a` {a.shape} do not fit `w` {w.shape} with "
                f"`rows={self.rows}` and `columns={self.columns}`: they must be of "
                "shapes (*batch, *rows, rank) and (*batch, rank, *columns)"
                + (f", here {factors[0]} and {factors[1]}." if rank else ".")
            )

    def as_lora(self) -> "LoraWeight":
        self._check_factors()
        if self.gate is None:
            return self
        # Of a batch of gates the smaller factor becomes a batch. It is not rounded
        # again to a narrow dtype.
        if self.b.size <= self.a.size:
            axes = range(self.gate.ndim - 1, self.b.ndim - 1)
            gated = multiply(self.b, jnp.expand_dims(self.gate, axes))
            return self.replace(b=gated, gate=None)
        axes = range(self.gate.ndim, self.a.ndim)
        gated = multiply(self.a, jnp.expand_dims(self.gate, axes))
        return self.replace(a=gated, gate=None)

    def factored(self) -> "LoraWeight":
        self._check_factors()
        return self

    def _check_factors(self) -> None:
        if self.b is None or self.a is None:
            raise without_factors(self)

    def base(self) -> Weight:
        """`w` with the derivatives that it is to have."""
        return lax.stop_gradient(self.w) if self.has_frozen_base else self.w

    def array_axes(self) -> dict[str, Labels]:
        stored = range(-self.w.ndim, 0)
        return {"b": self.b_axes(stored), "a": self.a_axes(stored)}

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[-1 - len(self.columns)]

    @property
    def scale(self) -> float:
        """What multiplies `b · a`."""
        return self.alpha / (
            math.sqrt(self.rank) if self.rank_stabilised else self.rank
        )

    def get_scale(self) -> float:
        """As `scale`, by the name that it has in jax-lorax."""
        return self.scale

    @property
    def shape(self) -> tuple[int, ...]:
        if self.w is None:
            raise without_base(self)
        return tuple(self.w.shape[axis] for axis in self.shown_axes())

    @property
    def dtype(self) -> jnp.dtype:
        if self.w is None:
            raise without_base(self)
        return self.w.dtype

    def __pdoc__(self, **options: Any) -> Any:
        return weight_document(self, **options)

    def shape_by_factors(self) -> tuple[int, ...]:
        """The shape of the base, as it is stored, where only the factors are there."""
        batch = self.b.ndim - 1 - len(self.rows)
        ndim = batch + len(self.rows) + len(self.columns)
        owned = dict(zip(self.rows, self.b.shape[batch:-1]))
        owned |= dict(zip(self.columns, self.a.shape[batch + 1 :]))
        rest = iter(self.b.shape[:batch])
        axes = range(-ndim, 0)
        return tuple(owned[i] if i in owned else next(rest) for i in axes)

    def replace(self, **changes: Any) -> "LoraWeight":
        """This weight with other values in some fields, unchecked."""
        # Not by `__init__`: a view keeps what that does not take.
        new = object.__new__(LoraWeight)
        for field in dataclasses.fields(self):
            value = changes.get(field.name, getattr(self, field.name))
            object.__setattr__(new, field.name, value)
        return new

    def shown_axes(self) -> tuple[int, ...]:
        """The axes of `w`, counted from its end, in the order of `shape`."""
        ndim = self.w.ndim
        if self.order is None:
            return tuple(range(-ndim, 0))
        # Leading axes that `scan` or `vmap` took away are no longer there to be shown,
        # those that they added come first.
        shown = tuple(axis for axis in self.order if axis >= -ndim)
        return (*range(-ndim, -len(shown)), *shown)

    def reordered(self, axes: Sequence[int]) -> "LoraWeight":
        """A view with the axes in another order, as of `jnp.transpose`."""
        shown = self.shown_axes()
        return self.replace(order=tuple(shown[axis] for axis in axes))

    def stored_labels(self, labels: Labels) -> tuple[Label, ...]:
        """`labels`, given in the order shown, in the order in which `w` is stored."""
        by_axis = dict(zip(self.shown_axes(), labels, strict=True))
        return tuple(by_axis[axis] for axis in range(-self.w.ndim, 0))

    def batch_axes(self) -> tuple[int, ...]:
        """The axes of `w` that are neither rows nor columns, counted from its end."""
        owned = {*self.rows, *self.columns}
        return tuple(axis for axis in range(-self.w.ndim, 0) if axis not in owned)

    def b_axes(self, stored: Labels) -> list[Label]:
        """The labels of the axes of `b`; `stored` are those of `w`."""
        return [stored[axis] for axis in (*self.batch_axes(), *self.rows)] + [RANK]

    def a_axes(self, stored: Labels) -> list[Label]:
        """The labels of the axes of `a`; `stored` are those of `w`."""
        batch = [stored[axis] for axis in self.batch_axes()]
        return [*batch, RANK, *(stored[axis] for axis in self.columns)]

    def map_arrays(self, fn: Callable[[Any, Labels], Any]) -> "LoraWeight":
        """This weight with `fn(array, labels)` in the place of each of its arrays. The
        labels are the axes of `w`, counted from its end, and `RANK`; `None` stands for
        an axis along which there is only one entry for all of `w`."""
        stored = range(-self.w.ndim, 0)
        gain = self.gain
        if gain is not None:
            shared = [i if gain.shape[i] == self.w.shape[i] else None for i in stored]
            gain = fn(gain, shared)
        return self.replace(
            w=fn(self.w, stored),
            b=fn(self.b, self.b_axes(stored)),
            a=fn(self.a, self.a_axes(stored)),
            gain=gain,
        )


def factor_shapes(
    shape: Sequence[int], rows: Sequence[int], columns: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `b` and `a` for a base of `shape`; `rows` and `columns` are counted
    from the end."""
    b, a = (
        tuple(rank if axis == RANK else shape[axis] for axis in axes)
        for axes in _factor_axes(len(shape), rows, columns)
    )
    return b, a


def _factor_axes(
    ndim: int, rows: Sequence[int], columns: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """The axes of `b` and `a`: those of the base, counted from its end, and `RANK`."""
    batch = [axis for axis in range(-ndim, 0) if axis not in {*rows, *columns}]
    return [*batch, *rows, RANK], [*batch, RANK, *columns]


def factor_shardings(
    name: str,
    base: Any,
    rows: Sequence[int],
    columns: Sequence[int],
    rank: int,
    placement: Placement = None,
) -> tuple[Sharding | None, Sharding | None]:
    """Where `b` and `a` of a fresh adapter lie; `name` is what errors say."""
    lying = known_sharding(base)
    shapes = factor_shapes(base.shape, rows, columns, rank)
    axes = _factor_axes(base.ndim, rows, columns)
    # A specification is a tuple too, in some versions of JAX.
    if not isinstance(placement, tuple) or isinstance(placement, PartitionSpec):
        placement = (placement, placement)
    b, a = (
        resolve_sharding(
            name, shape, each, lying, inherit_sharding(lying, base.ndim, labels)
        )
        for each, shape, labels in zip(placement, shapes, axes, strict=True)
    )
    return b, a


def _is_kernel_of_jax_lorax(w: Weight, b: Factor, a: Factor) -> bool:
    if not w.ndim == a.ndim > 2:
        return False
    *ones, rank, outputs = a.shape
    of_a_stack = (*w.shape[:-2], rank, outputs)
    return (
        set(ones) == {1}
        and a.shape != of_a_stack
        and (b.shape, outputs) == ((*w.shape[:-1], rank), w.shape[-1])
    )


def _from_the_end(axes: Sequence[int], ndim: int, name: str) -> tuple[int, ...]:
    if not all(-ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"`{name}={tuple(axes)}` names an axis that a `w` of {ndim} axes has not."
        )
    return tuple(axis - ndim if axis >= 0 else axis for axis in axes)

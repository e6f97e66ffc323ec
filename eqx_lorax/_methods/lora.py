"""LoRA itself: the weight `w + scale * (b · a)`."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jaxtyping import ArrayLike

from .._factored import (
    factor_axes,
    factor_shapes,
    Factored,
    Labels,
    not_of_one_weight,
    views,
)
from .._shared import AnyArray, axes_from_end, make_unchecked, multiply, weight_document
from .fresh import compute_scale, Fresh
from .missing import is_missing
from .relative import RelativeLoraWeight
from .weight import AbstractLoraWeight, is_weight, Weight


class LoraWeight(AbstractLoraWeight):
    """`stop_gradient(w) + scale * (b · a)`: low-rank adaptation of a weight.

    The axes of `w` are *rows* (owned by `b`), *columns* (owned by `a`) and, all the
    others, *batch* axes that the three share, such as the layers of a stack: slicing
    every leaf along a leading batch axis, as `jax.lax.scan` and `jax.vmap` do, gives a
    valid `LoraWeight`. For the weight of a linear layer that is

    - `w`: `(*batch, out, in)`,
    - `b`: `(*batch, out, rank)`,
    - `a`: `(*batch, rank, in)`.

    `scale` is `alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised.

    !!! example

        ```python
        weight = lorax.LoraWeight(w, b, a, alpha=16)
        y = weight @ x  # w @ x + 16 / rank * (b @ (a @ x))
        ```

    ??? cite

        [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685),
        section 4.1; [A Rank Stabilization Scaling Factor for Fine-Tuning with
        LoRA](https://arxiv.org/abs/2312.03732).
    """

    w: Weight
    b: AnyArray
    a: AnyArray
    # Static on purpose: as a scalar array `alpha` would be trained by `jax.grad` over
    # the tree, and could not be sliced by a `scan` over stacked layers.
    alpha: float = eqx.field(static=True, default=1.0)
    # Counted from the end, because `scan` and `vmap` take leading axes away.
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "lora"
    frozen = ("w",)
    is_plain_lora = True

    def __init__(
        self,
        w: Weight,
        b: AnyArray,
        a: AnyArray,
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

    @classmethod
    def create(cls, fresh: Fresh) -> "LoraWeight | RelativeLoraWeight":
        if fresh.changes_base:
            return RelativeLoraWeight.create(fresh)
        b, a = fresh.factors()
        return LoraWeight(fresh.w, b, a, **fresh.settings)

    @classmethod
    def from_factored(cls, form: Factored) -> "LoraWeight":
        """The weight with this normal form. A gate is multiplied into a factor, and the
        base is transposed if its axes are permuted.

        **Raises:**

        `ValueError` if the form has a gain.
        """
        if form.gain is not None:
            raise ValueError(
                "A weight that is scaled along rows or columns, as by DoRA, is no "
                "`LoraWeight`. `lorax.as_lora(model, rank=...)` makes the nearest one."
            )
        form = form.without_gate()
        if form.permutation is not None:
            form = views.store_in_order(form)
        w, rank = form.base, form.rank
        return make_unchecked(
            LoraWeight,
            w=LoraWeight.from_factored(w) if isinstance(w, Factored) else w,
            b=form.b,
            a=form.a,
            alpha=_alpha_of(form.scale, rank),
            rows=form.rows,
            columns=form.columns,
            rank_stabilised=False,
        )

    def factored(self) -> Factored:
        if is_missing(self.w) or self.b is None or self.a is None:
            self.check_whole()
        if len(self.a.shape) == len(self.columns):
            raise not_of_one_weight(self.w, self.b, self.a)
        base = self.base_form()
        return Factored.of(base, self.b, self.a, self.scale, self.rows, self.columns)

    def view(self, form: Factored) -> AbstractLoraWeight:
        is_plain = form.permutation is None and form.gate is None and form.gain is None
        if not is_plain or form.scale != self.scale:
            return super().view(form)
        w = self.w.view(form.base) if is_weight(self.w) else form.base
        return self.replace(
            w=w, b=form.b, a=form.a, rows=form.rows, columns=form.columns
        )

    def replace(self, **changes: Any) -> "LoraWeight":
        """This weight with other values in some fields, unchecked."""
        return self.with_base(changes.pop("w", self.w), **changes)

    def scaled(self, factor: ArrayLike) -> "LoraWeight":
        # `b` is rounded once, to the dtype that it had.
        return self.replace(b=multiply(self.b, factor).astype(self.b.dtype))

    def array_axes(self) -> dict[str, Labels]:
        b, a = factor_axes(self.w.ndim, self.rows, self.columns)
        return {"b": b, "a": a}

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.a.shape[-1 - len(self.columns)]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return tuple(self.b.shape[: self.b.ndim - 1 - len(self.rows)])

    @property
    def scale(self) -> float:
        """What multiplies `b · a`."""
        return compute_scale(self.alpha, self.rank, self.rank_stabilised)

    def get_scale(self) -> float:
        """The same as `scale`. This is its name in jax-lorax."""
        return self.scale

    def __pdoc__(self, **options: Any) -> Any:
        return weight_document(self, **options)

    def shape_by_factors(self) -> tuple[int, ...]:
        """The shape of the base, computed from the factors alone."""
        batch = len(self.batch_shape)
        ndim = batch + len(self.rows) + len(self.columns)
        owned = dict(zip(self.rows, self.b.shape[batch:-1]))
        owned |= dict(zip(self.columns, self.a.shape[batch + 1 :]))
        rest = iter(self.b.shape[:batch])
        axes = axes_from_end(ndim)
        return tuple(owned[i] if i in owned else next(rest) for i in axes)


def _alpha_of(scale: float, rank: int) -> float:
    """The `alpha` that gives exactly this scale. `scale * rank` may be off by a bit."""
    short = float(f"{scale * rank:.12g}")
    return short if short / rank == scale else scale * rank


def _is_kernel_of_jax_lorax(w: Weight, b: AnyArray, a: AnyArray) -> bool:
    """Whether `a` has the shape `(1, ..., 1, rank, out)` that jax-lorax gives it for
    the kernel of a convolution."""
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

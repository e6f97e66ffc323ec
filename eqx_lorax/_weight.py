"""The atom: an array-like weight that is a frozen base plus a low-rank update."""

import abc
import math
from typing import Any, ClassVar, TYPE_CHECKING, TypeAlias, TypeVar, Union

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from . import _contract, _operators
from ._arrays import is_inexact, promote, wide
from ._contract import Label, Labels
from ._operators import index_at


if TYPE_CHECKING:
    from ._lora import LoraWeight


# NumPy arrays, as models just read from a file hold them, serve as bases too.
Weight: TypeAlias = Union[Array, np.ndarray, "AbstractLoraWeight"]
_Self = TypeVar("_Self", bound="AbstractLoraWeight")

# The label of the rank axis. Unlike any axis of a weight, those being integers.
RANK = "rank"


class AbstractLoraWeight(eqx.Module):
    """An array-like that stands for a frozen base plus a trainable update.

    It has an array's `shape`, `dtype`, `ndim`, `size`, `@` on both sides, `.T`, `.mT`,
    `.astype` and indexing, none of which forms the array it stands for. For anything
    else there is `materialise()`. There is deliberately no `__jax_array__`: with it
    `x @ weight` would quietly form the dense array.

    A method (LoRA, VeRA, LoHa, ...) is a final subclass that can say itself as a
    `LoraWeight`, its *normal form*; everything else is written once, against that.
    """

    w: eqx.AbstractVar[Weight]
    """The frozen base: an array, or another weight (adapters stack by nesting)."""

    frozen: ClassVar[tuple[str, ...]]
    """The names of the fields that are never trained."""

    # NumPy on the left of `@` then leaves the product to `__rmatmul__`.
    __array_ufunc__ = None

    @abc.abstractmethod
    def as_lora(self) -> "LoraWeight":
        """This weight as base plus `scale * (b · a)`, without forming the product."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this stands for: that of the base."""

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the array this stands for."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            f"A {type(self).__name__} does not turn into an array by itself, because "
            f"that would form the dense {self.shape} weight unseen. Write "
            "`weight.materialise()` where that is meant."
        )

    def materialise(self) -> Array:
        """The array this stands for: base plus update, added in float32 or wider and
        rounded once to `dtype`. Differentiable in the factors, not in the base."""
        return _materialise(self).astype(self.dtype)

    def trainable(self: _Self) -> _Self:
        """The same structure with a bool at each leaf: `True` where it is trained."""
        spec = jax.tree.map(is_inexact, self)
        never = [getattr(self, name) for name in self.frozen]
        return eqx.tree_at(
            lambda tree: [getattr(tree, name) for name in self.frozen],
            spec,
            jax.tree.map(lambda _: False, never),
        )

    def __matmul__(self, x: ArrayLike) -> Array:
        return _round(_operators.matmul(self, x), self, x)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return _round(_operators.matmul(self, x, contract=-2), self, x)

    @property
    def T(self) -> "LoraWeight":
        """The transpose (all axes reversed). A view: the base is not moved."""
        return self.as_lora().reordered(range(self.ndim)[::-1])

    @property
    def mT(self) -> "LoraWeight":
        """The transpose of the last two axes. A view: the base is not moved."""
        *batch, rows, columns = range(self.ndim)
        return self.as_lora().reordered([*batch, columns, rows])

    def astype(self, dtype: DTypeLike) -> "LoraWeight":
        """The weight of another dtype: that of the base. The factors, which may be
        wider, keep theirs."""
        lora = self.as_lora()
        return eqx.tree_at(lambda lora: lora.w, lora, lora.w.astype(dtype))

    def __getitem__(self, item: Any) -> "LoraWeight | Array":
        """Indexing, as of an array, by integers, integer arrays and slices.

        Slices, and anything along a batch axis, give a weight that is still factored.
        An integer or an integer array along a row or column axis is a lookup (what an
        embedding does) and gives an array.
        """
        return _operators.getitem(self.as_lora(), item)

    def contract(
        self,
        x: Array,
        x_labels: Labels,
        labels: Labels,
        out_labels: Labels,
        *,
        low_rank_x: Array | None = None,
        is_frozen: bool = False,
    ) -> Array:
        """The contraction of `x` with this weight, through the rank axis.

        **Arguments:**

        - `x`: The other operand, already of the dtype that the result is to have.
        - `x_labels`: A label for each axis of `x`.
        - `labels`: A label for each axis of this weight. A label that it shares with
            `x` is summed over unless it is in `out_labels`.
        - `out_labels`: The labels of the result's axes.
        - `low_rank_x`: What the low-rank branch sees in the place of `x` (which is how
            dropout touches only that branch).
        - `is_frozen`: Whether the factors are frozen too, as below another adapter.

        **Returns:**

        The contraction, not yet rounded: in float32 where `x` or a factor is narrow.
        """
        lora = self.as_lora()
        stored = lora.stored_labels(labels)
        base = _contract_any(x, x_labels, lora.w, stored, out_labels)

        x = x if low_rank_x is None else low_rank_x
        # The factor that owns more of what is summed goes first: it shrinks `x` most.
        summed = [
            math.prod(
                lora.w.shape[axis]
                for axis in axes
                if stored[axis] in x_labels and stored[axis] not in out_labels
            )
            for axes in (lora.rows, lora.columns)
        ]
        factors = [
            (lora.b, lora.b_axes(stored)),
            (lora.a, lora.a_axes(stored)),
        ]
        (first, first_labels), (second, second_labels) = (
            factors if summed[0] > summed[1] else factors[::-1]
        )
        dtype = promote(x.dtype, first.dtype, second.dtype)
        wanted = [*out_labels, *second_labels]
        hidden_labels = [
            label
            for label in dict.fromkeys([*x_labels, *first_labels])
            if label in wanted
        ]
        hidden = _contract.product(
            x,
            x_labels,
            first,
            first_labels,
            hidden_labels,
            dtype,
            y_is_frozen=is_frozen,
        )
        hidden = hidden * lora.scale
        update = _contract.product(
            hidden,
            hidden_labels,
            second,
            second_labels,
            out_labels,
            hidden.dtype,
            y_is_frozen=is_frozen,
        )
        return _add(base, update)

    def convolve(
        self,
        x: Array,
        *,
        groups: int,
        low_rank_x: Array | None = None,
        is_frozen: bool = False,
        **conv: Any,
    ) -> Array:
        """The convolution of `x (batch, in, *spatial)` with this kernel, of shape
        `(out, in / groups, *window)`: first with `a` as the kernel, then through `b`.

        **Arguments:**

        - `x`: The images, already of the dtype that the result is to have.
        - `groups`: The number of feature groups. Every group has rows of `b` of its own
            and shares `a`, so the update has the kernel's own shape.
        - `low_rank_x`: What the low-rank branch sees in the place of `x`.
        - `is_frozen`: Whether the factors are frozen too, as below another adapter.
        - `conv`: `window_strides`, `padding`, `lhs_dilation`, `rhs_dilation`, as of
            `jax.lax.conv_general_dilated`.

        **Returns:**

        The images `(batch, out, *spatial)`, not yet rounded: in float32 where `x` or a
        factor is narrow.
        """
        lora = self.as_lora()
        base = _convolve_any(x, lora.w, groups=groups, **conv)

        x = x if low_rank_x is None else low_rank_x
        dtype = promote(x.dtype, lora.a.dtype, lora.b.dtype)
        batch, channels, *spatial = x.shape
        out, rank = lora.b.shape
        # The groups share `a`, so to it they are as good as further images.
        per_group = x.reshape(batch * groups, channels // groups, *spatial)
        hidden = _contract.convolution(
            per_group, lora.a, dtype, groups=1, kernel_is_frozen=is_frozen, **conv
        )
        window = hidden.shape[2:]
        hidden = hidden.reshape(batch, groups, rank, *window) * lora.scale
        axes = [f"spatial {i}" for i in range(len(window))]
        update = _contract.product(
            hidden,
            ["batch", "group", RANK, *axes],
            lora.b.reshape(groups, out // groups, rank),
            ["group", "out", RANK],
            ["batch", "group", "out", *axes],
            hidden.dtype,
            y_is_frozen=is_frozen,
        )
        return _add(base, update.reshape(batch, out, *window))

    def look_up(self, position: int, index: ArrayLike) -> Array:
        """The entries at `index` along the axis at `position`; the axes of `index`
        stand where that axis stood. Not yet rounded: in float32 where a dtype is
        narrow."""
        lora = self.as_lora()
        axis = lora.shown_axes()[position]
        stored: list[Label] = list(range(-lora.w.ndim, 0))
        index_labels: list[Label] = [f"index {i}" for i in range(jnp.ndim(index))]

        def indexed(labels: list[Label]) -> list[Label]:
            at = labels.index(axis)
            return labels[:at] + index_labels + labels[at + 1 :]

        base = _look_up_any(lora.w, axis % lora.w.ndim, index)
        b, b_labels = lora.b, lora.b_axes(stored)
        a, a_labels = lora.a, lora.a_axes(stored)
        if axis in b_labels:
            b, b_labels = index_at(b, b_labels.index(axis), index), indexed(b_labels)
        if axis in a_labels:
            a, a_labels = index_at(a, a_labels.index(axis), index), indexed(a_labels)
        found_labels = indexed(stored)
        update = lora.scale * _contract.product(
            b, b_labels, a, a_labels, found_labels, promote(b.dtype, a.dtype)
        )
        shown: list[Label] = list(lora.shown_axes())
        order = [found_labels.index(label) for label in indexed(shown)]
        return lax.transpose(_add(base, update), order)


def _round(y: Array, weight: AbstractLoraWeight, x: ArrayLike) -> Array:
    return y.astype(jnp.result_type(x, weight.dtype))


def _add(base: Array, update: Array) -> Array:
    dtype = promote(base.dtype, update.dtype)
    return base.astype(dtype) + update.astype(dtype)


# A base is an array or again a weight: the four things that are done to a base.


def _contract_any(
    x: Array, x_labels: Labels, w: Weight, labels: Labels, out_labels: Labels
) -> Array:
    if isinstance(w, AbstractLoraWeight):
        return w.contract(x, x_labels, labels, out_labels, is_frozen=True)
    return _contract.product(
        x, x_labels, jnp.asarray(w), labels, out_labels, x.dtype, y_is_frozen=True
    )


def _convolve_any(x: Array, w: Weight, **conv: Any) -> Array:
    if isinstance(w, AbstractLoraWeight):
        return w.convolve(x, is_frozen=True, **conv)
    return _contract.convolution(
        x, jnp.asarray(w), x.dtype, kernel_is_frozen=True, **conv
    )


def _look_up_any(w: Weight, position: int, index: ArrayLike) -> Array:
    w = lax.stop_gradient(w)
    if isinstance(w, AbstractLoraWeight):
        return w.look_up(position, index)
    return index_at(jnp.asarray(w), position, index).astype(wide(w.dtype))


def _materialise(w: Weight) -> Array:
    if not isinstance(w, AbstractLoraWeight):
        return jnp.asarray(w, wide(w.dtype))
    lora = w.as_lora()
    base = _materialise(lax.stop_gradient(lora.w))
    stored = range(-lora.w.ndim, 0)
    update = lora.scale * _contract.product(
        lora.b,
        lora.b_axes(stored),
        lora.a,
        lora.a_axes(stored),
        stored,
        promote(lora.b.dtype, lora.a.dtype),
    )
    dense = _add(base, update)
    return lax.transpose(dense, [axis % dense.ndim for axis in lora.shown_axes()])

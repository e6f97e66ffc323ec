"""The atom: an array-like weight that is a frozen base plus a low-rank update."""

import abc
import math
from typing import (
    Any,
    ClassVar,
    TYPE_CHECKING,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from . import _contract, _operators, _views
from ._arrays import is_inexact, promote
from ._contract import Labels, portable, Precision


if TYPE_CHECKING:
    from ._lora import LoraWeight


# NumPy arrays, as models just read from a file hold them, serve as bases too.
Weight: TypeAlias = Union[Array, np.ndarray, "AbstractLoraWeight"]
_Self = TypeVar("_Self", bound="AbstractLoraWeight")


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
        return _views.dense(self).astype(self.dtype)

    def trainable(self: _Self) -> _Self:
        """The same structure with a bool at each leaf: `True` where it is trained."""
        spec = jax.tree.map(is_inexact, self)
        never = [getattr(self, name) for name in self.frozen]
        return eqx.tree_at(
            lambda tree: [getattr(tree, name) for name in self.frozen],
            spec,
            jax.tree.map(lambda _: False, never),
            is_leaf=lambda x: x is None,
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
        return _views.convert(self, dtype)

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
        precision: Precision = None,
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
        - `precision`: As of `jax.lax.dot_general`.

        **Returns:**

        The contraction, not yet rounded: in float32 where `x` or a factor is narrow.
        """
        lora = self.as_lora()
        stored = lora.stored_labels(labels)
        low_rank_x = x if low_rank_x is None else low_rank_x
        gain, gain_labels = lora.gain, stored
        if gain is not None:
            gain, gain_labels = _contract.varying(gain, stored)
            if not set(gain_labels) <= set(out_labels):
                # What is summed over is scaled before.
                x, _ = _scaled_before(x, x_labels, gain, gain_labels)
                low_rank_x, x_labels = _scaled_before(
                    low_rank_x, x_labels, gain, gain_labels
                )
                gain = None
        base = _contract_any(x, x_labels, lora.w, stored, out_labels, precision)

        x, precision = low_rank_x, portable(precision)
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
            precision=precision,
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
            precision=precision,
        )
        y = _views.add(base, update)
        if gain is None:
            return y
        return _contract.scaled(y, out_labels, gain, gain_labels)


def _round(y: Array, weight: AbstractLoraWeight, x: ArrayLike) -> Array:
    return y.astype(jnp.result_type(x, weight.dtype))


def _contract_any(
    x: Array,
    x_labels: Labels,
    w: Weight,
    labels: Labels,
    out_labels: Labels,
    precision: Precision,
) -> Array:
    """`contract` of an array or of another weight, frozen."""
    if isinstance(w, AbstractLoraWeight):
        return w.contract(
            x, x_labels, labels, out_labels, is_frozen=True, precision=precision
        )
    w = jnp.asarray(w)
    return _contract.product(
        x,
        x_labels,
        w,
        labels,
        out_labels,
        x.dtype,
        y_is_frozen=True,
        precision=precision,
    )


def _scaled_before(
    x: Array, x_labels: Labels, gain: Array, gain_labels: Labels
) -> tuple[Array, Labels]:
    missing = [label for label in gain_labels if label not in x_labels]
    sizes = [gain.shape[gain_labels.index(label)] for label in missing]
    x = _views.expand(x, sizes, range(x.ndim, x.ndim + len(missing)))
    x_labels = [*x_labels, *missing]
    return _contract.scaled(x, x_labels, gain, gain_labels), x_labels


def is_weight(node: Any) -> TypeGuard[AbstractLoraWeight]:
    """Whether `node` is a factored weight."""
    return isinstance(node, AbstractLoraWeight)

"""The atom: an array-like weight that is a frozen base plus a low-rank update."""

import abc
import dataclasses
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

from .._factored import contract, Labels, Precision, views
from .._shared import is_inexact
from . import operators


if TYPE_CHECKING:
    from .lora import LoraWeight


# NumPy arrays, as models just read from a file hold them, serve as bases too, and so
# do mere shapes.
Weight: TypeAlias = Union[Array, np.ndarray, jax.ShapeDtypeStruct, "AbstractLoraWeight"]
# An array to whoever computes with it; abstract models have shapes here too.
if TYPE_CHECKING:
    Factor: TypeAlias = Array
else:
    Factor: TypeAlias = Array | np.ndarray | jax.ShapeDtypeStruct
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

    method: ClassVar[str]
    """What it is called in files, which hold the other arguments of the class beside
    `w`: arrays, and what JSON has."""

    # NumPy on the left of `@` then leaves the product to `__rmatmul__`.
    __array_ufunc__ = None

    @abc.abstractmethod
    def as_lora(self) -> "LoraWeight":
        """This weight as base plus `scale * (b · a)`, without forming the product."""

    def factored(self) -> "LoraWeight":
        """As `as_lora`, but perhaps with a gate on the rank, for those who only move
        axes or multiply with the factors one after the other."""
        return self.as_lora()

    @abc.abstractmethod
    def array_axes(self) -> dict[str, Labels]:
        """For each array that is trained or saved with it, by field, what its axes are:
        those of the base, counted from its end, or anything else for an axis that the
        base has not. By them the arrays lie where the base lies."""

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
        if self.w is None:
            raise without_base(self)
        return views.dense(self).astype(self.dtype)

    def materialize(self) -> Array:
        """As `materialise`, by the name that it has in jax-lorax."""
        return self.materialise()

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
        return _round(operators.matmul(self, x), self, x)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return _round(operators.matmul(self, x, contract=-2), self, x)

    @property
    def T(self) -> "LoraWeight":
        """The transpose (all axes reversed). A view: the base is not moved."""
        return self.factored().reordered(range(self.ndim)[::-1])

    @property
    def mT(self) -> "LoraWeight":
        """The transpose of the last two axes. A view: the base is not moved."""
        *batch, rows, columns = range(self.ndim)
        return self.factored().reordered([*batch, columns, rows])

    def astype(self, dtype: DTypeLike) -> "LoraWeight":
        """The weight of another dtype: that of the base. The factors, which may be
        wider, keep theirs."""
        return views.convert(self, dtype)

    def __getitem__(self, item: Any) -> "LoraWeight | Array":
        """Indexing, as of an array, by integers, integer arrays and slices.

        Slices, and anything along a batch axis, give a weight that is still factored.
        An integer or an integer array along a row or column axis is a lookup (what an
        embedding does) and gives an array.
        """
        return operators.getitem(self.as_lora(), item)

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
        return contract(
            self,
            x,
            low_rank_x,
            x_labels=tuple(x_labels),
            labels=tuple(labels),
            out_labels=tuple(out_labels),
            is_frozen=is_frozen,
            precision=precision,
        )


def _round(y: Array, weight: AbstractLoraWeight, x: ArrayLike) -> Array:
    return y.astype(jnp.result_type(x, weight.dtype))


def is_weight(node: Any) -> TypeGuard[AbstractLoraWeight]:
    """Whether `node` is a factored weight."""
    return isinstance(node, AbstractLoraWeight)


def base_of(weight: Any) -> Any:
    """The array beneath all adapters."""
    while is_weight(weight):
        weight = weight.w
    return weight


def without_base(weight: Any) -> ValueError:
    """What is raised where the base of a weight is needed and not there."""
    return ValueError(
        f"This {type(weight).__name__} has no base: it is of an adapter alone, the "
        "`params` of `lorax.partition`. Use the whole model, "
        "`lorax.combine(params, frozen)` or `lorax.attach(model, params)`."
    )


def without_factors(weight: Any) -> ValueError:
    """What is raised where the factors of a weight are needed and not there."""
    return ValueError(
        f"This {type(weight).__name__} has no factors: it is of the `frozen` part of "
        "`lorax.partition`. Use the whole model, `lorax.combine(params, frozen)`."
    )


def upon(weight: Any, base: Any, **changes: Any) -> Any:
    """`weight` on another base, and with these fields changed, unchecked."""
    new = object.__new__(type(weight))
    for field in dataclasses.fields(weight):
        value = base if field.name == "w" else getattr(weight, field.name)
        object.__setattr__(new, field.name, changes.get(field.name, value))
    return new

"""The base class of adapted weights, and the weight that is only a normal form."""

import abc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, TypeGuard, TypeVar, Union

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from .._factored import (
    as_form,
    Base,
    contract,
    dense,
    factor_axes,
    Factored,
    Labels,
    operators,
    Precision,
    stands_for_array,
    views,
)
from .._shared import (
    AbstractQuickModule,
    is_inexact,
    multiply,
    replace_unchecked,
    weight_document,
)
from .fresh import Fresh
from .missing import is_missing, list_missing, missing_base, missing_factors


# NumPy arrays are for models just read from a file, shapes for abstract models.
# Other kinds of base register themselves, see `_factored.base`.
Weight: TypeAlias = Union[
    Array, np.ndarray, jax.ShapeDtypeStruct, "AbstractLoraWeight", Any
]
_Self = TypeVar("_Self", bound="AbstractLoraWeight")


class AbstractLoraWeight(AbstractQuickModule):
    """An array-like that stands for a frozen base plus a trainable update.

    It has an array's `shape`, `dtype`, `ndim`, `size`, `@` on both sides, `.T`, `.mT`,
    `.astype` and indexing. None of these forms the array it stands for. For anything
    else there is `materialise()`. There is deliberately no `__jax_array__`: with it
    `x @ weight` would quietly form the dense array.

    A method, such as LoRA, is a final subclass that can be written as a
    `lorax.Factored`, its *normal form*. Everything else is written once, for that.
    """

    w: eqx.AbstractVar[Weight]
    """The frozen base: an array, or another weight, where adapters are nested."""

    frozen: ClassVar[tuple[str, ...]]
    """The names of the fields that are never trained."""

    method: ClassVar[str]
    """The name for `method=` of `lorax.loraify`, and in files. A file has every
    argument of `__init__` but `w`, from the field of the same name: arrays, numbers,
    strings, `None`, or tuples of these. They have to make an equal weight."""

    is_plain_lora: ClassVar[bool] = False
    """Whether its normal form is what PEFT calls LoRA, so that `lorax.peft.save` may
    write that. Otherwise it raises an error that names the method."""

    # NumPy on the left of `@` then leaves the product to `__rmatmul__`.
    __array_ufunc__ = None

    @abc.abstractmethod
    def factored(self) -> Factored:
        """The normal form: base plus `scale * (b · a)`, the product never formed.

        **Raises:**

        `ValueError` if the base or the factors are not there: see
        `lorax.AbstractLoraWeight.check_whole`.
        """

    @abc.abstractmethod
    def array_axes(self) -> dict[str, Labels]:
        """For each array beside the base, by field, one entry for each of its axes: the
        axis of the base that it corresponds to, counted from the end, or another label
        such as `"rank"`. Sharding and the checks of shapes go by it."""

    @classmethod
    def create(cls: type[_Self], fresh: Fresh) -> "AbstractLoraWeight":
        """A fresh weight, which adds exactly nothing. `lorax.loraify` and
        `lorax.init_lora` call this. Keywords that a method adds are its options.

        **Arguments:**

        - `fresh`: The base, the axes, the rank and so on, with functions that make
            arrays on the right devices.
        """
        raise TypeError(
            f"{cls.__name__} does not say how it starts: it has no `create(fresh)`. "
            "Make its weights by hand and put them in with `eqx.tree_at`."
        )

    def scaled(self: _Self, factor: ArrayLike) -> _Self:
        """The same method, with an update `factor` times as large. This has to work
        when the base and other frozen fields are `None` too."""
        raise TypeError(
            f"A {type(self).__name__} does not say how it is scaled: it has no "
            "`scaled(factor)`."
        )

    @classmethod
    def stacked(cls: type[_Self], weights: Sequence[_Self | None]) -> _Self:
        """Several weights without their bases as one, with a new leading axis in each
        array, for `lorax.stack`. `None` is no update, and has zeros. A method for which
        zeros do add something has to override this."""
        like = next(weight for weight in weights if weight is not None)
        zeros = jax.tree.map(jnp.zeros_like, like)
        filled = [zeros if weight is None else weight for weight in weights]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *filled)

    def view(self, form: Factored) -> "AbstractLoraWeight":
        """A weight for `form`, which came from this weight's normal form by indexing or
        by moving axes."""
        return FactoredWeight(form)

    def with_base(self: _Self, base: Any, **changes: Any) -> _Self:
        """A copy on another base, with these fields changed too, unchecked."""
        return replace_unchecked(self, w=base, **changes)

    def check_whole(self) -> None:
        """**Raises:**

        `ValueError` if the base or an array is missing, as in the two parts of
        `lorax.partition`.
        """
        self.check_base()
        if list_missing(self):
            raise missing_factors(self)

    def base_form(self) -> Base:
        """The base of the normal form: `w`, or the normal form of `w` where that is a
        weight."""
        return as_base(self.w)

    def check_base(self) -> None:
        """**Raises:**

        `ValueError` if the base is missing.
        """
        if is_missing(self.w):
            raise missing_base(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        self.check_base()
        return tuple(self.w.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array this stands for: that of the base."""
        self.check_base()
        return self.w.dtype

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
        return dense(self.factored()).astype(self.dtype)

    def materialize(self) -> Array:
        """The same as `materialise`. This is its name in jax-lorax."""
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
        return operators.matmul(self.factored(), x)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return operators.rmatmul(self.factored(), x)

    @property
    def T(self) -> "AbstractLoraWeight":
        """The transpose (all axes reversed). A view: the base is not moved."""
        form = self.factored()
        return self.view(form.transpose(range(form.ndim)[::-1]))

    @property
    def mT(self) -> "AbstractLoraWeight":
        """The transpose of the last two axes. A view: the base is not moved."""
        form = self.factored()
        *batch, rows, columns = range(form.ndim)
        return self.view(form.transpose([*batch, columns, rows]))

    def astype(self, dtype: DTypeLike) -> "AbstractLoraWeight":
        """The weight of another dtype: that of the base. The factors, which may be
        wider, keep theirs."""
        return self.view(views.convert(self.factored(), dtype))

    def __getitem__(self, item: Any) -> "AbstractLoraWeight | Array":
        """Indexing by integers, integer arrays and slices, as in `jax.numpy`.

        Slices, and anything along a batch axis, give a weight that is still factored.
        An integer or an integer array along a row or column axis is a lookup (what an
        embedding does) and gives an array.
        """
        found = operators.index(self.factored(), item)
        return self.view(found) if isinstance(found, Factored) else found

    def contract(
        self,
        x: Array,
        x_labels: Labels,
        labels: Labels,
        out_labels: Labels,
        *,
        low_rank_x: Array | None = None,
        precision: Precision = None,
    ) -> Array:
        """The sum of `x` times this weight over all labels that are not among
        `out_labels`, through the rank axis.

        **Arguments:**

        - `x`: The other operand. The caller rounds the result to its dtype.
        - `x_labels`: A label for each axis of `x`.
        - `labels`: A label for each axis of this weight.
        - `out_labels`: The labels of the axes of the result.
        - `low_rank_x`: The operand for the factors, if it is not `x`: after dropout.
        - `precision`: As in `jax.lax.dot_general`.

        **Returns:**

        The contraction, not yet rounded: in float32 where `x` or a factor is narrow.
        """
        return contract(
            self.factored(),
            x,
            low_rank_x,
            x_labels=tuple(x_labels),
            labels=tuple(labels),
            out_labels=tuple(out_labels),
            precision=precision,
        )


class FactoredWeight(AbstractLoraWeight):
    """A weight that is only its normal form, after indexing, moving axes or mixing.

    Models may hold one. In files and partitions it becomes a `lorax.LoraWeight` where
    it can: see `lorax.LoraWeight.from_factored`.
    """

    form: Factored

    frozen = ("w", "gain", "gate")

    def __init__(self, form: Factored):
        self.form = form

    def factored(self) -> Factored:
        self.check_whole()
        return self.form

    @property
    def w(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The frozen base, its axes in the order in which it is stored."""
        base = self.form.base
        return FactoredWeight(base) if isinstance(base, Factored) else base

    @property
    def b(self) -> Any:
        """The row factor."""
        return self.form.b

    @property
    def a(self) -> Any:
        """The column factor."""
        return self.form.a

    @property
    def permutation(self) -> tuple[int, ...] | None:
        """The axes of the base in the order of `shape`, if that is another one."""
        return self.form.permutation

    @property
    def gain(self) -> Any:
        """A scale along rows or columns, if there is one."""
        return self.form.gain

    @property
    def gate(self) -> Any:
        """A scale of each component of the rank, if there is one."""
        return self.form.gate

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.form.rank

    @property
    def scale(self) -> float:
        """What multiplies `b · a`."""
        return self.form.scale

    @property
    def shape(self) -> tuple[int, ...]:
        self.check_base()
        return self.form.shape

    def array_axes(self) -> dict[str, Labels]:
        b, a = factor_axes(self.form.ndim, self.form.rows, self.form.columns)
        return {"b": b, "a": a}

    def scaled(self, factor: ArrayLike) -> "FactoredWeight":
        b = self.form.b
        return FactoredWeight(self.form.replace(b=multiply(b, factor).astype(b.dtype)))

    def with_base(self, base: Any, **changes: Any) -> "FactoredWeight":
        # Without the check of `factored`: of a partition, parts are missing.
        form = base.form if isinstance(base, FactoredWeight) else as_base(base)
        return FactoredWeight(self.form.replace(base=form, **changes))

    def trainable(self) -> "FactoredWeight":
        spec = jax.tree.map(lambda _: False, self.form)
        return FactoredWeight(spec.replace(b=True, a=True))

    def __pdoc__(self, **options: Any) -> Any:
        return weight_document(self, **options)


@dense.register
def _(base: AbstractLoraWeight) -> Array:
    return dense(base.factored())


@as_form.register
def _(x: AbstractLoraWeight) -> Factored:
    return x.factored()


def is_weight(node: Any) -> TypeGuard[AbstractLoraWeight]:
    """Whether `node` is an adapted weight."""
    return isinstance(node, AbstractLoraWeight)


def is_packed(x: Any) -> bool:
    """Whether `x` is a quantised array, of this package or of another."""
    return stands_for_array(x) and not is_weight(x)


def base_of(weight: Any) -> Any:
    """The array beneath all adapters; `None` where that is missing."""
    while is_weight(weight):
        weight = weight.w
    return None if is_missing(weight) else weight


def as_base(w: Any) -> Base:
    """`w`, an array or a weight, as the base of a normal form."""
    return w.factored() if is_weight(w) else w

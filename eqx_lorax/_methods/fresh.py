"""The specification of a fresh adapter, and functions that make its arrays."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from .._factored import dense, factor_axes, Label, RANK
from .._shared import (
    accumulation_dtype,
    AnyArray,
    as_array,
    axes_from_end,
    create,
    inherit_sharding,
    is_abstract,
    known_sharding,
    move_array,
    Placement,
    resolve_sharding,
    unshard,
    zeros,
)
from .initialisers import Init, initial_factor, key_for, Uniform
from .starts import AbstractStart


@dataclasses.dataclass(frozen=True)
class Fresh:
    """What a method is given to make the fresh weight of one array."""

    name: str
    """The path of the array, for error messages."""

    w: Any
    """The base: an array, its shape and dtype alone, or a weight."""

    base: Any
    """The array beneath all adapters: `w`, where that is no weight."""

    rank: int
    """The rank of the update."""

    rows: tuple[int, ...]
    """The axes of the base that the row factor owns, counted from the end."""

    columns: tuple[int, ...]
    """The axes of the base that the column factor owns, counted from the end."""

    alpha: float
    """The numerator of the scale."""

    dtype: DTypeLike
    """The dtype of what is trained."""

    key: PRNGKeyArray
    """A key for this array alone."""

    init: Init = "uniform"
    """How the column factor starts, as in `lorax.loraify`."""

    rank_stabilised: bool = False
    """Whether the scale is `alpha / sqrt(rank)` and not `alpha / rank`."""

    is_lookup: bool = False
    """Whether the base is a table that is indexed, as in an embedding."""

    outputs: Literal["rows", "columns"] = "rows"
    """Which side of the base is the output of its layer."""

    window: tuple[int, ...] = ()
    """The axes of the window, if the base is a kernel of a convolution."""

    has_bias: bool = False
    """Whether its layer adds a bias to the product."""

    placement: Placement = None
    """Where the factors are to be placed: as `sharding` in `lorax.loraify`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return tuple(self.w.shape)

    @property
    def scale(self) -> float:
        """`alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised."""
        return compute_scale(self.alpha, self.rank, self.rank_stabilised)

    @property
    def settings(self) -> dict[str, Any]:
        """The static settings of most methods, by name."""
        return dict(
            alpha=self.alpha,
            rows=self.rows,
            columns=self.columns,
            rank_stabilised=self.rank_stabilised,
        )

    @property
    def factor_placements(self) -> tuple[Any, Any]:
        """Where the row factor and the column factor are to be placed; `None` is for
        the sharding of their base."""
        placement = self.placement
        # In some versions of JAX a `PartitionSpec` is a tuple.
        if not isinstance(placement, tuple) or isinstance(placement, PartitionSpec):
            placement = (placement, placement)
        row, column = placement
        return row, column

    @property
    def b_axes(self) -> list[Label]:
        """The axes of a row factor: `(*batch, *rows, "rank")`."""
        return factor_axes(len(self.shape), self.rows, self.columns)[0]

    @property
    def a_axes(self) -> list[Label]:
        """The axes of a column factor: `(*batch, "rank", *columns)`."""
        return factor_axes(len(self.shape), self.rows, self.columns)[1]

    @property
    def changes_base(self) -> bool:
        """Whether the factors start with a product that is not zero."""
        return isinstance(self.init, AbstractStart) and self.init.changes_base

    @property
    def wide_dtype(self) -> jnp.dtype:
        """The dtype in which starts are computed: float32 or wider."""
        return accumulation_dtype(jnp.dtype(self.dtype))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of `matrices()`: `(*batch, outputs, inputs)`."""
        batch, rows, columns = self._split_shape()
        sides = math.prod(rows), math.prod(columns)
        return (*batch, *(sides if self.outputs == "rows" else sides[::-1]))

    def matrices(self) -> Array:
        """The base as matrices, of shape `(*batch, outputs, inputs)`, in float32 or
        wider, each of them whole on every device, as decompositions need it."""
        return unshard(self._sharded_matrices())

    def _sharded_matrices(self) -> Array:
        w = self.w.factored() if hasattr(self.w, "factored") else self.w
        ndim = len(self.shape)
        axes = [*self._batch_axes(), *self.rows, *self.columns]
        batch, rows, columns = self._split_shape()
        w = jnp.transpose(dense(w), [axis % ndim for axis in axes])
        w = w.reshape(*batch, math.prod(rows), math.prod(columns))
        w = w.astype(jnp.promote_types(w.dtype, self.wide_dtype))
        return w if self.outputs == "rows" else jnp.swapaxes(w, -1, -2)

    def to_factors(self, left: Array, right: Array) -> tuple[Array, Array]:
        """The factors `b` and `a` whose product is `left @ right`.

        **Arguments:**

        - `left`: Of shape `(*batch, outputs, rank)`.
        - `right`: Of shape `(*batch, rank, inputs)`.
        """
        if self.outputs == "columns":
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        _, rows, columns = self._split_shape()
        b = left.reshape(*left.shape[:-2], *rows, left.shape[-1])
        return b, right.reshape(*right.shape[:-1], *columns)

    def factors(self, *, may_change_base: bool = False) -> tuple[AnyArray, AnyArray]:
        """The factors `b` and `a`, as `init` says how they start.

        **Arguments:**

        - `may_change_base`: Whether the method takes factors whose product is not zero,
            as `Fresh.changes_base` tells.
        """
        b_placement, a_placement = self.factor_placements
        if not isinstance(self.init, AbstractStart):
            return (
                self.zeros(self.b_axes, b_placement),
                self.draw(self.a_axes, a_placement),
            )
        if self.changes_base and not may_change_base:
            raise ValueError(
                f"`init={self.init}` does not start at zero, which the methods 'lora' "
                f"and 'dora' can and the one of {self.name} cannot."
            )
        start = self.init
        return self.derive_factors(lambda _: start(self))

    def derive_factors(
        self, compute: Callable[[Array], tuple[Array, Array]]
    ) -> tuple[AnyArray, AnyArray]:
        """The factors `b` and `a` that `compute(matrices())` returns, placed."""
        axes = self.b_axes, self.a_axes
        placed = zip(axes, self.factor_placements)
        if is_abstract(self.base):
            b, a = (self.zeros(*one) for one in placed)
            return b, a
        with jax.default_matmul_precision("highest"):
            made = compute(self.matrices())
        b, a = (self._place(x, *one) for x, one in zip(made, placed))
        return b, a

    def derive(
        self,
        compute: Callable[[Array], Array],
        axes: Sequence[Label],
        placement: Any = None,
        dtype: DTypeLike | None = None,
    ) -> AnyArray:
        """An array that is computed from the base.

        **Arguments:**

        - `compute`: A function of `matrices()`, which here are sharded as the base is.
            What it returns is reshaped.
        - `axes`, `placement`: As in `zeros`.
        - `dtype`: The dtype of the array. By default that of what is trained.
        """
        if is_abstract(self.base):
            return dataclasses.replace(self, dtype=dtype or self.dtype).zeros(
                axes, placement
            )
        with jax.default_matmul_precision("highest"):
            made = compute(self._sharded_matrices())
        return self._place(made, axes, placement, dtype)

    def _place(
        self,
        x: Array,
        axes: Sequence[Label],
        placement: Any,
        dtype: DTypeLike | None = None,
    ) -> AnyArray:
        shape = self._shape_of(axes)
        x = as_array(x).reshape(shape).astype(self.dtype if dtype is None else dtype)
        sharding = self._sharding_of(axes, shape, placement)
        return x if sharding is None else move_array(x, sharding)

    def axes(self, *words: Label) -> list[Label]:
        """The batch axes and then, for each word, those of the base's `"rows"` or
        `"columns"`, or the word itself, such as `"rank"`: an argument for `zeros`."""
        sides: dict[Label, Any] = {"rows": self.rows, "columns": self.columns}
        named: list[Label] = [x for word in words for x in sides.get(word, (word,))]
        return [*self._batch_axes(), *named]

    def zeros(self, axes: Sequence[Label], placement: Any = None) -> AnyArray:
        """An array of zeros.

        **Arguments:**

        - `axes`: For each axis of the array an axis of the base, counted from its end,
            or `"rank"`, or a pair of any name and a size.
        - `placement`: A sharding. By default the array is sharded as the base is along
            the axes that they share.
        """
        shape = self._shape_of(axes)
        sharding = self._sharding_of(axes, shape, placement)
        return create(zeros, (shape, self.dtype), self.base, sharding)

    def full(self, axes: Sequence[Label], value: float) -> AnyArray:
        """An array of one value. The axes are those of `zeros`."""
        return self.draw(axes, init=jax.nn.initializers.constant(value))

    def uniform(
        self, axes: Sequence[Label], fan_in: int, name: str, placement: Any = None
    ) -> AnyArray:
        """An array that is uniform on `±1 / sqrt(fan_in)`. The other arguments are
        those of `draw`."""
        bound = 1 / math.sqrt(fan_in)
        return self.draw(axes, placement, init=Uniform(bound), name=name)

    def draw(
        self,
        axes: Sequence[Label],
        placement: Any = None,
        *,
        init: Init | None = None,
        name: str = "",
    ) -> AnyArray:
        """A random array, drawn on the devices where it is placed.

        **Arguments:**

        - `axes`, `placement`: As in `zeros`.
        - `init`: The initialiser, by default `Fresh.init`.
        - `name`: Draws with the same name, or with none, use the same key. A method
            that draws several arrays gives each a name.
        """
        shape = self._shape_of(axes)
        sharding = self._sharding_of(axes, shape, placement)
        fan_in = math.prod(self.shape[axis] for axis in self.columns)
        key = key_for(self.key, name) if name else self.key
        init = self.init if init is None else init
        if isinstance(init, AbstractStart):
            raise ValueError(
                f"`init={init}` is a start for the methods 'lora' and 'dora', and not "
                f"for the one of {self.name}."
            )
        arguments = (key, init, shape, self.dtype, self.rank, fan_in, self.is_lookup)
        return create(initial_factor, arguments, self.base, sharding)

    def _shape_of(self, axes: Sequence[Any]) -> tuple[int, ...]:
        def size(axis: Any) -> int:
            if isinstance(axis, tuple):
                return axis[1]
            return self.rank if axis == RANK else self.shape[axis]

        return tuple(size(axis) for axis in axes)

    def _batch_axes(self) -> list[int]:
        owned = {*self.rows, *self.columns}
        return [x for x in axes_from_end(len(self.shape)) if x not in owned]

    def _split_shape(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The sizes of batch axes, rows and columns."""
        batch, rows, columns = (
            tuple(self.shape[axis] for axis in axes)
            for axes in (self._batch_axes(), self.rows, self.columns)
        )
        return batch, rows, columns

    def _sharding_of(
        self, axes: Sequence[Label], shape: tuple[int, ...], placement: Any
    ) -> Sharding | None:
        base = known_sharding(self.base)
        inherited = inherit_sharding(base, len(self.shape), axes)
        return resolve_sharding(self.name, shape, placement, base, inherited)


def compute_scale(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)

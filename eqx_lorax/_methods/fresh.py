"""The specification of a fresh adapter, and functions that make its arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._factored import factor_axes, Label, RANK
from .._shared import (
    AnyArray,
    create,
    inherit_sharding,
    known_sharding,
    Placement,
    resolve_sharding,
    zeros,
)
from .initialisers import Init, initial_factor, key_for


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

    def zeros(self, axes: Sequence[Label], placement: Any = None) -> AnyArray:
        """An array of zeros.

        **Arguments:**

        - `axes`: For each axis of the array an axis of the base, counted from its end,
            or `"rank"`.
        - `placement`: A sharding. By default the array is sharded as the base is along
            the axes that they share.
        """
        shape = self._shape_of(axes)
        sharding = self._sharding_of(axes, shape, placement)
        return create(zeros, (shape, self.dtype), self.base, sharding)

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
        arguments = (key, init, shape, self.dtype, self.rank, fan_in, self.is_lookup)
        return create(initial_factor, arguments, self.base, sharding)

    def _shape_of(self, axes: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self.rank if axis == RANK else self.shape[axis] for axis in axes)

    def _sharding_of(
        self, axes: Sequence[Label], shape: tuple[int, ...], placement: Any
    ) -> Sharding | None:
        base = known_sharding(self.base)
        inherited = inherit_sharding(base, len(self.shape), axes)
        return resolve_sharding(self.name, shape, placement, base, inherited)


def compute_scale(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """`alpha / rank`, or `alpha / sqrt(rank)` if rank-stabilised."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)

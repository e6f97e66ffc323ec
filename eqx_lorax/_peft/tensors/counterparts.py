"""What the modules and parameters of PyTorch are in a model here."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..._factored import factor_shapes
from ..._modules import find_target, infer_axes
from ..._trees import Place, Places
from ..pytorch import (
    expand,
    find_template,
    Index,
    Names,
    path_in_names,
    require_template,
)
from .in_out import InOut
from .layout import choose_part_layout, Layout


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """The array here, or the layer of a stack, that is the weight of a module of
    PyTorch, or a parameter there."""

    place: Place
    index: Index
    layout: Layout
    is_order_open: bool
    """Whether it is unknown if the array is stored `(out, in)`, see
    `InOut.leaves_open`."""

    @property
    def dotted(self) -> str:
        """The path of the array here."""
        return self.place.dotted

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this one layer of a stack."""
        return tuple(self.place.node.shape[len(self.index) :])

    def fits(self, layout: Layout, first: np.ndarray, second: np.ndarray) -> bool:
        """Whether two tensors in `layout` can be the factors of this array."""
        try:
            b, a = layout.from_torch(first, second)
        except ValueError:
            return False
        return (b.shape, a.shape) == self.factor_shapes(b.shape[-1])

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `b` and `a` for this array."""
        rows, columns = infer_axes(self.place)
        return factor_shapes(self.shape, rows, columns, rank)


def find_counterparts(
    places: Places, names: Names, in_out: InOut
) -> Iterator[tuple[str, Counterpart]]:
    """All arrays that can be adapted and that `names` knows, by their paths in PyTorch.

    **Raises:**

    `ValueError` if `names` gives one path to two of them.
    """
    taken: set[str] = set()
    for place in places.all:
        if (
            find_target(place) is None
            or find_template(names, path_in_names(place)) is None
        ):
            continue
        rows, columns = infer_axes(place)
        batch = list(place.node.shape[: -len((*rows, *columns))])
        torch = require_template(place, names)
        try:
            layout = choose_part_layout(place, torch, batch, place in in_out)
        except ValueError:
            continue  # a stack of vectors, or what PEFT has no form for
        for index, path in expand(torch, batch):
            if path in taken:
                raise ValueError(f"`names` gives {path!r} twice.")
            taken.add(path)
            yield path, Counterpart(place, index, layout, in_out.leaves_open(place))

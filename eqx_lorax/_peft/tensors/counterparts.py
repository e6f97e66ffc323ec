"""Where the modules and parameters of PyTorch are here."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..._methods import factor_shapes
from ..._modules import find_target, infer_axes
from ..._trees import Place, Places
from ..pytorch import expanded, Index, named, Names, template, template_for
from .layout import Layout, layout_for
from .sides import InOut


@dataclasses.dataclass(frozen=True)
class Home:
    """Where an adapted module or parameter of PyTorch is here."""

    place: Place
    index: Index
    layout: Layout
    is_order_open: bool
    """Whether nothing says if the array is stored `(out, in)`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this one layer of a stack."""
        return tuple(self.place.node.shape[len(self.index) :])

    def fits(self, layout: Layout, first: np.ndarray, second: np.ndarray) -> bool:
        """Whether two tensors of `layout` can be the factors of the array here."""
        try:
            b, a = layout.from_torch(first, second)
        except ValueError:
            return False
        return (b.shape, a.shape) == self.factor_shapes(b.shape[-1])

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `b` and `a`."""
        rows, columns = infer_axes(self.place)
        return factor_shapes(self.shape, rows, columns, rank)


def homes(places: Places, names: Names, in_out: InOut) -> Iterator[tuple[str, Home]]:
    """All that `names` has a path in PyTorch for, by this path.

    **Raises:**

    `ValueError` if it has one for two.
    """
    taken: set[str] = set()
    for place in places.all:
        if find_target(place) is None or template(names, named(place)) is None:
            continue
        rows, columns = infer_axes(place)
        batch = list(place.node.shape[: -len((*rows, *columns))])
        torch = template_for(place, names)
        try:
            layout = layout_for(place, torch, batch, place in in_out)
        except ValueError:
            continue  # a stack of vectors, or what PEFT has no form for
        for index, path in expanded(torch, batch):
            if path in taken:
                raise ValueError(f"`names` gives {path!r} twice.")
            taken.add(path)
            yield path, Home(place, index, layout, in_out.leaves_open(place))

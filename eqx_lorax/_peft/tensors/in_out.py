"""Which arrays of a model here are stored `(..., in, out)`."""

import dataclasses
from collections.abc import Set

from ..._layers import find_layer
from ..._modules import find_target
from ..._trees import Filter, match_filter, Place, Places
from .layout import choose_layout, Linear


@dataclasses.dataclass(frozen=True)
class InOut:
    """The arrays here that are stored `(..., in, out)`."""

    arrays: Set[Place]
    is_stated: bool
    """Whether the user named these arrays, be it an empty list."""

    def __contains__(self, array: Place) -> bool:
        return array in self.arrays

    def leaves_open(self, array: Place) -> bool:
        """Whether the order of the axes is unknown. It is if the user did not say it
        and the module is none of Equinox's: only its code tells the order."""
        return not self.is_stated and _is_of_unknown_module(array)


def find_in_out(places: Places, transposed: Filter) -> InOut:
    """The arrays that the filter `transposed` names. An empty list names none.

    **Raises:**

    `ValueError` if any part of the filter names no such array.
    """
    if transposed is None or isinstance(transposed, list | tuple) and not transposed:
        return InOut(frozenset(), transposed is not None)
    found: set[Place] = set()
    model = places.root.node
    for named in match_filter(model, places, transposed, "transposed", _may_be_in_out):
        arrays = [
            array for array in named.find_covered(places) if _may_be_in_out(array)
        ]
        if not arrays:
            raise ValueError(
                f"{named.label} names no array that could be stored `(..., in, out)`: "
                "linear layers, convolutions and embeddings of Equinox have PyTorch's "
                "order. Name matrices, or stacks of them, of other modules."
            )
        found.update(arrays)
    return InOut(found, True)


def _is_of_unknown_module(array: Place) -> bool:
    return array.owner is not None and find_layer(array.owner.module) is None


def _may_be_in_out(array: Place) -> bool:
    if find_target(array) is None or not _is_of_unknown_module(array):
        return False
    try:
        return isinstance(choose_layout(array, None), Linear)
    except ValueError:
        return False

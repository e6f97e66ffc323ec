"""Which axis of an array here is that of the inputs."""

import dataclasses
from collections.abc import Set

from ..._layers import layer_for, LoraModule
from ..._modules import target_of
from ..._trees import Filter, named_places, Place, Places
from .layout import layout_of, Linear


@dataclasses.dataclass(frozen=True)
class InOut:
    """The arrays here that are stored `(..., in, out)`."""

    arrays: Set[Place]
    is_stated: bool
    """Whether these were named, be they none."""

    def __contains__(self, array: Place) -> bool:
        return array in self.arrays

    def leaves_open(self, array: Place) -> bool:
        """Whether nothing tells the order of this one: the code of its module, which is
        none of Equinox's, would."""
        return not self.is_stated and _is_of_unknown_module(array)


def stored_in_out(places: Places, transposed: Filter) -> InOut:
    """The arrays that `transposed` names; an empty list names none.

    **Raises:**

    `ValueError` if any part of it names none.
    """
    if transposed is None or isinstance(transposed, list | tuple) and not transposed:
        return InOut(frozenset(), transposed is not None)
    found: set[Place] = set()
    model = places.root.node
    for named in named_places(model, places, transposed, "transposed", _may_be_in_out):
        arrays = [array for array in named.covered(places) if _may_be_in_out(array)]
        if not arrays:
            raise ValueError(
                f"{named.label} names no array that could be stored `(..., in, out)`: "
                "linear layers, convolutions and embeddings of Equinox have PyTorch's "
                "order. Name matrices, or stacks of them, of other modules."
            )
        found.update(arrays)
    return InOut(found, True)


def _is_of_unknown_module(array: Place) -> bool:
    return array.owner is not None and layer_for(array.owner.module) is LoraModule


def _may_be_in_out(array: Place) -> bool:
    if target_of(array) is None or not _is_of_unknown_module(array):
        return False
    try:
        return isinstance(layout_of(array, None), Linear)
    except ValueError:
        return False

"""Layers that bitsandbytes has quantised, in a checkpoint: they keep their bits."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapters import AdapterFileError
from ..._bases import (
    find_companions,
    find_shardings,
    is_quantised,
    open_bitsandbytes,
    StoredWeight,
)
from ..._modules import quantise
from ..._shared import as_array, committed_sharding, place_array
from ..._trees import Place, rebuild
from .files import Checkpoint
from .pairing import Slot


_Model = TypeVar("_Model")


class StoredWeights:
    """The weights of a checkpoint that bitsandbytes has quantised."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.companions = find_companions(tensors.keys())
        """What belongs to each of them, by its name."""
        self._tensors = tensors
        self._opened: dict[str, StoredWeight | str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.companions

    def explain_damage(self, name: str) -> str | None:
        """Why the weight of this name cannot be read, if it cannot."""
        found = self._open(name)
        return found if isinstance(found, str) else None

    def __getitem__(self, name: str) -> StoredWeight:
        """The weight of this name, which is known to be whole."""
        found = self._open(name)
        if isinstance(found, str):
            raise AdapterFileError(found)
        return found

    def _open(self, name: str) -> StoredWeight | str:
        if name not in self._opened:
            try:
                self._opened[name] = open_bitsandbytes(self._tensors, name)
            except ValueError as error:
                self._opened[name] = str(error)
        return self._opened[name]

    def fill(self, slot: Slot) -> bool:
        """Whether one of these fills the slot."""
        return any(name in self.companions for _, name in slot.tensors)


def explain_layouts(slot: Slot, stored: StoredWeights) -> str | None:
    """Why the tensors of a slot, which are all there and whole, cannot be one quantised
    array; `None` if they can."""
    layouts = [
        (name, stored[name].layout if name in stored else None)
        for _, name in slot.tensors
    ]
    (first, layout), *others = layouts
    for name, other in others:
        if other != layout:
            texts = [str(x) if x else "not quantised" for x in (layout, other)]
            if texts[0] == texts[1]:
                texts[1] += " and with other code values"
            return (
                f"{first} is {texts[0]} and {name} is {texts[1]}, and both are in "
                f"{slot.place.dotted} here: layers that are one array have to be "
                "quantised alike. Divide the stack into a list of layers, or quantise "
                "all of them again in the same way"
            )
    if layout is None:
        return None
    node = slot.place.node
    if is_quantised(node) and node.format.name != layout.format.name:
        return (
            f"{first} is {layout}, and {slot.place.dotted} is quantised as "
            f"{node.format.name} here. The bits of the checkpoint are kept, so load "
            "them into a model that is not quantised there"
        )
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return (
            f"{first} is {layout}, which stands for floats, and {slot.place.dotted} is "
            f"of {node.dtype} here"
        )
    return None


def with_stored_places(model: _Model, chosen: Iterable[Place]) -> _Model:
    """The model with abstract quantised arrays in these places, and the layers that
    `lorax.quantise` would put around them. Their formats are not yet those of the
    checkpoint. Other arrays are the same objects."""
    chosen = list(chosen)
    if not chosen:
        return model
    edits = {
        x.indices: lambda _, shape=tuple(x.node.shape): jax.ShapeDtypeStruct(
            shape, np.float32
        )
        for x in chosen
    }
    filter = [re.compile(re.escape(x.dotted)) for x in chosen]
    return quantise(rebuild(model, edits), filter, format="int8")


def read_stored(checkpoint: Checkpoint, slot: Slot, stored: StoredWeights) -> Any:
    """The quantised array of a slot, with the bits that the checkpoint has, in the
    dtype and with the sharding of the array that is there."""
    like = slot.place.node
    stack = tuple(like.shape[: slot.depth])
    wholes: list[np.ndarray] = []
    structure: Any = None
    for position, name in slot.tensors:
        parts, structure = jax.tree.flatten(stored[name].read(like.dtype))
        if not wholes:
            # Of their own, since parts may be views of the file.
            wholes = [np.empty((*stack, *x.shape), x.dtype) for x in parts]
        for whole, part in zip(wholes, parts):
            whole[position] = part
        checkpoint.release()
    array = structure.unflatten(wholes)
    array = array.mT if slot.is_swapped else array
    part = like.codes[0] if is_quantised(like) else like
    sharding = None if committed_sharding(part) is None else like.sharding
    if sharding is None:
        return jax.tree.map(as_array, array)
    shardings = find_shardings(array, sharding, slot.place.dotted)
    return jax.tree.map(place_array, array, shardings)

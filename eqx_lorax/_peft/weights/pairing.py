"""Which tensors of a checkpoint are which array of a model: names, shapes, and the
order of axes."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import numpy as np

from ..._layers import list_adapted_names
from ..._modules import find_target, infer_axes
from ..._trees import Filter, match_filter, Place, Places
from ..pytorch import expand, find_template, Index, Names, to_torch_shape
from ..tensors import find_in_out


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array of the model, and the tensors that fill it: one, or one for each layer
    of a stack."""

    place: Place
    tensors: tuple[tuple[Index, str], ...]
    """For each position in the stack the name of its tensor. For an array that is no
    stack the position is `()`."""
    is_swapped: bool
    """Whether the last two axes are the other way round in the checkpoint."""

    @property
    def depth(self) -> int:
        """How many leading axes are those of the stack."""
        return len(self.tensors[0][0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer of the stack, here."""
        return tuple(self.place.node.shape[self.depth :])

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the checkpoint."""
        shape = to_torch_shape(self.place, self.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_swapped else shape

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """A view of a tensor as it is here."""
        tensor = np.swapaxes(tensor, -1, -2) if self.is_swapped else tensor
        return tensor.reshape(self.shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_torch`."""
        shape = to_torch_shape(self.place, self.shape)
        array = array.reshape(shape)
        return np.swapaxes(array, -1, -2) if self.is_swapped else array


def find_slots(
    places: Places,
    names: Names,
    *,
    transposed: Filter,
    file_transposed: Filter,
    present: Collection[str] | None = None,
) -> tuple[list[Slot], list[Place]]:
    """The slots of all arrays that `names` knows, and the other arrays.

    **Arguments:**

    - `transposed`, `file_transposed`: See `load_weights`.
    - `present`: The tensors that there are, if the checkpoint is there already. They
        decide whether a matrix of a module of another kind is a parameter or the
        `weight` of a module.

    **Raises:**

    `ValueError` if `names` gives a tensor twice or has not one `{}` for each axis of a
    stack, or if a filter names nothing.
    """
    here = find_in_out(places, transposed).arrays
    there = _find_matrices(places, file_transposed)
    slots: list[Slot] = []
    others: list[Place] = []
    taken: dict[str, Place] = {}
    for place in places.all:
        if not place.is_array:
            continue
        # Keys of random numbers are in no checkpoint.
        is_plain = isinstance(place.node.dtype, np.dtype)
        templates = _find_names(place, names) if is_plain else []
        if not templates:
            others.append(place)
            continue
        choices = [_expand(place, template) for template in templates]
        is_there = [
            all(name in (present or ()) for _, name in choice) for choice in choices
        ]
        chosen = choices[is_there.index(True) if True in is_there else 0]
        for _, name in chosen:
            if name in taken:
                raise ValueError(
                    f"`names` gives {name!r} twice, for {taken[name].dotted} and for "
                    f"{place.dotted}. A stack of layers needs a `{{}}` for its axis."
                )
            taken[name] = place
        is_vector = len(place.node.shape) - len(chosen[0][0]) < 2
        is_swapped = (place in here) != (place in there) and not is_vector
        slots.append(Slot(place, chosen, is_swapped))
    return slots, others


def find_ties(
    slots: list[Slot], tied: Mapping[str, str] | None
) -> Iterator[tuple[str, str]]:
    """The names of the tensor of each table in `tied` and of that of its head.

    **Raises:**

    `ValueError` if `tied` names no array with one tensor.
    """
    for path, head in (tied or {}).items():
        found = [
            slot
            for slot in slots
            if path in (slot.place.dotted, ".".join(slot.place.path[:-1]))
            and slot.place.path[-1] != "bias"
            and not slot.depth
        ]
        if len(found) != 1:
            raise ValueError(
                f"`tied` has {path!r}, which is the path of no array with a name in "
                "PyTorch, and of no module with one."
            )
        yield found[0].tensors[0][1], f"{head}.weight"


def _find_names(place: Place, names: Names) -> list[str]:
    """The names that the tensor of the array at `place` may have, the likeliest first;
    none if `names` does not know it."""
    field = place.path[-1] if place.path else ""
    if isinstance(names, Mapping) and place.dotted in names:
        of_array = names[place.dotted]
    elif field in ("weight", "bias"):
        # Whatever the module is: PyTorch calls these arrays the same.
        of_module = find_template(names, place.path[:-1])
        return [] if of_module is None else [f"{of_module}.{field}"]
    else:
        of_array = find_template(names, place.path)
    if of_array is None:
        of_module = find_template(names, place.path[:-1])
        return [] if of_module is None else [f"{of_module}.{field}"]
    if of_array.rpartition(".")[2] in ("weight", "bias"):
        return [of_array]
    # As for adapters: a matrix that has a path of its own is a module of PyTorch, or,
    # in a stack for which the path has no `{}`, a parameter.
    is_module = False
    if find_target(place) is not None and field not in list_adapted_names(
        None if place.owner is None else place.owner.module
    ):
        rows, columns = infer_axes(place)
        batch = len(place.node.shape) - len((*rows, *columns))
        is_module = of_array.count("{}") == batch
    found = [of_array, f"{of_array}.weight"]
    return found[::-1] if is_module else found


def _expand(place: Place, template: str) -> tuple[tuple[Index, str], ...]:
    module: Any = None if place.owner is None else place.owner.module
    if isinstance(module, eqx.nn.ConvTranspose) and place.path[-1] == "weight":
        raise ValueError(
            f"{place.dotted} is the kernel of a transposed convolution, which PyTorch "
            "stores otherwise. Name it in `keep` and set it by `eqx.tree_at`."
        )
    shape = tuple(place.node.shape)
    if template.count("{}") > len(shape):
        raise ValueError(
            f"`names` gives {template!r} for {place.dotted}, whose shape is {shape}: "
            "that has too many `{}`, of which each stands for an axis of a stack."
        )
    found = tuple(expand(template, shape))
    if not found:
        raise ValueError(
            f"{place.dotted} is a stack of no layers, of shape {shape}, and no tensor "
            "can fill it."
        )
    return found


def _find_matrices(places: Places, filter: Filter) -> set[Place]:
    """The matrices that `file_transposed` names."""
    if filter is None:
        return set()
    found: set[Place] = set()
    matched = match_filter(
        places.root.node, places, filter, "file_transposed", _is_matrix
    )
    for named in matched:
        arrays = [x for x in named.find_covered(places) if _is_matrix(x)]
        if not arrays:
            raise ValueError(f"{named.label} names no matrix.")
        found.update(arrays)
    return found


def _is_matrix(place: Place) -> bool:
    if not place.is_array or len(place.node.shape) < 2:
        return False
    if place.owner is None:
        return True
    rows, columns = infer_axes(place)
    return (len(rows), len(columns)) == (1, 1) and place.path[-1] != "bias"

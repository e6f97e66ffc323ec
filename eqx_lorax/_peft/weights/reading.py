"""Reading tensors straight to their places."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapters import AdapterFileError
from ..._bases import is_quantised
from ..._shared import committed_sharding
from .files import Checkpoint
from .pairing import Slot
from .quantised import read_quantised


# What XLA's CPU client needs in order to take the memory of an array of NumPy over.
_ALIGNMENT = 64


def read_array(checkpoint: Checkpoint, slot: Slot) -> Any:
    """The array of a slot, in the dtype and with the sharding of the one that is there.
    Of one that is sharded, each device gets its part alone."""
    like = slot.place.node
    if is_quantised(like):
        return read_quantised(checkpoint, slot, _read_layer)
    sharding = committed_sharding(like)
    whole = tuple(slice(0, size) for size in like.shape)
    if isinstance(like, np.ndarray):
        return _read_part(checkpoint, slot, whole)
    if sharding is None:
        # Nobody else has this memory, so that no copy of it has to be made.
        return jax.device_put(_read_part(checkpoint, slot, whole))
    return jax.make_array_from_callback(
        tuple(like.shape),
        sharding,
        lambda index: _read_part(checkpoint, slot, index or ()),
    )


def _read_layer(
    checkpoint: Checkpoint, slot: Slot, position: tuple[int, ...] | None
) -> np.ndarray:
    """One layer of a stack, without the axes of the stack, or all of it."""
    index = [slice(0, size) for size in slot.place.node.shape]
    for axis, i in enumerate(position or ()):
        index[axis] = slice(i, i + 1)
    found = _read_part(checkpoint, slot, tuple(index))
    return found if position is None else found.reshape(slot.shape)


def _read_part(
    checkpoint: Checkpoint, slot: Slot, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of the array of a slot."""
    dtype = np.dtype(slot.place.node.dtype)
    ranges = [range(*x.indices(n)) for x, n in zip(index, slot.place.node.shape)]
    made = _make_aligned(tuple(map(len, ranges)), dtype)
    stack, inside = ranges[: slot.depth], tuple(index[slot.depth :])
    names = dict(slot.tensors)
    for position in itertools.product(*map(range, map(len, stack))):
        name = names[tuple(x[i] for x, i in zip(stack, position))]
        part = slot.from_torch(checkpoint.tensors[name])[inside]
        made[position] = part if part.dtype == dtype else _cast(name, part, dtype)
        checkpoint.release()
    return made


def _make_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _cast(name: str, part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = part.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        is_lost = not np.array_equal(cast, part)
    elif jnp.issubdtype(dtype, jnp.floating):
        is_narrower = jnp.finfo(dtype).max < jnp.finfo(part.dtype).max
        is_lost = is_narrower and bool((~np.isfinite(cast) & np.isfinite(part)).any())
    else:
        is_lost = False
    if is_lost:
        raise AdapterFileError(
            f"{name} has values, in {part.dtype}, that {dtype} cannot hold. Load it "
            "into an array of a wider dtype."
        )
    return cast


def check_ties(
    checkpoint: Checkpoint,
    table: str,
    head: str,
    companions: Mapping[str, Sequence[str]],
) -> None:
    """Checks that the head has the numbers of the table, where the file has both.

    **Arguments:**

    - `companions`: What belongs to each of the quantised weights, by its name.

    **Raises:**

    `AdapterFileError` if it does not.
    """
    tensors = checkpoint.tensors
    if table in tensors and head in tensors:
        of_table = sorted([table, *companions.get(table, ())])
        of_head = sorted([head, *companions.get(head, ())])
        same = len(of_table) == len(of_head) and all(
            tensors[x].dtype == tensors[y].dtype
            and np.array_equal(tensors[x], tensors[y])
            for x, y in zip(of_table, of_head)
        )
        checkpoint.release()
        if not same:
            raise AdapterFileError(
                f"{checkpoint.path}: {head} is not {table}, so the two are not tied. "
                "Take a model with a separate head, and leave it out of `tied`."
            )

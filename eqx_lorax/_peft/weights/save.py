"""`save_weights`: a model as a checkpoint of PyTorch's world."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ..._adapters import name_dtype
from ..._factored import dense, stands_for_array
from ..._methods import check_whole, is_weight
from ..._shared import (
    follow,
    is_abstract,
    list_some,
    replicate,
    spans_processes,
    write_once,
)
from ..._trees import Filter, Places
from ..pytorch import Names
from .pairing import find_slots, find_ties, Slot
from .quantised import is_number
from .writing import Entry, write_checkpoint


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {f"{unit}I": 2 ** (10 * i) for i, unit in enumerate("KMGT", 1)}


def save_weights(
    path: str | os.PathLike[str],
    model: Any,
    *,
    names: Names,
    tied: Mapping[str, str] | None = None,
    transposed: Filter = None,
    file_transposed: Filter = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool | None = None,
) -> None:
    """Writes all weights of a model as safetensors files that `transformers` loads: one
    file, or several with an index.

    Stacks of layers are written layer by layer. The new files take the place of the
    checkpoint that is in the folder when all of them are whole; until then that one
    stays. Other files in the folder, such as `config.json` and the tokenizer, are left
    alone, and have to be put there if the folder is new. If the model is placed on the
    devices of several processes, all of them do this call and the first one writes.

    !!! example

        ```python
        merged = lorax.unloraify(model)
        lorax.peft.save_weights("folder", merged, names=names)
        ```

    **Arguments:**

    - `path`: The folder, which is made if it is not there.
    - `model`: A model without adapters. Quantised arrays are written as what they stand
        for.
    - `names`, `transposed`, `file_transposed`: See `lorax.peft.load_weights`. A matrix
        of a module of another kind for whose own path `names` has a path is the
        `weight` of a module there, unless that path ends in `weight`, or the matrix has
        one more batch axis than the path has `{}`. Other arrays are parameters.
    - `tied`: See `lorax.peft.load_weights`. The heads are left out, as `transformers`
        does, which ties them again. A separate head here has to be equal to its table.
    - `dtype`: The dtype of the floats in the file, such as `jnp.bfloat16`. By default
        it is that of each array.
    - `max_shard_size`: How large a file may get before another one is begun, in bytes
        or as text such as `"500MB"`.
    - `progress`: See `lorax.peft.load_weights`.

    **Raises:**

    `ValueError` if `model` has adapters, if `names` lacks an array of floats or gives a
    tensor twice, or if a head differs from its table. `TypeError` if an array is
    abstract, or of a dtype that safetensors does not have. `OSError`, in every process,
    if the files cannot be written.
    """
    check_whole(model, "lorax.peft.save_weights(path, {}, names=names)")
    places = Places(model)
    _check_merged(places)
    limit = _parse_size(max_shard_size)
    slots, others = find_slots(
        places, names, transposed=transposed, file_transposed=file_transposed
    )
    lacking = [x.dotted for x in others if is_number(x.node)]
    if lacking:
        raise ValueError(
            f"`names` has nothing for {list_some(lacking)}. All weights of a "
            "checkpoint need a path."
        )
    heads = _find_equal_heads(slots, list(find_ties(slots, tied)))
    slots = [slot for slot in slots if slot not in heads]
    entries = [
        (Entry(name, slot.torch_shape, _find_dtype(slot, dtype)), slot, index)
        for slot in slots
        for index, name in slot.tensors
    ]
    leaves = jax.tree.leaves([slot.place.node for slot in slots])

    def produce() -> Iterator[np.ndarray]:
        bar = follow(ordered, progress, title="Saving", unit="tensor")
        for entry, slot, index in bar:
            array = np.asarray(_take(slot.place.node, index))
            yield slot.to_torch(array).astype(entry.dtype, copy=False)

    files = _divide([entry for entry, _, _ in entries], limit)
    by_name = {item[0].name: item for item in entries}
    ordered = [by_name[entry.name] for file in files for entry in file]
    produced = produce()
    error: Exception | None = None
    # Arrays on several processes are gathered by all of them, whether they write or
    # not.
    if jax.process_index() == 0 or not any(map(spans_processes, leaves)):
        try:
            write_checkpoint(Path(path), files, produced)
        except Exception as caught:
            error = caught
    for _ in produced:
        pass

    def report() -> None:
        if error is not None:
            raise error

    write_once(report, leaves)


def _check_merged(places: Places) -> None:
    adapted = [place for place in places.all if is_weight(place.node)]
    if adapted:
        raise ValueError(
            f"`model` has adapters, such as that of {adapted[0].dotted}. Merge them: "
            "`lorax.peft.save_weights(path, lorax.unloraify(model), names=names)`. The "
            "adapters alone are written by `lorax.peft.save`."
        )


def _find_dtype(slot: Slot, wanted: DTypeLike | None) -> np.dtype:
    node = slot.place.node
    if is_abstract(node):
        raise TypeError(
            f"{slot.place.dotted} is abstract. Fill the model first, by "
            "`lorax.peft.load_weights`."
        )
    is_cast = wanted is not None and jnp.issubdtype(node.dtype, jnp.floating)
    dtype = np.dtype(wanted if is_cast else node.dtype)
    if name_dtype(dtype) is None:
        raise TypeError(
            f"{slot.place.dotted} is of dtype {dtype}, which safetensors does not "
            "have. Pass another `dtype`."
        )
    return dtype


def _find_equal_heads(slots: list[Slot], ties: list[tuple[str, str]]) -> list[Slot]:
    """The slots of heads that are not written, since their tables are."""
    by_name = {slot.tensors[0][1]: slot for slot in slots}
    found = []
    for table, head in ties:
        if head in by_name:
            x, y = by_name[table].place.node, by_name[head].place.node
            if not np.array_equal(_take(x, ()), _take(y, ())):
                raise ValueError(
                    f"{by_name[head].place.dotted} is not {by_name[table].place.dotted}"
                    ", so the two are not tied. Leave it out of `tied`, and set "
                    "`tie_word_embeddings` to false in `config.json`."
                )
            found.append(by_name[head])
    return found


def _take(array: Any, index: tuple[int, ...]) -> Any:
    """One layer of a stack, with all of its entries in this process."""
    if isinstance(array, jax.Array) and array.is_fully_addressable:
        # On the CPU this is the memory of the array itself.
        is_local = {device.platform for device in array.devices()} == {"cpu"}
        array = np.asarray(array) if is_local else array
    if isinstance(array, np.ndarray):
        return array[index]
    index = jax.device_put([np.int32(i) for i in index])
    return jax.device_get(replicate(_pick(array, index)))


@jax.jit
def _pick(array: Any, index: list[Any]) -> Any:
    part = array[tuple(index)] if index else array
    return dense(part) if stands_for_array(part) else part


def _divide(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """The entries by files, none of them above the limit unless it has a single
    tensor."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.size > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.size
    # Wider dtypes first, so that all tensors are aligned, as PyTorch needs them.
    return [sorted(file, key=lambda entry: -entry.dtype.itemsize) for file in files]


def _parse_size(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    units = _UNITS | _BINARY_UNITS
    if found is None or found[2] not in units or isinstance(size, bool | float):
        raise ValueError(
            f"`max_shard_size={size!r}` is no size. Pass bytes, or text such as '5GB'."
        )
    bytes_ = int(float(found[1]) * units[found[2]])
    if bytes_ < 1:
        raise ValueError(f"`max_shard_size={size!r}` must be positive.")
    return bytes_

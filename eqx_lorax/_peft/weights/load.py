"""`load_weights`: a model from a checkpoint of PyTorch's world."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..._adapters import AdapterFileError
from ..._bases import is_quantised
from ..._methods import is_weight
from ..._shared import follow, is_abstract, is_array, list_some
from ..._trees import Filter, match_filter, Place, Places, rebuild
from ..pytorch import Names
from .checking import explain_misfits, find_unplaced
from .files import Checkpoint
from .pairing import find_slots, find_ties, Slot
from .quantised import is_number, with_quantised_places
from .reading import check_ties, read_array
from .stored import read_stored, StoredWeights, with_stored_places


_Model = TypeVar("_Model")


def load_weights(
    path: str | os.PathLike[str],
    model: _Model,
    *,
    names: Names,
    tied: Mapping[str, str] | None = None,
    transposed: Filter = None,
    file_transposed: Filter = None,
    keep: Filter = None,
    ignore: str | Sequence[str] = (),
    quantise: str | Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> _Model:
    """Fills a model with the weights of a checkpoint in safetensors files, such as one
    of the Hugging Face hub.

    Files are mapped into memory and read tensor by tensor, each straight to its place:
    beside the new model there is never more than one of its arrays. All that can be
    known from headers is checked before.

    Weights that bitsandbytes has quantised, as `transformers` saves them (NF4, FP4 with
    plain or nested scales, and LLM.int8), keep their bits: they become
    `lorax.QuantisedArray`s in the places of arrays. Nothing is dequantised on the way.

    !!! example

        ```python
        model = eqx.filter_eval_shape(MyModel, key=key)  # allocates nothing
        model = lorax.peft.load_weights(
            "folder", model, names={"layers.*": "model.layers.{}.mlp"}
        )
        ```

    **Arguments:**

    - `path`: A safetensors file, an index (`model.safetensors.index.json`), or a folder
        with either.
    - `model`: The model, without adapters. Its arrays give shapes, dtypes and
        shardings; they may be abstract, that is `jax.ShapeDtypeStruct`, and are
        otherwise replaced. Tensors are cast to these dtypes: wider ones hold the same
        numbers, narrower ones are rounded to. Weights that the checkpoint has quantised
        dequantise to them.
    - `names`: The path in PyTorch for the path of each module here, see
        `lorax.peft.save`. A module's `weight` and `bias` are called the same there.
        Other arrays are looked up by their own paths, and then by the path of their
        module and their name here. Each `{}` that is left is an axis of a stack, whose
        layers have a tensor each.
    - `tied`: The tables here that are heads too, each with the path of the head in
        PyTorch: `{"embed_tokens": "lm_head"}`. The checkpoint may have either tensor or
        both, which then have to be equal. A separate head here gets the numbers of the
        table if it has no tensor.
    - `transposed`: A filter, see `lorax.loraify`, for the arrays *here* that are stored
        `(..., in, out)`, because their module computes `x @ weight`.
    - `file_transposed`: The same for the arrays whose tensors *in the checkpoint* are
        stored `(in, out)`, as those of `Conv1D` in GPT-2. An array that both name is
        read as it is. Nothing shows the order of a square matrix. Layers of
        bitsandbytes are `(out, in)` there, also where they were a `Conv1D`.
    - `keep`: A filter for arrays that stay as they are, such as those of a new head.
    - `ignore`: Patterns with `*` for the names of tensors that are not needed.
    - `quantise`: The format, or the arguments of `lorax.quantise`, such as
        `{"format": "nf4", "exclude": "lm_head"}`. Each layer is quantised as it is
        read, so that a whole stack is never there in full. The same happens where the
        model has quantised arrays already, as `lorax.quantise(abstract_model)` has. Not
        for checkpoints that are quantised.
    - `progress`: Whether there is a progress bar. By default there is one on terminals,
        where tqdm is installed.

    **Returns:**

    The model with the weights. Where the checkpoint is quantised, modules are those
    that `lorax.quantise` returns.

    **Raises:**

    `lorax.AdapterFileError`, a `ValueError`, if a file is missing, cut short or none of
    safetensors, or if tensors are missing, have no place in the model, or differ in
    shape or kind of dtype: one error names all of them. It also names quantised weights
    that are not whole, and layers of one stack that are not quantised alike.
    `ValueError` if `names` gives a tensor twice, if a filter names nothing, if `model`
    has adapters, if `quantise` is given for a checkpoint that is quantised, or if a
    block of it would lie across shards. `OSError` if nothing can be read there.
    """
    if quantise is not None:
        _check_plain(Places(model))
        model = with_quantised_places(model, quantise)
    places = Places(model)
    _check_plain(places)
    path = Path(path)
    checkpoint = Checkpoint(path)
    slots, others = find_slots(
        places,
        names,
        transposed=transposed,
        file_transposed=file_transposed,
        present=checkpoint.tensors.keys(),
    )
    stored = StoredWeights(checkpoint.tensors)
    if stored.companions and quantise is not None:
        raise ValueError(
            f"{path} is quantised already, by bitsandbytes: "
            f"{list_some(sorted(stored.companions), 1)}. Those weights keep their "
            "bits. Leave out `quantise`; to quantise others too, load into what "
            "`lorax.quantise(model, ...)` returns for the abstract model."
        )
    ties = list(find_ties(slots, tied))
    for table, head in ties:
        check_ties(checkpoint, table, head, stored.companions)
    kept = _find_kept(places, keep)
    others += [slot.place for slot in slots if slot.place in kept]
    slots = [
        _follow_ties(slot, ties, checkpoint.tensors)
        for slot in slots
        if slot.place not in kept and not _stays(slot, checkpoint.tensors)
    ]
    read = {name for slot in slots for _, name in slot.tensors}
    read |= {name for tie in ties for name in tie}
    read |= {name for names_ in stored.companions.values() for name in names_}
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    unread = [
        name
        for name in checkpoint.tensors
        if name not in read and not any(fnmatch.fnmatchcase(name, x) for x in patterns)
    ]
    unfilled = find_unplaced(others, kept)
    if found := explain_misfits(slots, checkpoint.tensors, unfilled, unread, stored):
        raise AdapterFileError(
            f"{path} does not fit `model`.{found}\nMend `names`, name arrays that stay "
            "as they are in `keep`, and tensors that are not needed in `ignore`."
        )
    model = with_stored_places(model, [x.place for x in slots if stored.fill(x)])
    bar = follow(slots, progress, title="Loading", unit="array")
    made = {
        slot.place.path: read_stored(checkpoint, slot, stored)
        if stored.fill(slot)
        else read_array(checkpoint, slot)
        for slot in bar
    }
    edits = {
        place.indices: lambda _, x=made[place.path]: x
        for place in Places(model).all
        if place.is_array and place.path in made
    }
    return rebuild(model, edits)


def _check_plain(places: Places) -> None:
    adapted = [place for place in places.all if is_weight(place.node)]
    if adapted:
        raise ValueError(
            f"`model` has adapters, such as that of {adapted[0].dotted}. Load the "
            "weights into the plain model first, and `lorax.loraify` it then."
        )
    foreign = [x for x in places.all if x.is_array and not _can_be_filled(x.node)]
    if foreign:
        raise ValueError(
            f"{foreign[0].dotted} is a {type(foreign[0].node).__name__}, which cannot "
            "be filled. Load the weights into the model from before."
        )


def _can_be_filled(node: Any) -> bool:
    return is_array(node) or is_quantised(node)


def _find_kept(places: Places, keep: Filter) -> set[Place]:
    if keep is None:
        return set()
    matched = match_filter(
        places.root.node, places, keep, "keep", lambda place: place.is_array
    )
    return {place for named in matched for place in named.find_covered(places)}


def _stays(slot: Slot, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether this is no weight but an array such as a counter, which checkpoints often
    leave out, and which is there already."""
    node = slot.place.node
    is_missing = all(name not in tensors for _, name in slot.tensors)
    return is_missing and not is_abstract(node) and not is_number(node)


def _follow_ties(
    slot: Slot, ties: Sequence[tuple[str, str]], tensors: Mapping[str, Any]
) -> Slot:
    """The slot with the name of the other one of two tied tensors, if only that one is
    there."""
    if slot.depth:
        return slot
    name = slot.tensors[0][1]
    for pair in ties:
        other = pair[0] if name == pair[1] else pair[1]
        if name in pair and name not in tensors and other in tensors:
            return Slot(slot.place, (((), other),), slot.is_swapped)
    return slot

"""Whether a checkpoint and a model fit, before anything but headers is read."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._shared import is_abstract, list_some, star_numbers
from .pairing import Slot
from .quantised import is_number
from .stored import explain_layouts, StoredWeights


# More lines than any reader wants; siblings that differ in numbers are one line.
_MOST = 40

_SWAPPED_HINT = (
    "name it in `file_transposed` if the checkpoint has `(in, out)`, as of a `Conv1D`, "
    "and with it square ones, whose shapes do not tell"
)
_STORED_HINT = (
    "bitsandbytes has `(out, in)`, also of a `Conv1D`, so leave it out of "
    "`file_transposed`"
)


def explain_misfits(
    slots: Collection[Slot],
    tensors: Mapping[str, np.ndarray],
    unfilled: Iterable[str],
    unread: Collection[str],
    stored: StoredWeights,
) -> str:
    """All that does not fit, as text; empty if everything does.

    **Arguments:**

    - `unfilled`: The paths of arrays that nothing fills.
    - `unread`: The names of tensors that fill nothing.
    - `stored`: The weights that are quantised.
    """
    wanted = [(name, slot) for slot in slots for _, name in slot.tensors]
    missing = [name for name, _ in wanted if name not in tensors]
    shapes: dict[str, list[str]] = {}
    damaged: dict[str, list[str]] = {}
    for name, slot in wanted:
        if name not in tensors:
            continue
        if name not in stored:
            line = _explain_misfit(slot, tensors[name])
        elif damage := stored.explain_damage(name):
            damaged.setdefault(star_numbers(name), []).append(damage)
            continue
        else:
            line = _explain_shape(slot, stored[name].shape, _STORED_HINT)
        if line:
            shapes.setdefault(f"{star_numbers(name)} {line}", []).append(name)
    unlike: dict[str, list[str]] = {}
    for slot in slots:
        names = [name for _, name in slot.tensors]
        is_whole = all(
            x in tensors and not (x in stored and stored.explain_damage(x))
            for x in names
        )
        if stored.fill(slot) and is_whole and (line := explain_layouts(slot, stored)):
            unlike.setdefault(star_numbers(slot.place.dotted), []).append(line)
    near = _find_near(missing, unread)
    blocks = {
        "Not in the checkpoint": [
            f"{line}{near.get(key, '')}" for key, line in _group(missing).items()
        ],
        "Without a place in the model": list(_group(unread).values()),
        "Arrays for which `names` has no path": list(_group(unfilled).values()),
        "Of another shape or dtype": [
            f"{line}{_times(names)}" for line, names in shapes.items()
        ],
        "Quantised, and not whole": [
            f"{lines[0]}{_times(lines)}" for lines in damaged.values()
        ],
        "Quantised otherwise than it has to be": [
            f"{lines[0]}{_times(lines)}" for lines in unlike.values()
        ],
    }
    return "".join(
        f"\n{title}:\n  {list_some(lines, _MOST, chr(10) + '  ')}"
        for title, lines in blocks.items()
        if lines
    )


def _explain_misfit(slot: Slot, tensor: np.ndarray) -> str | None:
    dtype = slot.place.node.dtype
    if tensor.shape != slot.torch_shape:
        hint = ""
        if tensor.ndim == 2 and tensor.shape[1] == 1 and tensor.dtype == np.uint8:
            hint = (
                ", which looks like four-bit weights of bitsandbytes without what "
                "belongs to them: get the files again"
            )
        return _explain_shape(slot, tensor.shape, _SWAPPED_HINT) + hint
    here = f"{slot.place.dotted} here"
    if _rank_of_kind(tensor.dtype) > _rank_of_kind(dtype) or (
        _rank_of_kind(tensor.dtype) < 2 <= _rank_of_kind(dtype)
    ):
        return f"{tensor.dtype} cannot be {dtype}, as of {here}"
    return None


def _explain_shape(slot: Slot, found: tuple[int, ...], swapped_hint: str) -> str:
    """What is wrong with a shape; empty if nothing is."""
    shape = slot.torch_shape
    if found == shape:
        return ""
    is_swapped = len(shape) > 1 and found == (*shape[:-2], shape[-1], shape[-2])
    hint = f", the other way round: {swapped_hint}" if is_swapped else ""
    return f"{found} is not {shape}, as of {slot.place.dotted} here{hint}"


def _rank_of_kind(dtype: Any) -> int:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    found = [i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)]
    return found[0] if found else len(kinds)


def _group(names: Iterable[str]) -> dict[str, str]:
    """A line for all names that differ in numbers alone, by these with stars."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(star_numbers(name), []).append(name)
    return {
        key: f"{key}{_times(found)}" if len(found) > 1 else found[0]
        for key, found in groups.items()
    }


def _times(found: Collection[str]) -> str:
    return f" × {len(found)}" if len(found) > 1 else ""


def _find_near(missing: Iterable[str], unread: Iterable[str]) -> dict[str, str]:
    """The near misses, by the names that are missing, both with stars."""
    candidates = list(_group(unread))
    found: dict[str, str] = {}
    for key in _group(missing):
        longer = [x for x in candidates if x.endswith(f".{key}")]
        shorter = [x for x in candidates if key.endswith(f".{x}")]
        near = longer or shorter or difflib.get_close_matches(key, candidates, 1)
        if near:
            found[key] = f" (did you mean {near[0]}?)"
    return found


def find_unplaced(others: Iterable[Any], kept: Collection[Any]) -> Iterator[str]:
    """The paths of arrays that nothing fills and that cannot stay as they are: numbers
    that `keep` does not name, and any that are abstract."""
    for place in others:
        if is_abstract(place.node) and place in kept:
            yield f"{place.dotted} (`keep` names it, and it is abstract)"
        elif place not in kept and (is_abstract(place.node) or is_number(place.node)):
            yield place.dotted

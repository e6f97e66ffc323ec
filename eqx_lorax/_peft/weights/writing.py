"""Writing safetensors files tensor by tensor, and checkpoints of several files
atomically."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..._adapters import name_dtype, replace_file
from .files import find_parts, INDEX, WHOLE


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path, files: list[list[Entry]], tensors: Iterator[np.ndarray]
) -> None:
    """Writes the checkpoint in the place of the one that is in the folder.

    New files have names of their own, and count from the moment that the index, or the
    only file, is replaced. So a reader finds the old checkpoint or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = find_parts(folder)
    if len(files) == 1:
        with replace_file(folder / WHOLE) as new:
            _write_file(new, files[0], tensors)
        _remove(folder, old - {WHOLE})
        return
    paths = [folder / name for name in _choose_names(len(files), old)]
    with contextlib.ExitStack() as stack:
        for path, entries in zip(paths, files):
            _write_file(stack.enter_context(replace_file(path)), entries, tensors)
    index = {
        "metadata": {"total_size": sum(x.size for entries in files for x in entries)},
        "weight_map": {
            entry.name: path.name
            for path, entries in zip(paths, files)
            for entry in entries
        },
    }
    with replace_file(folder / INDEX) as new:
        new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    _remove(folder, old - {INDEX} - {path.name for path in paths})


def _choose_names(count: int, old: set[str]) -> list[str]:
    """The names that `transformers` gives to parts, or others if the old checkpoint has
    these."""
    for stem in ("model", "model-new"):
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if old.isdisjoint(names):
            break
    return names


def _remove(folder: Path, names: set[str]) -> None:
    # A file that is read as the whole checkpoint hides all others, so it goes first.
    for name in sorted(names, key=lambda name: name != WHOLE):
        (folder / name).unlink(missing_ok=True)


def _write_file(
    path: Path, entries: list[Entry], tensors: Iterator[np.ndarray]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": name_dtype(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in entries:
            tensor = np.ascontiguousarray(next(tensors))
            file.write(tensor.reshape(-1).view(np.uint8).data)

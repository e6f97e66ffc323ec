"""Checkpoints of whole models in safetensors files: one file, or several with an
index."""

import json
import mmap
from pathlib import Path

import numpy as np

from ..._adapters import (
    AdapterFileError,
    explain_foreign_file,
    map_tensors,
    PEFT_CONFIG,
)
from ..._shared import list_some


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_ENDING = ".safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of all files, as views of their memory maps: only headers are read
    yet."""

    def __init__(self, path: Path):
        """**Raises:**

        `AdapterFileError` if a file is missing, damaged, or none of safetensors, or if
        the index is not of these files. `FileNotFoundError` if there is nothing.
        """
        self.path = path
        self.tensors: dict[str, np.ndarray] = {}
        self._maps: list[mmap.mmap] = []
        file = _find_file(path)
        if not file.name.endswith(".json"):
            self._add(file)
            return
        by_file: dict[str, set[str]] = {}
        for name, part in _read_index(file).items():
            by_file.setdefault(part, set()).add(name)
        missing = [x for x in sorted(by_file) if not (file.parent / x).is_file()]
        if missing:
            raise AdapterFileError(
                f"{file} names files that are not beside it: {list_some(missing)}. "
                "Download them too."
            )
        for part, names in sorted(by_file.items()):
            found = self._add(file.parent / part)
            if found != names:
                raise AdapterFileError(
                    f"{file} is not the index of {part}: they differ in "
                    f"{list_some(sorted(found ^ names))}. They are of two checkpoints; "
                    "download all files again."
                )

    def _add(self, file: Path) -> set[str]:
        if found := explain_foreign_file(file):
            raise AdapterFileError(f"{file} {found}")
        _, tensors, mapped = map_tensors(file)
        self.tensors |= tensors
        self._maps.append(mapped)
        return set(tensors)

    def release(self) -> None:
        """Lets go of the pages that were read. Reading them again is only slower."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)


def find_parts(folder: Path) -> set[str]:
    """The names of the files of the checkpoint in `folder`, if there is one."""
    parts = {name for name in (WHOLE, INDEX) if (folder / name).is_file()}
    try:
        return parts | set(_read_index(folder / INDEX).values())
    except (AdapterFileError, OSError):
        return parts


def _find_file(path: Path) -> Path:
    """The index, or the only file, at `path`."""
    if path.is_file():
        is_index = path.name.endswith(_INDEX_ENDING)
        if path.suffix == ".json" and not is_index:
            raise AdapterFileError(
                f"{path} is no index, which ends in {_INDEX_ENDING}. Pass its folder."
            )
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is nothing at {path}. A model of the Hugging Face hub is to be "
            "downloaded first: `huggingface_hub.snapshot_download(name)`."
        )
    # The order of `transformers`.
    for name in (WHOLE, INDEX):
        if (path / name).is_file():
            return path / name
    if (path / PEFT_CONFIG).is_file():
        raise AdapterFileError(
            f"{path} has an adapter and no model. It is read by `lorax.peft.load`."
        )
    found = sorted(path.glob(f"*{_INDEX_ENDING}")) or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = list_some(x.name for x in found)
        raise AdapterFileError(f"{path} has {names}. Pass the path of one of them.")
    pickles = [x.name for kind in _PICKLES for x in path.glob(kind)]
    if pickles:
        raise AdapterFileError(
            f"{path} has no safetensors; {list_some(sorted(pickles))} may be pickles, "
            "which can run any code when they are opened, and never are here. If you "
            "trust them, convert them with PyTorch: `transformers.AutoModel."
            "from_pretrained(path).save_pretrained(folder, safe_serialization=True)`."
        )
    raise FileNotFoundError(f"There is no {WHOLE} in {path}, and no other.")


def _read_index(file: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        found = json.loads(file.read_bytes())["weight_map"]
        # Nothing outside the folder is opened.
        if not all(type(x) is str and Path(x).name == x for x in found.values()):
            raise ValueError("its `weight_map` does not name files beside it")
        return dict(found)
    except (
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise AdapterFileError(
            f"{file} is no index of safetensors files: {type(error).__name__}: {error}."
            " Download it again."
        ) from error

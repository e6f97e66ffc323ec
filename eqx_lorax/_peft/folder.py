"""Reading the two files of an adapter, and the names of its tensors."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .._adapters import (
    AdapterFileError,
    explain_foreign_file,
    explain_foreign_folder,
    explain_foreign_tensors,
    is_native,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    read_tensors,
)
from .config import check_config
from .methods import BY_TYPE, OPTIONS, SHARED
from .pytorch import list_paths
from .tensors import MAGNITUDE


_T = TypeVar("_T")

PREFIX = "base_model.model."
_SHARED_PREFIX = "base_model."
# Names that wrappers of a model add to its paths.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module"}
_OF_METHODS = sorted({name for x in BY_TYPE.values() for name in x.names})
_WITH_ADAPTER_NAME = re.compile(
    r"((?:.*\.)?(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|trainable_tokens_delta|"
    rf"{'|'.join([*_OF_METHODS, *SHARED])}))"
    r"\.((?!lora_|weight$|bias$)[^.]+)((?:\..*)?)"
)


def read_folder(
    folder: Path,
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The configuration, the metadata and the tensors.

    **Raises:**

    `AdapterFileError` if the folder is no adapter that can be read; the message says
    what it is instead. `FileNotFoundError` if there is nothing.
    """
    _check_files(folder)
    try:
        config = json.loads((folder / PEFT_CONFIG).read_bytes())
        check_config(config, OPTIONS)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{folder / PEFT_CONFIG}: {error}.") from error
    metadata, tensors, _ = read_tensors(folder / PEFT_WEIGHTS)
    if found := explain_foreign_tensors(tensors):
        raise AdapterFileError(f"{folder / PEFT_WEIGHTS} {found}")
    return config, metadata, tensors


def has_prefix(names: Iterable[str]) -> bool:
    return any(_strip_wrappers(name).startswith(PREFIX) for name in names)


def to_key(name: str) -> str:
    """The name in a file of a tensor, from its path in the model."""
    return _SHARED_PREFIX + name if name in SHARED else PREFIX + name


def strip_names(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """The tensors by their paths in the model alone: without PEFT's prefix, if there is
    one, the names of wrappers, and the name of the adapter.

    **Raises:**

    `ValueError` if these are not the same for all tensors, so that there are several
    adapters.
    """
    shared = {
        name: name.removeprefix(_SHARED_PREFIX)
        for name in map(_strip_wrappers, tensors)
        if name.removeprefix(_SHARED_PREFIX).partition(".")[0] in SHARED
    }
    others = [
        x for x in tensors if not has_prefix([x]) and _strip_wrappers(x) not in shared
    ]
    if 0 < len(others) < len(tensors) - len(shared):
        raise ValueError(
            f"some of its tensors begin with {PREFIX} and some do not: "
            f"{list_paths(others)}. Rename these in the file."
        )
    plain: dict[str, _T] = {}
    adapters: dict[str, None] = {}
    for name, x in tensors.items():
        path = _strip_wrappers(name)
        path = shared.get(path, path.removeprefix(PREFIX))
        found = _WITH_ADAPTER_NAME.fullmatch(path)
        if found is not None:
            adapters[found[2]] = None
            path = found[1].removesuffix(".modules_to_save") + found[3]
        if path.endswith(f".{MAGNITUDE}.weight"):
            path = path.removesuffix(".weight")
        plain[path] = x
    if len(adapters) > 1:
        raise ValueError(
            f"it holds several adapters, {list_paths(adapters)}. Save one of them in "
            "PEFT: `model.save_pretrained(folder, selected_adapters=[name])`."
        )
    if len(plain) < len(tensors):
        raise ValueError("two of its tensors are the same but for names of adapters.")
    return plain


def _strip_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_files(folder: Path) -> None:
    if folder.is_file():
        raise AdapterFileError(f"`directory={str(folder)!r}` {_explain_file(folder)}")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. An adapter of the Hugging Face hub is to be "
            "downloaded first: `huggingface_hub.snapshot_download(name)`."
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        if found := explain_foreign_folder(folder):
            raise AdapterFileError(f"{folder} {found}")
        native = [x.name for x in folder.glob("*.safetensors") if is_native(x)]
        if native:
            raise AdapterFileError(
                f"{folder} has {list_paths(native)}, of `lorax.save_adapter`. "
                "That is read by `lorax.load_adapter`."
            )
        raise FileNotFoundError(f"There is no {PEFT_WEIGHTS} in {folder}.")
    if found := explain_foreign_file(folder / PEFT_WEIGHTS):
        raise AdapterFileError(f"{folder / PEFT_WEIGHTS} {found}")
    if not (folder / PEFT_CONFIG).is_file():
        raise FileNotFoundError(
            f"There is no {PEFT_CONFIG} in {folder}, which says how the tensors are "
            "scaled. Copy it from where the adapter was saved or, if you know what it "
            'was, write it: `{"peft_type": "LORA", "r": 8, "lora_alpha": 16, '
            '"target_modules": ["q_proj"]}`.'
        )


def _explain_file(file: Path) -> str:
    if found := explain_foreign_file(file):
        return found
    if file.name in (PEFT_CONFIG, PEFT_WEIGHTS):
        return f"is one file of an adapter. Pass its folder, {str(file.parent)!r}."
    if is_native(file):
        return "is a file of `lorax.save_adapter`. It is read by `lorax.load_adapter`."
    found = explain_foreign_tensors(read_tensors(file)[1])
    return found or (
        f"is a file. Pass a folder which has `{PEFT_CONFIG}` and, by this name, "
        f"`{PEFT_WEIGHTS}`."
    )

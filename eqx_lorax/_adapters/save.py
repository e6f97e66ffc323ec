"""Adapters on disk, in the format of this library: one safetensors file.

The file holds the trained arrays, bit for bit. Its metadata have two entries. The
first, `"eqx_lorax"`, is a JSON object, the header: it says what the arrays are, and has
a hash of each of them and a fingerprint of each array of the base. The second,
`"eqx_lorax_digest"`, is a hash of the header. Nothing in the file is ever executed.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from .._methods import check_whole, list_methods
from .._modules import without_views
from .._shared import write_once
from .._trees import Filter, join_path, Places
from .adapter import (
    Adapter,
    DetachedWeight,
    extract_adapter,
    insert_adapter,
    is_setting,
)
from .atomic import replace_file
from .files import (
    AdapterFileError,
    check_base,
    find_differences,
    is_storable,
    parse_content,
    read_tensors,
)
from .fingerprint import fingerprint_base, hash_content
from .foreign import explain_foreign_tensors, explain_not_native, HEADER, READ_BY_PEFT


_Model = TypeVar("_Model")

FORMAT = 1
_DIGEST = "eqx_lorax_digest"


def save_adapter(
    path: str | os.PathLike[str],
    model: Any,
    *,
    also: Filter = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes what is trained of a model to one file, without the base.

    The file is written beside `path` and then moved there: a good file that was there
    before stays until the new one is whole. If the model is placed on the devices of
    several processes, all of them do this call and the first one writes.

    !!! example

        ```python
        lorax.save_adapter("adapter.safetensors", model, also="head")
        model = lorax.load_adapter("adapter.safetensors", plain_model)
        ```

    **Arguments:**

    - `path`: The file, usually `*.safetensors`. Folders on the way to it are made.
    - `model`: A model with adapters.
    - `also`: What was trained besides the factors, see `lorax.partition`.
    - `metadata`: Anything that JSON can hold, to be kept in the file.
        `lorax.adapter_info` returns it.

    **Raises:**

    `ValueError` if there is nothing to save, or if `also` names nothing. `TypeError` if
    `metadata` is not JSON, if an array is abstract, or if a weight cannot be made again
    of the arguments of its class. `OSError`, in every process, if the file cannot be
    written.
    """
    check_whole(model, "lorax.save_adapter(path, {})")
    model = without_views(model)
    places = Places(model)
    adapter = extract_adapter(model, places, also)
    tensors: dict[str, np.ndarray] = {}

    def store(name: str, array: Any) -> str:
        if not is_storable(array.dtype):
            raise TypeError(
                f"{name} is of dtype {array.dtype}, which safetensors does not have. "
                "Train it in a wider one, or leave it out of `also`."
            )
        tensors[name] = np.asarray(jax.device_get(array), order="C")
        return name

    targets = [
        {
            "path": detached.path,
            "method": detached.method,
            "shape": detached.shape,
            "dtype": detached.dtype,
            "settings": detached.settings,
            "dropout": detached.dropout,
            "tensors": {
                name: store(f"{join_path(detached.path)}.{name}", array)
                for name, array in detached.arrays.items()
            },
        }
        for detached in adapter.weights
    ]
    others = [
        {"path": path, "tensor": store(join_path(path), array)}
        for path, array in adapter.others.items()
    ]
    try:
        header = json.dumps(
            {
                "format": FORMAT,
                "library": importlib.metadata.version("eqx-lorax"),
                "targets": targets,
                "others": others,
                "digests": {
                    name: hash_content(array) for name, array in tensors.items()
                },
                "base": fingerprint_base(places, adapter.others),
                "metadata": dict(metadata or {}),
            },
            allow_nan=False,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"`metadata` is not what JSON can hold: {error}") from error

    def write() -> None:
        with replace_file(Path(path)) as new:
            digest = hash_content(header)
            save_file(tensors, new, {HEADER: header, _DIGEST: digest})

    write_once(write, jax.tree.leaves(model))


def load_adapter(
    path: str | os.PathLike[str], model: _Model, *, allow_other_base: bool = False
) -> _Model:
    """Puts an adapter that `lorax.save_adapter` has written into a model.

    !!! example

        ```python
        model = lorax.load_adapter("adapter.safetensors", plain_model)
        ```

    **Arguments:**

    - `path`: The file.
    - `model`: The plain model, or one with adapters in the same places, the arrays of
        which are replaced.
    - `allow_other_base`: Whether base weights may differ from those that the adapter
        was trained on, which is otherwise an error.

    **Returns:**

    The model with the adapter, and with all else that was saved. The arrays have the
    dtypes and bits that they had when saved. They have the shardings of the arrays of
    `model` that they replace, or those that `lorax.loraify` would give them. `model`
    itself is not changed.

    **Raises:**

    `lorax.AdapterFileError`, a `ValueError`, if the file is not such an adapter, is
    damaged or from a newer version, or if it does not fit the model: other paths,
    shapes, dtypes, or base weights. The message names the paths. `OSError` if no file
    can be read there.
    """
    check_whole(model, "lorax.load_adapter(path, {})")
    header, tensors = _read(Path(path))
    adapter = parse_content(path, lambda: _make_adapter(header, tensors))
    model = without_views(model)
    places = Places(model)
    try:
        adapted = insert_adapter(model, places, adapter)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    if not allow_other_base:
        base = parse_content(path, lambda: dict(header["base"]))
        check_base(path, base, places, adapter.others)
    return adapted


def adapter_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `lorax.save_adapter` wrote about an adapter.

    !!! example

        ```python
        info = lorax.adapter_info("adapter.safetensors")
        print(info["targets"], info["metadata"])
        ```

    **Arguments:**

    - `path`: The file.

    **Returns:**

    A dictionary with `"format"` and `"library"` (versions), `"targets"` (with the path,
    the shape and the dtype of the base, the method, its settings and the shapes of its
    arrays), `"others"` (paths), `"base"` (a fingerprint of each frozen array), and your
    own `"metadata"`.

    **Raises:**

    `lorax.AdapterFileError`, a `ValueError`, if the file is not such an adapter, is
    damaged or from a newer version. `OSError` if no file can be read there.
    """
    header, tensors = _read(Path(path))
    return parse_content(path, lambda: _describe(header, tensors))


def _describe(
    header: Mapping[str, Any], tensors: Mapping[str, Array]
) -> dict[str, Any]:
    adapter = _make_adapter(header, tensors)
    return {
        "format": header["format"],
        "library": header["library"],
        "targets": [
            {
                "path": detached.dotted,
                "shape": detached.shape,
                "dtype": detached.dtype,
                "method": detached.method,
                "dropout": detached.dropout,
                **detached.settings,
                "arrays": {name: x.shape for name, x in detached.arrays.items()},
            }
            for detached in adapter.weights
        ],
        "others": [".".join(path) for path in adapter.others],
        "base": header["base"],
        "metadata": header["metadata"],
    }


# Reading


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The header and the tensors. Their hashes say that no bit has changed since they
    were written."""
    if foreign := explain_not_native(path):
        raise AdapterFileError(f"{path} {foreign}")
    metadata, tensors, hashes = read_tensors(path)
    if HEADER not in metadata:
        what = explain_foreign_tensors(tensors) or READ_BY_PEFT
        raise AdapterFileError(
            f"{path} was not written by `lorax.save_adapter`: {what}"
        )
    if metadata.get(_DIGEST) != hash_content(metadata[HEADER]):
        raise AdapterFileError(f"{path} is damaged: its header is not as written.")
    header = parse_content(path, lambda: dict(json.loads(metadata[HEADER])))
    found = parse_content(path, lambda: int(header["format"]))
    if found > FORMAT:
        raise AdapterFileError(
            f"{path} has format {found}, of eqx-lorax {header.get('library')}; this "
            f"version reads formats up to {FORMAT}. Upgrade eqx-lorax."
        )
    wrong = list(
        find_differences(parse_content(path, lambda: dict(header["digests"])), hashes)
    )
    if wrong:
        raise AdapterFileError(f"{path} is damaged: {'; '.join(wrong[:8])}.")
    return header, tensors


def _make_adapter(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> Adapter:
    """The adapter that a header describes. May raise anything if the header is not
    well-formed, see `parse_content`."""

    def detach(target: Mapping[str, Any]) -> DetachedWeight:
        if target["method"] not in list_methods():
            raise ValueError(f"its method {target['method']!r} is not known here")
        if not 0 <= (target["dropout"] or 0) < 1 or not all(
            is_setting(x) for x in target["settings"].values()
        ):
            raise ValueError(f"{target['settings']} are no settings")
        return DetachedWeight(
            path=tuple(map(str, target["path"])),
            method=target["method"],
            shape=tuple(map(int, target["shape"])),
            dtype=str(target["dtype"]),
            settings=dict(target["settings"]),
            dropout=target["dropout"],
            arrays={
                str(name): tensors[tensor] for name, tensor in target["tensors"].items()
            },
        )

    others = {
        tuple(map(str, other["path"])): tensors[other["tensor"]]
        for other in header["others"]
    }
    if len(tensors) != len(others) + sum(len(t["tensors"]) for t in header["targets"]):
        raise ValueError("some tensors belong to nothing")
    return Adapter([detach(target) for target in header["targets"]], others)

"""What all formats of adapter files share: the error, reading safetensors, comparing
bases.

A new format is a new file, or room, that makes an `Adapter` of what it reads.
"""

import json
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import safe_open, SafetensorError

from .._shared import list_some
from .._trees import Places
from .fingerprint import fingerprint_base, hash_content, read_format


_Value = TypeVar("_Value")

_DTYPES = {
    "BOOL": np.bool_,
    "BF16": jnp.bfloat16,
    "C64": np.complex64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
# What content may raise, as it is parsed, that is not what it should be.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class AdapterFileError(ValueError):
    """A file is no adapter, or no checkpoint, is damaged, or belongs to another
    model.

    !!! example

        ```python
        try:
            model = lorax.load_adapter("adapter.safetensors", other_model)
        except lorax.AdapterFileError as error:
            print(error)  # the paths and shapes that do not fit
        ```
    """


# Tensors


def is_storable(dtype: Any) -> bool:
    """Whether safetensors has this dtype."""
    return name_dtype(dtype) is not None


def name_dtype(dtype: Any) -> str | None:
    """The name of the dtype in safetensors files; `None` if they do not have it."""
    return next((x for x, known in _DTYPES.items() if dtype == np.dtype(known)), None)


def map_tensors(
    path: Path,
) -> tuple[dict[str, str], dict[str, np.ndarray], mmap.mmap]:
    """The metadata and the tensors of a safetensors file. The tensors are views of its
    memory map, which comes last: nothing but the header is read yet.

    **Raises:**

    `AdapterFileError` if the file is not one, or not a whole one.
    """
    try:
        with open(path, "rb") as file:
            # Checks all of the file except the bits of its tensors.
            with safe_open(path, "numpy") as checked:
                metadata = checked.metadata() or {}
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[:8], "little")
        entries = json.loads(mapped[8 : 8 + length])
    except (SafetensorError, RecursionError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file: {error}. If it was copied here, "
            "copy it again."
        ) from error
    entries.pop("__metadata__", None)
    content = np.frombuffer(mapped, np.uint8)[8 + length :]
    tensors: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterFileError(
                f"{path}: {name} has the dtype {entry['dtype']}, unknown here."
            )
        bits = content[slice(*entry["data_offsets"])]
        tensors[name] = bits.view(dtype).reshape(entry["shape"])
    return metadata, tensors, mapped


def read_tensors(
    path: Path,
) -> tuple[dict[str, str], dict[str, Array], dict[str, str]]:
    """The metadata, the tensors and the hashes of the tensors of a safetensors file.

    **Raises:**

    `AdapterFileError` if the file is not one, or not a whole one.
    """
    metadata, views, _ = map_tensors(path)
    hashes = {name: hash_content(view) for name, view in views.items()}
    tensors = {name: _on_device(path, name, view) for name, view in views.items()}
    return metadata, tensors, hashes


def _on_device(path: Path, name: str, array: np.ndarray) -> Array:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise AdapterFileError(
            f"{path}: {name} is of dtype {array.dtype}, which JAX would round. Switch "
            "on `jax_enable_x64`."
        )
    # A copy, since the file may change. It is waited for, since it is made later.
    return jax.block_until_ready(jax.device_put(array, may_alias=False))


def parse_content(path: Any, parse: Callable[[], _Value]) -> _Value:
    """Calls `parse`, a function that takes the content of the file at `path` for
    well-formed and so may fail in any way. It should do nothing else, since whatever it
    raises is reported as a fault of the file.

    **Raises:**

    `AdapterFileError` if it fails.
    """
    try:
        return parse()
    except _MALFORMED as error:
        raise AdapterFileError(
            f"{path}: the header does not describe an adapter: "
            f"{type(error).__name__}: {error}"
        ) from error


def find_differences(
    written: Mapping[str, Any],
    found: Mapping[str, Any],
    explain: Callable[[Any, Any], str] = lambda *_: "",
) -> Iterator[str]:
    """A line for each name whose values in the two mappings differ, with what `explain`
    says of these values."""
    for name in written:
        if name not in found:
            yield f"{name} is missing"
        elif written[name] != found[name]:
            yield f"{name} differs{explain(written[name], found[name])}"
    for name in found:
        if name not in written:
            yield f"{name} is not of it"


def list_problems(problems: Sequence[str]) -> str:
    """The problems in one line."""
    return list_some(problems, separator="; ")


# Bases


def check_base(
    path: Any,
    written: Mapping[str, Any],
    places: Places,
    without: Collection[tuple[str, ...]],
) -> None:
    """Checks that a model has the base that an adapter was trained on.

    **Arguments:**

    - `path`: The file of the adapter, for the message.
    - `written`: The fingerprints of that base, see `fingerprint_base`.
    - `without`: The paths of arrays that are not compared.

    **Raises:**

    `AdapterFileError` if an array differs, is missing, or was not there.
    """
    found = fingerprint_base(places, without)
    wrong = list(find_differences(written, found, _explain_formats))
    if wrong:
        raise AdapterFileError(
            f"{path} was trained on another base than `model`: "
            f"{list_problems(wrong)}. Load it into the model that it was trained on. "
            "What was trained beside the adapter, such as a head, has to be named in "
            "`also` when it is saved. If these differences are meant, pass "
            "`allow_other_base=True`: such arrays stay as they are in `model`."
        )


def _explain_formats(written: str, found: str) -> str:
    """Which of two bases is quantised, where that is what differs."""
    then, now = (read_format(x) for x in (written, found))
    if then == now:
        return "" if now is None else f" (quantised as {now} both times)"
    then, now = ("not quantised" if x is None else x for x in (then, now))
    return f" ({then} when the adapter was trained, {now} in `model`)"

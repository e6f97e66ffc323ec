"""Where a program runs, and what its model is, for the report of a bug."""

import collections
import dataclasses
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from .._factored import stands_for_array
from .._methods import base_of, is_weight, list_weights, unfuse
from .._shared import count_devices, is_array, list_arrays, PyTree
from .._training import format_bytes
from .rounding import name_format


@dataclasses.dataclass(frozen=True, repr=False)
class Info:
    """What `lorax.info` found. Its `str` and its `repr` are the text to paste."""

    versions: Mapping[str, str]
    """By the name of the package."""
    system: Mapping[str, str]
    """Python, the platform and the processor."""
    devices: Mapping[str, str]
    """What JAX computes on, by the number and the kind."""
    settings: Mapping[str, str]
    """The configuration of JAX, and the environment variables that XLA reads."""
    model: Mapping[str, str]
    """The targets, methods, ranks and dtypes of the model; empty without one."""

    def __str__(self) -> str:
        sections = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        width = max((len(x) for found in sections.values() for x in found), default=0)
        lines = []
        for title, found in sections.items():
            lines += [title] * bool(found)
            lines += [f"  {name:<{width}}  {text}" for name, text in found.items()]
        return "\n".join(lines)

    __repr__ = __str__


def info(model: PyTree = None) -> Info:
    """What a report of a bug needs: versions, devices and settings, and of a model its
    targets and dtypes. Paste it as it is.

    It never fails. What cannot be found out is left out. Of environment variables only
    the flags of XLA are shown, and of these no paths and no secrets. The command
    `python -m eqx_lorax` prints the same.

    !!! example

        ```python
        print(lorax.info(model))
        ```

    **Arguments:**

    - `model`: Any model or tree of parameters, adapted or not.

    **Returns:**

    A `lorax.Info`. As a string it is the text to paste.
    """
    return Info(
        versions=_gather(_find_versions),
        system=_gather(_find_system),
        devices=_gather(_find_devices),
        settings=_gather(_find_settings),
        model={} if model is None else _gather(lambda: _describe(model)),
    )


_Entries = Iterator[tuple[str, Callable[[], Any]]]


def _gather(find: Callable[[], _Entries]) -> dict[str, str]:
    """What the entries say. An entry that fails, or says nothing, is left out."""
    found = {}
    try:
        for name, say in find():
            try:
                text = say()
            except Exception:
                continue
            if text not in (None, ""):
                # On one line, whatever a driver calls itself.
                found[name] = " ".join(str(text).split())
    except Exception:
        pass
    return found


_PACKAGES = (
    *("eqx_lorax", "jax", "jaxlib", "equinox", "optax", "jaxtyping", "safetensors"),
    *("numpy", "orbax-checkpoint", "torch", "peft", "transformers", "flax", "qwix"),
    *("bitsandbytes", "gguf", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)


def _find_versions() -> _Entries:
    for name in _PACKAGES:
        yield name, lambda: importlib.metadata.version(name)


def _find_system() -> _Entries:
    yield "python", lambda: f"{platform.python_version()} ({sys.implementation.name})"
    yield "platform", platform.platform
    yield "processor", _name_processor
    yield "cores", os.cpu_count
    yield "memory", lambda: format_bytes(_count_memory())


def _name_processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return re.findall(r"^model name\s*: (.+)$", file.read(), re.MULTILINE)[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _count_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _find_devices() -> _Entries:
    kinds = collections.defaultdict(list)
    for device in jax.devices():
        kinds[f"{device.platform} ({device.device_kind})"].append(device)
    for kind, devices in kinds.items():
        yield kind, lambda: f"× {len(devices)}{_say_memory(devices[0])}"
    yield "processes", lambda: jax.process_count() if jax.process_count() > 1 else ""


def _say_memory(device: Any) -> str:
    try:
        limit = (device.memory_stats() or {})["bytes_limit"]
    except Exception:
        return ""
    return f", {format_bytes(limit)} each"


# What is shown in any case, and what only where it is not as JAX comes.
_SHOWN = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_dtype_bits",
    "jax_debug_nans",
)
_USUAL: dict[str, Any] = {
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": None,
    "jax_platforms": None,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
}
_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "NVIDIA_TF32_OVERRIDE",
)


def _find_settings() -> _Entries:
    for name in _SHOWN:
        yield name, lambda: str(getattr(jax.config, name))
    for name, usual in _USUAL.items():
        if (value := getattr(jax.config, name, usual)) != usual:
            yield name, lambda: _hide(str(value))
    for name in _VARIABLES:
        yield name, lambda: _hide(os.environ.get(name, ""))


def _hide(flags: str) -> str:
    """The flags without what may be private: all but names, numbers and plain words."""
    shown = []
    for flag in flags.split():
        name, is_assigned, value = flag.partition("=")
        is_private = re.search("key|token|secret|passw|auth|cred", name, re.IGNORECASE)
        is_plain = re.fullmatch(r"[A-Za-z0-9_.,+-]{0,40}", value) and not is_private
        # The flags may also be in a file, whose path is all that is there.
        name = name if re.fullmatch(r"[A-Za-z0-9_.-]+", name) else "…"
        shown.append(f"{name}{is_assigned}{value if is_plain else '…'}")
    return " ".join(shown)


def _describe(model: PyTree) -> _Entries:
    weights = [unfuse(weight) for weight in list_weights(model)]
    bases = [base for base in map(base_of, weights) if base is not None]
    leaves = jax.tree.leaves(model, is_leaf=stands_for_array)
    arrays = [x for x in leaves if is_array(x) or stands_for_array(x)]
    others = [x for x in arrays if not is_weight(x)]
    yield "targets", lambda: str(len(weights))
    yield "methods", lambda: _tally(_name_method(weight) for weight in weights)
    yield "ranks", lambda: _tally(_find_rank(weight) for weight in weights)
    yield "bases", lambda: _tally(name_format(base) for base in bases)
    yield "factors", lambda: _tally(x.dtype for y in weights for x in _own_arrays(y))
    yield "other arrays", lambda: _tally(map(name_format, others))
    yield "devices", lambda: count_devices(model)


def _name_method(weight: Any) -> str:
    return getattr(weight, "method", type(weight).__name__)


def _find_rank(weight: Any) -> int:
    rank = getattr(weight, "rank", None)
    return weight.factored().rank if rank is None else rank


def _own_arrays(weight: Any) -> list[Any]:
    """The arrays of an adapter, without those of its base."""
    base = {id(x) for x in jax.tree.leaves(base_of(weight))}
    return [x for x in list_arrays(weight) if id(x) not in base]


def _tally(items: Iterable[Any]) -> str:
    """`float32 × 12, bfloat16 × 2`"""
    counts = collections.Counter(map(str, items)).most_common()
    return ", ".join(f"{item} × {count}" for item, count in counts)

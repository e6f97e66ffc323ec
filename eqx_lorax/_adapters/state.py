"""The state of a training run as plain arrays and numbers with names, which Orbax can
hold, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from .._methods import FactoredWeight, is_weight, unfuse
from .._shared import as_array, committed_sharding, count_bits, is_array, list_some
from .fingerprint import from_bits, hash_content, to_bits


# Trees


def split_state(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a tree, and its other numbers and strings, by name."""
    arrays: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, leaf in zip(name_leaves(state), jax.tree.leaves(state), strict=True):
        if is_array(leaf) or isinstance(leaf, np.generic):
            arrays[name] = leaf
        elif isinstance(leaf, bool | int | float | complex | str):
            values[name] = leaf
    return arrays, values


def name_leaves(state: Any) -> list[str]:
    """A name for each leaf of a tree, its path. Views of weights, and weights under
    `lorax.merged_forward`, have the names of the plain ones."""
    names: list[str] = []
    for path, node in jtu.tree_leaves_with_path(state, is_leaf=is_weight):
        prefix = f"state{jtu.keystr(path)}"
        node = unfuse(node)
        for below, _ in jtu.tree_leaves_with_path(node):
            name = jtu.keystr(below)
            if isinstance(node, FactoredWeight):
                name = name.removeprefix(".form").replace(".base", ".w")
            names.append(prefix + name)
    return names


def find_misfits(
    written: Mapping[str, Any],
    written_values: Mapping[str, Any],
    arrays: Mapping[str, Any],
    values: Mapping[str, Any],
) -> Iterator[str]:
    """A line for each difference between what was written and the state to restore."""
    found = [*arrays, *values]
    kept = [*written, *written_values]
    yield from (f"{name} is not in `state`" for name in kept if name not in found)
    yield from (f"{name} is not in it" for name in found if name not in kept)
    for name, x in arrays.items():
        if name in written_values:
            yield f"{name} is a number in it"
        elif name in written and (kind := describe_array(x)) != {
            key: written[name][key] for key in kind
        }:
            there = f"{written[name]['dtype']} {tuple(written[name]['shape'])}"
            yield f"{name} is {there} in it, {x.dtype} {tuple(x.shape)} in `state`"
    yield from (f"{name} is an array in it" for name in values if name in written)


# Arrays


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def describe_array(x: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def find_key_impl(x: Any) -> str | None:
    return str(jax.random.key_impl(x)) if _is_key(x) else None


def _is_of_one_process(sharding: Sharding) -> bool:
    return sharding.is_fully_addressable and jax.process_count() > 1


def is_packed(x: Any) -> bool:
    """Whether `x` is stored as its bits: Orbax knows few dtypes that are so narrow."""
    return (
        not _is_key(x)
        and x.dtype.name not in ("bool", "int8", "uint8")
        and (count_bits(x.dtype) <= 8)
    )


def to_raw(x: Any) -> Any:
    """`x` as Orbax holds it: as an array of NumPy if only this process has it."""
    x = jax.random.key_data(x) if _is_key(x) else x
    x = to_bits(x) if is_packed(x) else x
    is_local = not isinstance(x, jax.Array) or _is_of_one_process(x.sharding)
    # A copy, since Orbax writes while the program goes on.
    return np.array(jax.device_get(x)) if is_local else x


def make_raw_struct(like: Any, packed: bool) -> jax.ShapeDtypeStruct:
    """The shape and dtype that `to_raw(like)` is restored with; `packed` says whether
    it was stored as its bits. It has a sharding if Orbax is to place it."""
    sharding = committed_sharding(like)
    if sharding is not None and _is_of_one_process(sharding):
        sharding = None
    kind = jax.ShapeDtypeStruct(like.shape, like.dtype)
    if _is_key(like):
        kind = jax.eval_shape(jax.random.key_data, kind)
    if packed:
        kind = jax.ShapeDtypeStruct(kind.shape, jnp.uint8)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=sharding)


def from_raw(x: Any, like: Any, impl: str | None, packed: bool) -> Any:
    """The array that `to_raw` has made `x` of, with the type and sharding of
    `like`."""
    if packed:
        x = from_bits(x, like.dtype)
    if isinstance(like, np.generic):
        return x[()]
    if isinstance(like, np.ndarray):
        return x
    if not isinstance(x, jax.Array):
        x = as_array(x)
    if _is_key(like):
        x = jax.random.wrap_key_data(x, impl=impl)
    sharding = committed_sharding(like)
    return x if sharding is None else jax.device_put(x, sharding)


def check_storable(arrays: Mapping[str, Any]) -> None:
    """Checks that there are arrays, and that none of them is abstract."""
    if not any(x.size for x in arrays.values()):
        raise ValueError("`state` has no arrays, so there is nothing to save.")
    for name, x in arrays.items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"There is no array to save at `{name}`, but a shape. Save the state "
                "that training has made."
            )


def check_agreement(step: int, fingerprints: Mapping[str, str]) -> None:
    """Checks that all processes save the same step and state. Each writes its part, and
    parts of different states would be no checkpoint."""
    if jax.process_count() == 1:
        return
    own = {"step": hash_content(str(step)), **fingerprints}
    words = np.array([int(hash_content(x)[:8], 16) for x in own.values()], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(words))
    wrong = [name for name, x in zip(own, everyone.T) if (x != x[0]).any()]
    if wrong:
        raise ValueError(
            f"Processes differ in {list_some(wrong)}. Put it on the mesh of all "
            "devices, or make it in the same way everywhere."
        )


# What is in the JSON


def to_json(x: Any) -> Any:
    return [x.real, x.imag] if isinstance(x, complex) else x


def from_json(x: Any, like: Any) -> Any:
    return complex(*x) if isinstance(x, list) else type(like)(x)

"""The shardings of arrays. The factors of a weight inherit from its base: `b` is
sharded as the rows are and `a` as the columns are, and the rank is replicated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.lax as lax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from .arrays import as_array, axes_from_end, is_abstract, is_traced


ShardingLike: TypeAlias = Sharding | PartitionSpec | None

Placement: TypeAlias = ShardingLike | tuple[ShardingLike, ShardingLike]
"""The sharding of new factors: one for both, or a pair for `b` and for `a`. A
`PartitionSpec` is on the mesh of the base. `None` follows the base."""

_Labels: TypeAlias = Sequence[Any]


def committed_sharding(x: Any) -> Sharding | None:
    """The sharding of the array `x`, which is not traced, if somebody chose it. `None`
    for NumPy arrays and for arrays that JAX has put on its default device."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed else None
    return getattr(x, "sharding", None)


def to_shape(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and the dtype of the array `x`, and the sharding that somebody chose
    for it."""
    sharding = None if is_traced(x) else committed_sharding(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def known_sharding(x: Any) -> Sharding | None:
    """The sharding of the array `x`, if it is known and somebody chose it, in a form
    that other arrays can inherit."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x)
    sharding = committed_sharding(x)
    if sharding is None or isinstance(sharding, NamedSharding):
        return sharding
    if sharding.num_devices == 1:
        return sharding
    # It names no mesh axes, so there is nothing to inherit but its devices.
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec())


def has_typed_mesh(*arrays: Any) -> bool:
    """Whether this runs on a mesh that types speak of: one with explicit axes, or below
    `shard_map`."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(x).sharding.mesh for x in arrays]
    kinds = {kind for mesh in meshes for kind in mesh.axis_types}
    return bool(kinds - {AxisType.Auto})


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that the type of `x` has, if it is on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if _is_explicit(sharding) else None


def _is_explicit(sharding: Sharding) -> bool:
    """Whether any axis of its mesh is explicit: part of the types of arrays."""
    is_named = isinstance(sharding, NamedSharding)
    return is_named and AxisType.Explicit in sharding.mesh.axis_types


def unshard(x: Any) -> Any:
    """`x` on all devices, if the type of it says that it is sharded: decompositions
    take no such arrays. Others they gather themselves."""
    if (sharding := explicit_sharding(x)) is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def relabel(
    sharding: NamedSharding | None, labels: _Labels, new_labels: _Labels
) -> NamedSharding | None:
    """From the sharding of an array with the axes `labels` to that of an array with the
    axes `new_labels`. Along axes without a counterpart it is replicated."""
    if sharding is None:
        return None
    axes = dict(zip(labels, sharding.spec))
    spec = PartitionSpec(*(axes.get(label) for label in new_labels))
    return NamedSharding(sharding.mesh, spec)


def inherit_sharding(
    base: Sharding | None, ndim: int, labels: _Labels
) -> Sharding | None:
    """The sharding of an array with the axes `labels` that goes with a base of `ndim`
    axes. A label is an axis of the base, counted from the end, or something else."""
    if not isinstance(base, NamedSharding):
        return base
    return relabel(base, axes_from_end(ndim), labels)


def resolve_sharding(
    name: str,
    shape: Sequence[int],
    requested: ShardingLike,
    base: Sharding | None,
    inherited: Sharding | None,
) -> Sharding | None:
    """The requested sharding, on the mesh of `base` if it names none. If nothing is
    requested, the inherited one.

    **Raises:**

    `TypeError` if it is not a sharding. `ValueError` if there is no mesh, or if the
    shape cannot be sharded like that.
    """
    if requested is None:
        return inherited
    if not isinstance(requested, Sharding | PartitionSpec):
        raise TypeError(
            f"`sharding={requested!r}` for {name} must be a `jax.sharding.Sharding`, a "
            "`jax.sharding.PartitionSpec`, a pair of these for `b` and `a`, or `None`."
        )
    try:
        if isinstance(requested, PartitionSpec):
            requested = NamedSharding(_mesh(name, requested, base), requested)
        if isinstance(requested, NamedSharding) and len(requested.spec) > len(shape):
            raise ValueError(f"it is for {len(requested.spec)} axes")
        requested.shard_shape(tuple(shape))
    # JAX has errors of several types for missing, repeated and indivisible axes.
    except Exception as error:
        raise ValueError(
            f"`sharding={requested}` for {name} does not fit a factor of shape "
            f"{tuple(shape)}: {str(error).rstrip('.')}. Pass a pair, for `b` and for "
            "`a`, or leave it out to follow the base."
        ) from error
    return requested


def _mesh(name: str, requested: PartitionSpec, base: Sharding | None) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(base, NamedSharding):
        mesh = base.mesh
    if mesh.empty:
        raise ValueError(
            f"{name} is on no mesh; pass `jax.sharding.NamedSharding(mesh, "
            f"{requested})`"
        )
    return mesh


def create(
    make: Callable[..., Array],
    arguments: tuple[Any, ...],
    base: Any,
    sharding: Sharding | None,
) -> Any:
    """`make(*arguments)`, where each device makes its own part.

    **Arguments:**

    - `make`: A function of arrays and hashable values. It has to be the same object in
        every call, so that it is compiled once.
    - `base`: If this is abstract, so is the result.
    - `sharding`: The sharding of the result.
    """
    if is_abstract(base):
        made = jax.eval_shape(lambda: make(*arguments))
        return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=sharding)
    if sharding is None:
        return make(*arguments)
    if is_traced(base):
        return move_array(make(*arguments), sharding)
    static = [i for i, x in enumerate(arguments) if not isinstance(x, jax.Array)]
    return _compile(make, tuple(static), sharding)(*arguments)


@functools.lru_cache(maxsize=1024)
def _compile(
    make: Callable[..., Array], static: tuple[int, ...], sharding: Sharding
) -> Callable[..., Array]:
    return jax.jit(make, static_argnums=static, out_shardings=sharding)


def move_array(x: Array, sharding: Sharding) -> Array:
    """`x`, which may be traced, with another sharding."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if _is_explicit(sharding):
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def place_array(x: Any, sharding: Sharding | None) -> Array:
    """The array `x`, which every process has whole, with the given sharding."""
    if sharding is None:
        return as_array(x)
    x = np.asarray(jax.device_get(x))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def product_sharding(
    x: NamedSharding | None,
    x_labels: _Labels,
    y: NamedSharding | None,
    y_labels: _Labels,
    out_labels: _Labels,
) -> NamedSharding | None:
    """The sharding of the product of two arrays, given the shardings in their types.
    Each axis is sharded as in `x`, or else as in `y`. For an axis that is sharded and
    summed over, JAX sums over devices only if it is told the sharding of the result."""
    known = [sharding for sharding in (x, y) if sharding is not None]
    if not known:
        return None
    by_label: dict[Any, Any] = {}
    for sharding, labels in ((y, y_labels), (x, x_labels)):
        if sharding is not None:
            by_label |= dict(zip(labels, sharding.spec))
    spec: list[Any] = []
    used: set[Any] = set()
    for label in out_labels:
        axes = by_label.get(label)
        names = mesh_names(axes)
        spec.append(axes if used.isdisjoint(names) else None)
        used.update(names)
    return NamedSharding(known[0].mesh, PartitionSpec(*spec))


def mesh_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a `PartitionSpec`: one name, several, or none."""
    if isinstance(entry, str):
        return (entry,)
    return entry if isinstance(entry, tuple) else ()

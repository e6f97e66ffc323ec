"""Where arrays lie. The factors of a weight follow its base: `b` lies as the rows do,
`a` as the columns do, and the rank is replicated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.lax as lax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from .arrays import as_array, axes_from_end


ShardingLike: TypeAlias = Sharding | PartitionSpec | None

Placement: TypeAlias = ShardingLike | tuple[ShardingLike, ShardingLike]
"""The sharding of new factors: one for both, or a pair for `b` and for `a`. A
`PartitionSpec` is on the mesh of the base. `None` follows the base."""

_Labels: TypeAlias = Sequence[Any]


def committed_sharding(x: Any) -> Sharding | None:
    """Where the array `x`, which is not traced, was put by anyone; `None` for NumPy
    arrays and for what JAX has put on its default device."""
    if isinstance(x, jax.Array):
        return x.sharding if x.committed else None
    return getattr(x, "sharding", None)


def known_sharding(x: Any) -> Sharding | None:
    """Where the array `x` lies, by axes that others can follow, as far as it is known
    and was chosen by anyone."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x)
    sharding = committed_sharding(x)
    if sharding is None or isinstance(sharding, NamedSharding):
        return sharding
    if sharding.num_devices == 1:
        return sharding
    # It does not say by what axes it is sharded.
    devices = sorted(sharding.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec())


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that the type of `x` has, if it is on a mesh with explicit axes."""
    sharding = jax.typeof(x).sharding
    return sharding if _is_explicit(sharding) else None


def _is_explicit(sharding: Sharding) -> bool:
    """Whether it is on a mesh of whose axes types speak."""
    is_named = isinstance(sharding, NamedSharding)
    return is_named and AxisType.Explicit in sharding.mesh.axis_types


def relabel(
    sharding: NamedSharding | None, labels: _Labels, requested: _Labels
) -> NamedSharding | None:
    """`sharding`, of an array with the axes `labels`, for one with the axes `wanted`,
    replicated along those that are new."""
    if sharding is None:
        return None
    axes = dict(zip(labels, sharding.spec))
    spec = PartitionSpec(*(axes.get(label) for label in requested))
    return NamedSharding(sharding.mesh, spec)


def inherit_sharding(
    base: Sharding | None, ndim: int, labels: _Labels
) -> Sharding | None:
    """Where an array with the axes `labels` lies if it goes with a base of `ndim` axes.
    The labels are those axes, counted from the end, and others."""
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
    """`wanted`, if that is anything, on the mesh of `base` if it names none; or else
    what follows from the base.

    **Raises:**

    `ValueError` if there is no mesh, or if the shape cannot be sharded like that.
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
    # JAX says in as many ways that axes are missing, named twice, or do not divide.
    except Exception as error:
        raise ValueError(
            f"`sharding={requested}` for {name} does not fit a factor of shape "
            f"{tuple(shape)}: {str(error).rstrip('.')}. Pass a pair, for `b` and for "
            "`a`, or leave it to follow the base."
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
    """`make(*arguments)`, of which each device makes its own part.

    **Arguments:**

    - `make`: A function of arrays and hashable values. It is the same one in every
        call, so that what was compiled is found again.
    - `base`: If this is abstract, so is the result.
    - `sharding`: Where the result is to lie.
    """
    if isinstance(base, jax.ShapeDtypeStruct):
        made = jax.eval_shape(lambda: make(*arguments))
        return jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=sharding)
    if sharding is None:
        return make(*arguments)
    if isinstance(base, jax.core.Tracer):
        return _move(make(*arguments), sharding)
    static = [i for i, x in enumerate(arguments) if not isinstance(x, jax.Array)]
    return _compile(make, tuple(static), sharding)(*arguments)


@functools.lru_cache(maxsize=1024)
def _compile(
    make: Callable[..., Array], static: tuple[int, ...], sharding: Sharding
) -> Callable[..., Array]:
    return jax.jit(make, static_argnums=static, out_shardings=sharding)


def _move(x: Array, sharding: Sharding) -> Array:
    """`x`, inside a program, where it is to lie."""
    if _is_explicit(sharding):
        return jax.sharding.reshard(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


def place_array(x: Any, sharding: Sharding | None) -> Array:
    """The array `x`, which every process has whole, where it is to lie."""
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
    """Where the product of two arrays lies, given the shardings in their types: along
    each axis as the first that has it. What is sharded and summed over is then summed
    over devices, which JAX does not do without being told so."""
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
    """The axes of the mesh in an entry of a `PartitionSpec`: a name, several, or that
    there is none or no constraint."""
    if isinstance(entry, str):
        return (entry,)
    return entry if isinstance(entry, tuple) else ()

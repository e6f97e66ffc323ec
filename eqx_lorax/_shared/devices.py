"""The part of a tree of arrays that is on one device. The arrays may be abstract."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax
from jax.sharding import NamedSharding

from .arrays import is_array, PyTree
from .sharding import mesh_names


def list_arrays(tree: PyTree) -> list[Any]:
    """The arrays among the leaves."""
    return [x for x in jax.tree.leaves(tree) if is_array(x)]


def count_bytes(tree: PyTree) -> int:
    """The bytes of all arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in list_arrays(tree))


def count_device_bytes(tree: PyTree) -> int:
    """The bytes of the parts of all arrays that are on one device."""
    return sum(math.prod(local_shape(x)) * x.dtype.itemsize for x in list_arrays(tree))


def local_shape(x: Any) -> tuple[int, ...]:
    """The shape of the part of an array that is on one device. That is all of it where
    no sharding is known."""
    sharding = getattr(x, "sharding", None)
    return tuple(x.shape if sharding is None else sharding.shard_shape(tuple(x.shape)))


def count_devices(tree: PyTree) -> int:
    """The number of devices that the arrays are on, or would be on."""
    shardings = (getattr(x, "sharding", None) for x in list_arrays(tree))
    return max((x.num_devices for x in shardings if x is not None), default=1)


def mesh_axes(x: Any) -> dict[str, int]:
    """The axes of the mesh that an array is sharded over, and their sizes."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return {}
    names = {name for entry in sharding.spec for name in mesh_names(entry)}
    return {name: sharding.mesh.shape[name] for name in names}


def plan_optimizer_state(
    optimizer: optax.GradientTransformation, params: PyTree
) -> PyTree[jax.ShapeDtypeStruct]:
    """The abstract state of an optimizer. An array of the state that has the path and
    the shape of a parameter is sharded as that parameter is."""
    by_path = {path: x for path, x in jtu.tree_leaves_with_path(params) if is_array(x)}

    def placed(path: tuple[Any, ...], x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        # A state holds trees like `params`, so their paths end with paths of `params`.
        ends = (path[i:] for i in range(len(path) + 1))
        param = next((by_path[end] for end in ends if end in by_path), None)
        if param is None or tuple(param.shape) != x.shape:
            return x
        sharding = getattr(param, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = eqx.filter_eval_shape(optimizer.init, drop_shardings(params))
    return jtu.tree_map_with_path(placed, abstract)


def drop_shardings(tree: PyTree, shape: Any = lambda x: x.shape) -> PyTree:
    """The tree with abstract arrays, which have no sharding."""

    def abstract(x: Any) -> Any:
        return jax.ShapeDtypeStruct(shape(x), x.dtype) if is_array(x) else x

    return jax.tree.map(abstract, tree)

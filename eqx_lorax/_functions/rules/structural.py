"""Primitives that only move, pick, repeat or scale the entries of a weight."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..._factored import (
    concatenate,
    gather,
    is_factored,
    map_arrays,
    materialise,
    NotFactored,
    views,
)
from ..._shared import accumulation_dtype, axes_from_end, is_array, relabel
from ..interpreter import Equation
from ..registry import rule


def _as_activation(x: Any) -> Any:
    """`x`, or the array that it stands for where that is a single row or column: what
    was looked up is no longer a weight but an activation."""
    if not is_factored(x):
        return x
    if x.rank == 0:
        # A base alone has neither rows nor columns.
        return x if sum(size > 1 for size in x.shape) > 1 else materialise(x)
    for axes in (x.rows, x.columns):
        if math.prod(x.base.shape[axis] for axis in axes) == 1:
            return materialise(x)
    return x


@rule("copy", "copy_p", "name")
def _identity(equation: Equation, *values: Any) -> Sequence[Any]:
    return values


@rule("pcast", "pvary")
def _on_leaves(equation: Equation, *values: Any) -> Sequence[Any]:
    """What is done to each array apart, whatever its shape is."""
    leaves, treedef = jax.tree.flatten(values)
    bind = functools.partial(equation.primitive.bind, **equation.params)
    return treedef.unflatten([bind(leaf) for leaf in leaves])


@rule("stop_gradient")
def _stop_gradient(equation: Equation, x: Any) -> Sequence[Any]:
    if not x.has_frozen_base:
        return [jax.tree.map(lax.stop_gradient, x)]
    # This base has no gradient to stop. Stopping it would make a new array of its size,
    # and `scan` would keep a copy for each layer.
    stopped = jax.tree.map(lax.stop_gradient, x.replace(base=None))
    return [stopped.replace(base=x.base)]


@rule("optimization_barrier")
def _optimization_barrier(equation: Equation, *values: Any) -> Sequence[Any]:
    return lax.optimization_barrier(values)


@rule("transpose")
def _transpose(equation: Equation, x: Any) -> Sequence[Any]:
    return [views.transpose(x, equation.params["permutation"])]


@rule("reshape")
def _reshape(equation: Equation, x: Any) -> Sequence[Any]:
    params = equation.params
    if params["dimensions"] is not None or params.get("sharding") is not None:
        raise NotFactored("it also moves axes")
    return [_as_activation(views.reshape(x, params["new_sizes"]))]


@rule("rev")
def _rev(equation: Equation, x: Any) -> Sequence[Any]:
    return [views.reverse(x, equation.params["dimensions"])]


@rule("squeeze")
def _squeeze(equation: Equation, x: Any) -> Sequence[Any]:
    return [_as_activation(views.squeeze(x, equation.params["dimensions"]))]


@rule("broadcast_in_dim")
def _broadcast_in_dim(equation: Equation, x: Any) -> Sequence[Any]:
    params = equation.params
    return [views.broadcast_in_dim(x, params["shape"], params["broadcast_dimensions"])]


@rule("concatenate")
def _concatenated(equation: Equation, *values: Any) -> Sequence[Any]:
    return [concatenate(values, int(equation.params["dimension"]))]


@rule("stack")
def _stack(equation: Equation, *values: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    expanded = [views.expand(x, [1], [axis]) for x in values]
    return [concatenate(expanded, axis)]


@rule("unstack")
def _unstack(equation: Equation, x: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    starts, limits = [0] * x.ndim, list(x.shape)
    parts = []
    for i in range(x.shape[axis]):
        starts[axis], limits[axis] = i, i + 1
        part = views.slice_(x, tuple(starts), tuple(limits))
        parts.append(_as_activation(views.squeeze(part, [axis])))
    return parts


@rule("convert_element_type")
def _convert(equation: Equation, x: Any) -> Sequence[Any]:
    return [views.convert(x, equation.params["new_dtype"])]


@rule("slice")
def _slice(equation: Equation, x: Any) -> Sequence[Any]:
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    return [_as_activation(views.slice_(x, starts, limits, params["strides"]))]


@rule("split")
def _split(equation: Equation, x: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    parts, start = [], 0
    for size in map(int, equation.params["sizes"]):
        starts, limits = [0] * x.ndim, list(x.shape)
        starts[axis], limits[axis] = start, start + size
        start += size
        parts.append(_as_activation(views.slice_(x, starts, limits)))
    return parts


@rule("dynamic_slice")
def _dynamic_slice(equation: Equation, x: Any, *starts: Any) -> Sequence[Any]:
    sizes = equation.params["slice_sizes"]
    return [_as_activation(views.dynamic_slice(x, starts, sizes))]


@rule("gather")
def _gather_rule(equation: Equation, x: Any, indices: Any) -> Sequence[Any]:
    params = equation.params
    return [
        _as_activation(
            gather(
                x,
                indices,
                params["dimension_numbers"],
                params["slice_sizes"],
                mode=params["mode"],
                fill_value=params["fill_value"],
                unique_indices=params["unique_indices"],
                indices_are_sorted=params["indices_are_sorted"],
            )
        )
    ]


@rule("mul")
def _mul(equation: Equation, x: Any, y: Any) -> Sequence[Any]:
    if is_factored(x) and is_factored(y):
        raise NotFactored("both operands are weights")
    weight, factor = (x, y) if is_factored(x) else (y, x)
    return [_scaled(equation, weight, factor)]


@rule("div")
def _div(equation: Equation, x: Any, y: Any) -> Sequence[Any]:
    if is_factored(y):
        raise NotFactored("it divides by a weight")
    # In float32 at least: a reciprocal that was rounded would be off by the same amount
    # everywhere.
    return [_scaled(equation, x, 1 / jnp.asarray(y, accumulation_dtype(x.dtype)))]


@rule("neg")
def _neg(equation: Equation, x: Any) -> Sequence[Any]:
    return [views.scale(x, jnp.asarray(-1, x.dtype))]


def _scaled(equation: Equation, x: Any, factor: Any) -> Any:
    (out,) = equation.out_avals
    if out.shape != x.shape:
        raise NotFactored("the weight is broadcast")
    return views.scale(x, jnp.asarray(factor))


@rule("sharding_constraint")
def _sharding_constraint(equation: Equation, x: Any) -> Sequence[Any]:
    sharding = equation.params["sharding"]
    if not isinstance(sharding, NamedSharding) or not is_array(x.base):
        raise NotFactored(f"it asks for {sharding}")
    moved = relabel(sharding, x.logical_axes(), axes_from_end(x.ndim))
    # The sharding of the factors is left to the compiler.
    return [x.replace(base=lax.with_sharding_constraint(x.base, moved))]


@rule("reshard")
def _reshard(equation: Equation, x: Any) -> Sequence[Any]:
    sharding = equation.params["dst_sharding"]

    def moved(array: Any, labels: Sequence[Any]) -> Any:
        of_array = relabel(sharding, range(x.ndim), labels)
        parameters = {**equation.params, "dst_sharding": of_array}
        return equation.primitive.bind(array, **parameters)

    return [map_arrays(x, moved, range(x.ndim))]

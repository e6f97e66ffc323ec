"""Primitives that only move, pick, repeat or scale the entries of a weight."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TYPE_CHECKING

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..._factored import concatenate, gather, NotFactored, views
from ..._methods import is_weight
from ..._shared import accumulation_dtype, relabel


if TYPE_CHECKING:
    from ..interpreter import Equation


def _settled(x: Any) -> Any:
    """`x`, but what was looked up in it (one row, one column) as an array: that is no
    longer a weight but an activation."""
    if not is_weight(x):
        return x
    lora = x.as_lora()
    for axes in (lora.rows, lora.columns):
        if math.prod(lora.w.shape[axis] for axis in axes) == 1:
            return x.materialise()
    return x


def _identity(equation: "Equation", *values: Any) -> Sequence[Any]:
    return values


def _on_leaves(equation: "Equation", *values: Any) -> Sequence[Any]:
    """What is done to each array apart, whatever its shape is."""
    leaves, treedef = jax.tree.flatten(values)
    bind = functools.partial(equation.primitive.bind, **equation.params)
    return treedef.unflatten([bind(leaf) for leaf in leaves])


def _stop_gradient(equation: "Equation", x: Any) -> Sequence[Any]:
    lora = x.as_lora()
    if not lora.has_frozen_base:
        return [jax.tree.map(lax.stop_gradient, lora)]
    # This base has no gradient to stop, and stopping it would be a new array of its
    # size, of which `scan` keeps a copy for each layer.
    stopped = jax.tree.map(lax.stop_gradient, lora.replace(w=None))
    return [stopped.replace(w=lora.w)]


def _optimization_barrier(equation: "Equation", *values: Any) -> Sequence[Any]:
    return lax.optimization_barrier(values)


def _transpose(equation: "Equation", x: Any) -> Sequence[Any]:
    return [views.transpose(x, equation.params["permutation"])]


def _reshape(equation: "Equation", x: Any) -> Sequence[Any]:
    params = equation.params
    if params["dimensions"] is not None or params.get("sharding") is not None:
        raise NotFactored("it also moves axes")
    return [_settled(views.reshape(x, params["new_sizes"]))]


def _rev(equation: "Equation", x: Any) -> Sequence[Any]:
    return [views.reverse(x, equation.params["dimensions"])]


def _squeeze(equation: "Equation", x: Any) -> Sequence[Any]:
    return [_settled(views.squeeze(x, equation.params["dimensions"]))]


def _broadcast_in_dim(equation: "Equation", x: Any) -> Sequence[Any]:
    params = equation.params
    return [views.broadcast_in_dim(x, params["shape"], params["broadcast_dimensions"])]


def _concatenated(equation: "Equation", *values: Any) -> Sequence[Any]:
    return [concatenate.concatenate(values, int(equation.params["dimension"]))]


def _stack(equation: "Equation", *values: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    expanded = [views.expand(x, [1], [axis]) for x in values]
    return [concatenate.concatenate(expanded, axis)]


def _unstack(equation: "Equation", x: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    starts, limits = [0] * x.ndim, list(x.shape)
    parts = []
    for i in range(x.shape[axis]):
        starts[axis], limits[axis] = i, i + 1
        part = views.slice_(x, tuple(starts), tuple(limits))
        parts.append(_settled(views.squeeze(part, [axis])))
    return parts


def _convert(equation: "Equation", x: Any) -> Sequence[Any]:
    return [views.convert(x, equation.params["new_dtype"])]


def _slice(equation: "Equation", x: Any) -> Sequence[Any]:
    params = equation.params
    starts, limits = params["start_indices"], params["limit_indices"]
    return [_settled(views.slice_(x, starts, limits, params["strides"]))]


def _split(equation: "Equation", x: Any) -> Sequence[Any]:
    axis = int(equation.params["axis"])
    parts, start = [], 0
    for size in map(int, equation.params["sizes"]):
        starts, limits = [0] * x.ndim, list(x.shape)
        starts[axis], limits[axis] = start, start + size
        start += size
        parts.append(_settled(views.slice_(x, starts, limits)))
    return parts


def _dynamic_slice(equation: "Equation", x: Any, *starts: Any) -> Sequence[Any]:
    sizes = equation.params["slice_sizes"]
    return [_settled(views.dynamic_slice(x, starts, sizes))]


def _gather_rule(equation: "Equation", x: Any, indices: Any) -> Sequence[Any]:
    params = equation.params
    return [
        _settled(
            gather.gather(
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


def _mul(equation: "Equation", x: Any, y: Any) -> Sequence[Any]:
    if is_weight(x) and is_weight(y):
        raise NotFactored("both operands are weights")
    weight, factor = (x, y) if is_weight(x) else (y, x)
    return [_scaled(equation, weight, factor)]


def _div(equation: "Equation", x: Any, y: Any) -> Sequence[Any]:
    if is_weight(y):
        raise NotFactored("it divides by a weight")
    # In float32 at least: a reciprocal that was rounded would be off by the same amount
    # everywhere.
    return [_scaled(equation, x, 1 / jnp.asarray(y, accumulation_dtype(x.dtype)))]


def _neg(equation: "Equation", x: Any) -> Sequence[Any]:
    return [views.scaled(x, jnp.asarray(-1, x.dtype))]


def _scaled(equation: "Equation", x: Any, factor: Any) -> Any:
    (out,) = equation.out_avals
    if out.shape != x.shape:
        raise NotFactored("the weight is broadcast")
    return views.scaled(x, jnp.asarray(factor))


def _sharding_constraint(equation: "Equation", x: Any) -> Sequence[Any]:
    sharding = equation.params["sharding"]
    lora = x.as_lora()
    if not isinstance(sharding, NamedSharding) or is_weight(lora.w):
        raise NotFactored(f"it asks for {sharding}")
    stored = range(-x.ndim, 0)
    moved = relabel(sharding, lora.shown_axes(), stored)
    # Where the factors lie then is left to the compiler.
    return [lora.replace(w=lax.with_sharding_constraint(lora.w, moved))]


def _reshard(equation: "Equation", x: Any) -> Sequence[Any]:
    def to(x: Any, sharding: NamedSharding | None) -> Any:
        if not is_weight(x):
            parameters = {**equation.params, "dst_sharding": sharding}
            return equation.primitive.bind(x, **parameters)
        lora = x.as_lora()
        shown = lora.shown_axes()
        return lora.map_arrays(
            lambda part, labels: to(part, relabel(sharding, shown, labels))
        )

    return [to(x, equation.params["dst_sharding"])]


RULES: dict[str, Callable[..., Sequence[Any]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenated,
    "convert_element_type": _convert,
    "copy": _identity,
    "copy_p": _identity,
    "div": _div,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather_rule,
    "mul": _mul,
    "name": _identity,
    "neg": _neg,
    "optimization_barrier": _optimization_barrier,
    "pcast": _on_leaves,
    "pvary": _on_leaves,
    "reshape": _reshape,
    "reshard": _reshard,
    "rev": _rev,
    "sharding_constraint": _sharding_constraint,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "unstack": _unstack,
}

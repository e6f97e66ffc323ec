"""The fresh adapter of one array."""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._methods import (
    base_of,
    factor_shapes,
    factor_shardings,
    Init,
    initial_factor,
    is_weight,
    LoraWeight,
)
from .._shared import accumulation_dtype, create, zeros
from .._trees import Place
from .form import Form
from .targets import Target


def make_adapter(
    target: Target,
    array: Place,
    form: Form,
    *,
    init: Init,
    dtype: DTypeLike | None,
    key: PRNGKeyArray,
) -> LoraWeight:
    """The array of a target with a fresh adapter: a weight in its place."""
    w, rank, rows, columns = array.node, form.rank, form.rows, form.columns
    shape = tuple(w.shape)
    b_shape, a_shape = factor_shapes(shape, rows, columns, rank)
    base = base_of(w)
    b_sharding, a_sharding = factor_shardings(
        array.dotted, base, rows, columns, rank, form.sharding
    )
    dtype = _factor_dtype(dtype, array)
    fan_in = math.prod(shape[axis] for axis in columns)
    a = create(
        initial_factor,
        (key, init, a_shape, dtype, rank, fan_in, target.layer.is_lookup),
        base,
        a_sharding,
    )
    if is_weight(w):
        _check_fresh_key(array, a)
    b = create(zeros, (b_shape, dtype), base, b_sharding)
    return LoraWeight(
        w, b, a, form.alpha, rows, columns, rank_stabilised=form.rank_stabilised
    )


def _factor_dtype(dtype: DTypeLike | None, array: Place) -> jnp.dtype:
    base = jnp.dtype(array.node.dtype)
    if dtype is None:
        return accumulation_dtype(base)
    dtype = jnp.dtype(dtype)
    is_complex = [jnp.issubdtype(x, jnp.complexfloating) for x in (dtype, base)]
    if not jnp.issubdtype(dtype, jnp.inexact) or is_complex[0] != is_complex[1]:
        kind = "a complex" if is_complex[1] else "a real floating"
        raise ValueError(
            f"`dtype={dtype}` cannot be that of the factors for {array.dotted}, which "
            f"is {base}: pass {kind} dtype, or none."
        )
    return dtype


def _check_fresh_key(array: Place, a: Any) -> None:
    there = array.node
    while is_weight(there):
        old = there.as_lora().a
        if _is_concrete(old) and _is_concrete(a) and old.shape == a.shape:
            if bool(jax.device_get((old == a).all())):
                raise ValueError(
                    f"`key` was used before: the new adapter at {array.dotted} would "
                    "start as a copy of one that is there. Pass a fresh one, from "
                    "`jax.random.split`."
                )
        there = there.w


def _is_concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)

"""The fresh adapter of one array."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._methods import AbstractLoraWeight, base_of, Fresh, Init, is_weight
from .._shared import accumulation_dtype
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
    options: Mapping[str, Any],
) -> AbstractLoraWeight:
    """The array of a target with a fresh adapter."""
    fresh = Fresh(
        array.dotted,
        array.node,
        base_of(array.node),
        form.rank,
        form.rows,
        form.columns,
        form.alpha,
        _factor_dtype(dtype, array),
        key,
        init=init,
        rank_stabilised=form.rank_stabilised,
        is_lookup=target.layer.is_lookup,
        outputs="columns" if target.layer.is_lookup else "rows",
        window=_find_window(array),
        has_bias=_has_bias(array),
        placement=form.sharding,
    )
    weight = form.method.create(fresh, **options)
    _check_fresh_key(array, weight)
    return weight


def _find_window(array: Place) -> tuple[int, ...]:
    assert array.owner is not None
    return tuple(range(-getattr(array.owner.module, "num_spatial_dims", 0), 0))


def _has_bias(array: Place) -> bool:
    assert array.owner is not None
    names = [name for name in vars(array.owner.module) if name.startswith("bias")]
    return any(getattr(array.owner.module, name) is not None for name in names)


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


def _check_fresh_key(array: Place, weight: AbstractLoraWeight) -> None:
    beneath = weight.w
    while is_weight(beneath):
        for name in weight.array_axes():
            if _is_copy(getattr(weight, name), getattr(beneath, name, None)):
                raise ValueError(
                    f"`key` was used before: the new adapter at {array.dotted} would "
                    "start as a copy of one that is there. Pass a fresh one, from "
                    "`jax.random.split`."
                )
        beneath = beneath.w


def _is_copy(new: Any, old: Any) -> bool:
    if not (_is_concrete(new) and _is_concrete(old)) or new.shape != old.shape:
        return False
    is_equal = (old == new).all() & (new != 0).any()
    return bool(jax.device_get(is_equal))


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)

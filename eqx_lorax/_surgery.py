"""The module door: putting adapters into a model, and taking them out again."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, PRNGKeyArray

from ._arrays import promote
from ._init import Init, initial_factor, key_for
from ._layer import is_layer
from ._layers import kernel_axes, layer_for
from ._lora import factor_shapes, LoraWeight
from ._select import Filter, Pattern
from ._targets import find_targets, per_target, summarised, Target
from ._tree import Place, Places, rebuild
from ._weight import AbstractLoraWeight, is_weight


_Model = TypeVar("_Model")
_Value = TypeVar("_Value")
PerTarget: TypeAlias = _Value | Mapping[Pattern, _Value]

_DEFAULT_RANK = 8


def loraify(
    model: _Model,
    filter: Filter = None,
    *,
    rank: PerTarget[int] = _DEFAULT_RANK,
    alpha: PerTarget[int | float | None] = None,
    dropout: PerTarget[int | float] = 0.0,
    init: Init = "uniform",
    dtype: DTypeLike | None = None,
    rank_stabilised: bool = False,
    stack: bool = False,
    key: PRNGKeyArray,
) -> _Model:
    """Puts low-rank adapters into a model.

    Each adapted layer keeps its module inside, with its weight `w` replaced by
    `w + scale * (b · a)`. The base arrays are not copied. A fresh adapter adds exactly
    zero, as `b` starts at zero.

    !!! example

        ```python
        model = lorax.loraify(model, ["query", "value"], rank=8, key=key)
        ```

    **Arguments:**

    - `model`: Any pytree with Equinox modules in it.
    - `filter`: What to adapt.
        - `None`: every `equinox.nn.Linear` and convolution.
        - A path pattern or a list of them. `"query"` names whatever is called that,
            anywhere; `"blocks.*.attention.query"` is matched name by name from the root
            (`**` for any number of names); a compiled regular expression must match
            the full path. Naming a container selects the layers beneath it; naming an
            array of any other module, such as `"cell.weight_hh"`, adapts that array.
        - A predicate, called on every module in the model, or a type.
        - A filter spec: a pytree prefix of the model with bools or predicates at its
            leaves.
    - `rank`: The rank of the updates, from 1 to the smaller side of the weight. For
        this, `alpha` and `dropout` a mapping from patterns to values gives each target
        the value of the first pattern that matches it or a container around it, and
        the default where none does.
    - `alpha`: The numerator of `scale = alpha / rank`. Defaults to the rank, so that
        the scale is 1.
    - `dropout`: The probability with which inputs of the low-rank branch are dropped in
        linear layers and convolutions.
    - `init`: How `a` starts: `"uniform"`, that is `U(±1 / sqrt(fan_in))`;
        `"gaussian"`, that is `N(0, 1 / rank²)`; or a function
        `(key, shape, dtype) -> array` as in `jax.nn.initializers`. For embeddings both
        names mean `N(0, 1)`.
    - `dtype`: The dtype of the factors. Defaults to that of the weight, or to float32
        if that is wider.
    - `rank_stabilised`: Whether to use `scale = alpha / sqrt(rank)`.
    - `stack`: Whether a target that already has an adapter gets another on top, with
        the one there frozen. Otherwise that is an error.
    - `key`: A `jax.random.key`. The factors of a target depend on it and on the
        target's path alone.

    **Returns:**

    The adapted model. `model` itself is not changed.

    **Raises:**

    `ValueError` or `TypeError`, before anything is done, if any part of `filter` or of
    a mapping matches nothing, and if an option is out of range for any target.

    ??? cite

        [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685)
    """
    _check_key(key)
    _check_init(init)
    places = Places(model)
    targets = find_targets(model, places, filter)
    adapted = [target for target in targets if target.is_adapted]
    if adapted and not stack:
        raise ValueError(
            f"`model` already has adapters at {summarised(adapted)}. Pass `stack=True` "
            "to put second ones on top of them, take them out with `lorax.unloraify`, "
            "or leave them out of `filter`."
        )
    ranks = per_target(rank, targets, "rank", _DEFAULT_RANK)
    alphas = per_target(alpha, targets, "alpha", None)
    dropouts = per_target(dropout, targets, "dropout", 0.0)
    _check_ranks(targets, ranks)
    _check_alphas(targets, alphas)
    _check_dropouts(targets, dropouts)

    key_paths = _key_paths(targets)
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {}
    for target, rank_, alpha_, rate in zip(targets, ranks, alphas, dropouts):
        for array in target.arrays:
            weight = _adapt(
                target,
                array,
                rank=rank_,
                alpha=float(rank_ if alpha_ is None else alpha_),
                init=init,
                dtype=dtype,
                rank_stabilised=rank_stabilised,
                key=key_for(key, key_paths[array]),
            )
            edits[array.steps] = lambda _, weight=weight: weight
        edits[target.module.steps] = wrapping(target.module, rate)
    return rebuild(model, edits)


def unloraify(model: _Model, *, merge: bool = True) -> _Model:
    """Takes the adapters out of a model: the tree structure, types and dtypes are again
    those that it had before `lorax.loraify`.

    **Arguments:**

    - `model`: A model with adapters.
    - `merge`: Whether the updates are added to the base weights, in float32 or wider
        and rounded once. With `merge=False` they are dropped, and the very base arrays
        come back.

    **Returns:**

    The model without adapters. `model` itself is not changed.

    **Raises:**

    `ValueError` if there is no adapter, or if any merged weight is not finite; inside
    `jax.jit` that is found out at run time.
    """
    places = Places(model)
    weights = [place for place in places.all if is_weight(place.node)]
    layers = [place for place in places.all if is_layer(place.node)]
    if not weights and not layers:
        raise ValueError(
            "`model` has no adapters to take out. Was it passed through "
            "`lorax.loraify`, and has it been merged before?"
        )
    if merge:
        arrays = _finite(weights, [_materialised(place.node) for place in weights])
    else:
        arrays = [base_of(place.node) for place in weights]
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.steps: lambda _, array=array: array
        for place, array in zip(weights, arrays)
    }
    edits |= {place.steps: lambda layer: layer.wrapped for place in layers}
    return rebuild(model, edits)


def base_of(weight: Any) -> Any:
    """The array beneath all adapters."""
    while is_weight(weight):
        weight = weight.w
    return weight


_materialised = eqx.filter_jit(AbstractLoraWeight.materialise)


def _adapt(
    target: Target,
    array: Place,
    *,
    rank: int,
    alpha: float,
    init: Init,
    dtype: DTypeLike | None,
    rank_stabilised: bool,
    key: PRNGKeyArray,
) -> LoraWeight:
    w = array.node
    dtype = _factor_dtype(dtype, array)
    rows, columns = axes_of(array)
    b_shape, a_shape = factor_shapes(w.shape, rows, columns, rank)
    a = initial_factor(
        init,
        key,
        a_shape,
        dtype,
        rank=rank,
        fan_in=math.prod(w.shape[axis] for axis in columns),
        is_lookup=layer_for(target.module.module).is_lookup,
    )
    if is_weight(w):
        _check_fresh_key(array, a)
    b = jnp.zeros(b_shape, dtype)
    return LoraWeight(w, b, a, alpha, rows, columns, rank_stabilised=rank_stabilised)


def axes_of(array: Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert array.owner is not None
    if array.path[-1] != "weight":
        return (-2,), (-1,)
    return kernel_axes(array.owner.module, len(array.node.shape))


def wrapping(place: Place, rate: int | float) -> Callable[[Any], Any]:
    """What puts the layer for the module at `place` around it."""
    layer: Any = layer_for(place.module)

    def wrap(node: Any) -> Any:
        module = node.wrapped if is_layer(node) else node
        if not layer.has_dropout:
            return layer(module)
        return layer(module, eqx.nn.Dropout(rate) if rate else None)

    return wrap


def _key_paths(targets: Sequence[Target]) -> dict[Place, str]:
    """The path from which each array's key is derived: its own, or that of the first
    place where the same array is found."""
    first: dict[int, Place] = {}
    paths: dict[Place, str] = {}
    twice: list[str] = []
    for array in (array for target in targets for array in target.arrays):
        origin = first.setdefault(id(base_of(array.node)), array)
        paths[array] = origin.dotted
        if origin is not array:
            twice.append(f"{array.dotted} is also {origin.dotted}")
    if twice:
        warnings.warn(
            f"One array in several places: {', '.join(twice)}. To Equinox these are "
            "separate weights: their adapters start equal and are trained apart, over "
            "one base. If they are meant to be tied, say so with `eqx.nn.Shared`.",
            stacklevel=3,
        )
    return paths


def _factor_dtype(dtype: DTypeLike | None, array: Place) -> jnp.dtype:
    base = jnp.dtype(array.node.dtype)
    if dtype is None:
        return promote(base, jnp.float32)
    dtype = jnp.dtype(dtype)
    is_complex = [jnp.issubdtype(x, jnp.complexfloating) for x in (dtype, base)]
    if not jnp.issubdtype(dtype, jnp.inexact) or is_complex[0] != is_complex[1]:
        kind = "a complex" if is_complex[1] else "a real floating"
        raise ValueError(
            f"`dtype={dtype}` cannot be that of the factors for {array.dotted}, which "
            f"is {base}: pass {kind} dtype, or none."
        )
    return dtype


def _check_key(key: Any) -> None:
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_legacy = is_array and key.dtype == jnp.uint32
    if is_typed and key.ndim == 0 or is_legacy and key.ndim == 1:
        return
    if is_typed or is_legacy:
        raise ValueError(
            f"`key` has shape {key.shape}: one key is needed, not several. Pass one of "
            "those that `jax.random.split` gave."
        )
    raise TypeError(f"`key={key!r}` is not a key. Pass `key=jax.random.key(seed)`.")


def _check_init(init: Any) -> None:
    if not callable(init) and init not in ("uniform", "gaussian"):
        raise ValueError(
            f"`init={init!r}` is unknown. Pass 'uniform', 'gaussian' or a function "
            "`(key, shape, dtype) -> array` such as `jax.nn.initializers.normal(0.02)`."
        )


def _check_ranks(targets: Sequence[Target], ranks: Sequence[Any]) -> None:
    too_large = {}
    for target, rank in zip(targets, ranks):
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"`rank={rank!r}` must be an integer.")
        if rank < 1:
            raise ValueError(f"`rank={rank}` must be at least 1.")
        for array in target.arrays:
            shape = array.node.shape
            limit = min(
                math.prod(shape[axis] for axis in axes) for axes in axes_of(array)
            )
            if rank > limit:
                too_large[array.dotted] = (rank, limit, tuple(shape))
    if too_large:
        listed = "; ".join(
            f"`rank={rank}` exceeds the smaller side, {limit}, of {path} {shape}"
            for path, (rank, limit, shape) in list(too_large.items())[:5]
        )
        more = f"; and {len(too_large) - 5} more" if len(too_large) > 5 else ""
        fix: dict[str, Any] = {path: x[1] for path, x in list(too_large.items())[:5]}
        fix["*"] = next(iter(too_large.values()))[0]
        raise ValueError(
            f"{listed}{more}. Give these a rank of their own, `rank={fix}`, or leave "
            "them out of `filter`."
        )


def _check_alphas(targets: Sequence[Target], alphas: Sequence[Any]) -> None:
    for target, alpha in zip(targets, alphas):
        if alpha is None:
            continue
        if not isinstance(alpha, int | float | np.number) or isinstance(alpha, bool):
            raise TypeError(
                f"`alpha={alpha!r}` must be a Python number: it is static, not trained."
            )
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(
                f"`alpha={alpha}` for {target.module.dotted} must be positive and "
                "finite; `alpha=None` makes the scale 1."
            )


def _check_dropouts(targets: Sequence[Target], dropouts: Sequence[Any]) -> None:
    for target, rate in zip(targets, dropouts):
        if not isinstance(rate, int | float | np.number) or not 0 <= rate < 1:
            raise ValueError(
                f"`dropout={rate!r}` must be a probability from 0 to below 1."
            )
        if rate and not layer_for(target.module.module).has_dropout:
            raise ValueError(
                f"`dropout={rate}` cannot be applied in {target.module.dotted}, a "
                f"{type(target.module.module).__name__}: only linear layers and "
                "convolutions have it. Give the others alone a rate: "
                "`dropout={'<pattern>': ...}`."
            )


def _check_fresh_key(array: Place, a: Array) -> None:
    there = array.node
    while is_weight(there):
        old = there.as_lora().a
        concrete = not any(isinstance(x, jax.core.Tracer) for x in (old, a))
        if concrete and old.shape == a.shape and bool((old == a).all()):
            raise ValueError(
                f"`key` was used before: the new adapter at {array.dotted} would start "
                "as a copy of one that is there. Pass a fresh one, from "
                "`jax.random.split`."
            )
        there = there.w


def _finite(places: Sequence[Place], arrays: list[Array]) -> list[Array]:
    """`arrays` if all of them are finite."""
    dotted = [place.dotted for place in places]
    flags: list[Bool[Array, ""]] = [jnp.isfinite(array).all() for array in arrays]
    if any(isinstance(flag, jax.core.Tracer) for flag in flags):
        return [
            eqx.error_if(array, ~flag, _not_finite([path]))
            for path, array, flag in zip(dotted, arrays, flags)
        ]
    check_finite(dotted, [bool(flag) for flag in flags])
    return arrays


def check_finite(dotted: Sequence[str], flags: Sequence[bool]) -> None:
    """Raises `ValueError` if the weights of some of the paths do not merge to something
    finite."""
    bad = [path for path, flag in zip(dotted, flags) if not flag]
    if bad:
        raise ValueError(_not_finite(bad))


def _not_finite(dotted: Sequence[str]) -> str:
    more = f", and {len(dotted) - 8} more" if len(dotted) > 8 else ""
    return (
        f"Merging gives values that are not finite in {', '.join(dotted[:8])}"
        f"{more}; nothing was merged. Look for NaN in the factors or for overflow "
        "of the base's dtype, or drop the adapters with "
        "`lorax.unloraify(model, merge=False)`."
    )

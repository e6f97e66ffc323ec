"""Adapters for trees of parameters: the interface of the original jax-lorax."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from .._factored import Factored, stands_for_array
from .._methods import (
    AbstractLoraWeight,
    assign_options,
    check_whole,
    FactoredWeight,
    find_method,
    Fresh,
    Init,
    is_weight,
    key_for,
    LoraWeight,
    resolve_init,
)
from .._modules import has_gate, PerTarget, unloraify
from .._shared import as_array, is_array, is_inexact, list_some, Placement, PyTree
from .._trees import (
    explain_no_match,
    LORA_FREEZE,
    LORA_FULL,
    LoraSpec,
    map_spec,
    matches_around,
    SpecValue,
)
from .optimizer import check_can_be_trained


def init_lora(
    param_tree: PyTree,
    spec: PyTree[SpecValue],
    rng: PRNGKeyArray,
    stddev: float = 0.01,
    dtype: DTypeLike = jnp.float32,
    alpha: float = 1.0,
    is_leaf: Callable[[Any], bool] | None = None,
    sharding: Placement = None,
    method: PerTarget[str | type[AbstractLoraWeight]] = "lora",
    init: Init | None = None,
    **options: Any,
) -> PyTree:
    """Parameters with a `lorax.LoraWeight` wherever the spec gives a rank, for a
    function that is wrapped by `lorax.lora`.

    !!! example

        ```python
        params = lorax.init_lora(params, spec, key)
        y = lorax.lora(fn)(params, x)
        ```

    **Arguments:**

    - `param_tree`: A pytree of arrays. They are not copied.
    - `spec`: A pytree of the same structure, or a prefix of one. For each array it has
        a rank, which factors its last axis against all others; a `lorax.LoraSpec`; or
        `lorax.LORA_FREEZE` or `lorax.LORA_FULL`. The last two leave the array as it is,
        and say what `lorax.wrap_optimizer` and `lorax.split_lora_params` do with it.
    - `rng`: A key. Each parameter gets its own key, which depends on its path.
    - `stddev`: The standard deviation of the factor `a`, which is normal. The factor
        `b` is zero, so that the fresh adapter adds exactly nothing.
    - `dtype`: The dtype of the factors.
    - `alpha`: The update is `alpha / rank * (b · a)`. By default it is scaled by
        `1 / rank`, as in jax-lorax. `lorax.loraify` scales by 1 by default, and so does
        `alpha=rank` here.
    - `is_leaf`: See `jax.tree.map`.
    - `sharding`: The placement of the factors, see `lorax.loraify`. A `lorax.LoraSpec`
        may say it for its parameter. By default they inherit the sharding of the
        parameter, which is never moved.
    - `method`: The name of a method, or its class, see `lorax.loraify`, or a mapping
        from patterns to these: a parameter has the method of the first pattern that
        matches its path or a part of the tree around it, and LoRA where none does.
    - `init`: How the factors start, see `lorax.loraify`. It replaces `stddev`.
    - `options`: Those of the method, see `lorax.loraify`.

    **Returns:**

    A pytree like `param_tree`. For an array of shape `(*rows, n)` and the spec `rank`,
    `b` is `(*rows, rank)` and `a` is `(rank, n)`.

    **Raises:**

    `ValueError`, naming the parameter, if a vector has a rank; if a rank is larger than
    the smaller side, or negative; if the parameter is not inexact or has an adapter; if
    a quantised one is `lorax.LORA_FULL`; if the spec does not fit the tree.
    """

    kinds = _find_methods(method, param_tree, spec, is_leaf)
    used = dict.fromkeys(kinds.values())
    options_of = assign_options(used, options, "lorax.init_lora", _ARGUMENTS)
    start = _Normal(stddev) if init is None else resolve_init(init)
    check_whole(param_tree, "lorax.init_lora({}, spec, rng)", "param_tree")

    def adapt(path: str, x: Any, spec: SpecValue) -> Any:
        if not isinstance(spec, LoraSpec):
            if spec in (LORA_FREEZE, LORA_FULL):
                check_can_be_trained(path, x, spec)
                return x
            spec = LoraSpec(int(spec))
        _check_adaptable(path, x, spec)
        try:
            rows, columns = spec.axes(x.ndim)
        except ValueError as error:
            raise ValueError(f"{path}, of shape {x.shape}: {error}") from None
        sides = [math.prod(x.shape[axis] for axis in axes) for axes in (rows, columns)]
        if not 0 < spec.rank <= min(sides):
            raise ValueError(
                f"The rank {spec.rank} for {path}, of shape {x.shape}, must be from 1 "
                f"to the smaller side, {min(sides)}."
            )
        kind = kinds[path]
        return kind.create(
            Fresh(
                path,
                x,
                x,
                spec.rank,
                rows,
                columns,
                float(alpha if spec.alpha is None else spec.alpha),
                dtype,
                key_for(rng, path),
                init=start,
                rank_stabilised=spec.rank_stabilised,
                outputs="columns",
                placement=sharding if spec.sharding is None else spec.sharding,
            ),
            **options_of[kind],
        )

    return map_spec(adapt, param_tree, spec, is_leaf)


def _find_methods(
    method: Any, tree: PyTree, spec: PyTree[SpecValue], is_leaf: Any
) -> dict[str, type[AbstractLoraWeight]]:
    """The method of each parameter that is adapted, by path."""
    paths: list[str] = []
    map_spec(lambda path, x, spec: _note(paths, path, spec), tree, spec, is_leaf)
    if not isinstance(method, Mapping):
        return dict.fromkeys(paths, find_method(method))
    found = {path: find_method(LoraWeight.method) for path in paths}
    unused = set(method)
    for path in paths:
        for pattern, kind in method.items():
            if matches_around(pattern, path.split(".")):
                found[path] = find_method(kind)
                unused.discard(pattern)
                break
    for pattern in unused:
        label = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        known = [path.split(".") for path in paths]
        raise ValueError(
            f"{explain_no_match('method', label, known)} It has to be the first match "
            f"of a parameter with a rank: {list_some(paths)}."
        )
    return found


def _note(paths: list[str], path: str, spec: SpecValue) -> None:
    if isinstance(spec, LoraSpec) or spec not in (LORA_FREEZE, LORA_FULL):
        paths.append(path)


_ARGUMENTS = [x for x in inspect.signature(init_lora).parameters if x != "options"]


@dataclasses.dataclass(frozen=True)
class _Normal:
    """An initialiser. Equal ones share what was compiled."""

    stddev: float

    def __call__(
        self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array:
        return jr.normal(key, shape, dtype) * as_array(self.stddev, dtype)


def _check_adaptable(path: str, x: Any, spec: LoraSpec) -> None:
    if is_weight(x):
        raise ValueError(
            f"{path} already has an adapter. Merge it with `lorax.merge_params`, or "
            "give `lorax.LORA_FREEZE`."
        )
    if is_array(x) and x.ndim < 2:
        raise ValueError(
            f"{path}, of shape {x.shape}, is a vector or a scalar and cannot have the "
            f"rank {spec.rank}: give `lorax.LORA_FREEZE` or `lorax.LORA_FULL`."
        )
    if not (is_inexact(x) or stands_for_array(x)):
        kind = f"an array of {x.dtype}" if is_array(x) else f"a {type(x).__name__}"
        raise ValueError(
            f"{path} is {kind} and cannot have the rank {spec.rank}: give "
            "`lorax.LORA_FREEZE`."
        )


def split_lora_params(params: PyTree, spec: PyTree[SpecValue]) -> PyTree:
    """The trained parameters alone, to be saved. All others are `None`: the bases of
    all weights, and the parameters whose spec is `lorax.LORA_FREEZE`.

    `equinox.combine(lorax.split_lora_params(params, spec), params)` is `params`.

    !!! example

        ```python
        trained = lorax.split_lora_params(params, spec)
        params = eqx.combine(trained, params)
        ```

    **Arguments:**

    - `params`: What `lorax.init_lora` returned.
    - `spec`: The spec it had, or a prefix of one.

    **Raises:**

    `ValueError` if the spec does not fit the tree, or if there is a mixture out of a
    `lorax.AdapterBank` or a scaled weight: these need more than their factors.
    """

    def keep(path: str, x: Any, spec: SpecValue) -> Any:
        if is_weight(x):
            if has_gate(x):
                raise ValueError(
                    f"{path} is a mixture of adapters, or is scaled, and only its "
                    "factors would be left. Take `params, frozen = "
                    "lorax.partition(...)` or merge it."
                )
            return eqx.filter(x, x.trainable())
        return None if spec == LORA_FREEZE else x

    return map_spec(keep, params, spec)


def merge_params(
    lora_params: PyTree, destructive: bool = True, use_scaling: bool = True
) -> PyTree:
    """Parameters for the function without `lorax.lora`: every update is added to its
    base, in float32 or wider, and rounded once.

    !!! example

        ```python
        merged = lorax.merge_params(params, destructive=False)
        y = fn(merged, x)
        ```

    **Arguments:**

    - `lora_params`: The parameters that `lorax.init_lora` returned, trained or not.
    - `destructive`: Whether each base is overwritten by the merged array. No second
        copy of the parameters is then needed, and the arrays that `lora_params` was
        made of can no longer be used.
    - `use_scaling`: Whether the scale multiplies `b · a`. Pass `False` for factors that
        contain their scale.

    **Raises:**

    `ValueError` if there is no adapter, if a merged value is not finite, or if
    `use_scaling=False` is for another method than LoRA. Nothing was changed then.
    """
    check_whole(lora_params, "lorax.merge_params({})", "lora_params")
    if not use_scaling:
        lora_params = jax.tree.map(_without_scale, lora_params, is_leaf=is_weight)
    return unloraify(lora_params, donate=destructive)


def _without_scale(x: Any) -> Any:
    if not is_weight(x):
        return x
    if not x.is_plain_lora and not isinstance(x, FactoredWeight):
        raise ValueError(
            f"`use_scaling=False` is for LoRA, and there is a {type(x).__name__}."
        )
    return FactoredWeight(_drop_scale(x.factored()))


def _drop_scale(form: Factored) -> Factored:
    """The weight with scale 1, and so for the weights that are its base."""
    base = form.base
    base = _drop_scale(base) if isinstance(base, Factored) else base
    return form.replace(base=base, scale=1.0)

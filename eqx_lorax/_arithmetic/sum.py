"""Adding adapters up."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal, overload, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from .._methods import is_missing, LoraWeight
from .._shared import accumulation_dtype, check_real, multiply, promote, PyTree, zeros
from .aligned import (
    align,
    Column,
    find_base_array,
    find_base_arrays,
    find_rank_axis,
    rescale_like,
    Weights,
)
from .compress import compress, warn_of_loss
from .prune import METHODS as PRUNING_METHODS, Pruning, sum_pruned


_Adapter = TypeVar("_Adapter")
_METHODS = ("exact", "svd", *PRUNING_METHODS)


@overload
def weighted_sum(
    adapters: Sequence[_Adapter | None],
    weights: Weights,
    method: Literal["exact", "svd", "ties", "dare", "magnitude"] = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: PRNGKeyArray | None = None,
    base: PyTree = None,
    return_error: Literal[False] = False,
) -> _Adapter: ...


@overload
def weighted_sum(
    adapters: Sequence[_Adapter | None],
    weights: Weights,
    method: Literal["exact", "svd", "ties", "dare", "magnitude"] = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: PRNGKeyArray | None = None,
    base: PyTree = None,
    return_error: Literal[True],
) -> tuple[_Adapter, dict[str, Array]]: ...


def weighted_sum(
    adapters: Sequence[Any],
    weights: Weights,
    method: Literal["exact", "svd", "ties", "dare", "magnitude"] = "exact",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: PRNGKeyArray | None = None,
    base: PyTree = None,
    return_error: bool = False,
) -> Any:
    """One adapter whose update is the weighted sum of the updates of several.

    !!! example

        ```python
        both = lorax.weighted_sum([params_of_ada, params_of_bob], [0.7, 0.3])
        model = lorax.attach(model, both)
        ```

    **Arguments:**

    - `adapters`: Adapters of one model; ranks, scales and targets may differ. What
        one does not have is zero, and `None` is the base alone.
    - `weights`: A number for each of them; `-1` takes an update away.
    - `method`: How they are added up.
        - `"exact"` puts the factors side by side, so that the ranks add up.
        - `"svd"` then keeps the largest singular values of each sum, by QR
            decompositions of its factors and without forming it: the best approximation
            of that rank there is.
        - `"magnitude"`, `"ties"` and `"dare"` prune the updates first, so that they
            interfere less. They form the updates of a layer as dense matrices, for one
            layer of a stack at a time, and approximate the result as `"svd"` does.
            `"magnitude"` keeps the largest entries of each update and adds them up.
            `"ties"` keeps these too, elects for each entry the sign of their weighted
            sum, and takes the mean of the weighted entries that have that sign.
            `"dare"` keeps entries at random, divided by `density`, and adds them up.
    - `rank`: The rank of the result, for all methods but `"exact"`. Defaults to the
        largest among the adapters.
    - `density`: The share of the entries of each update, in each layer, that is kept,
        by default 0.2. For methods that prune.
    - `key`: A `jax.random.key`, for `"dare"` alone. What is kept depends on it and on
        the path of the weight.
    - `base`: The model, adapted or not. With it, what else than factors was trained,
        such as a head, is added up too, as its difference from the array there.
    - `return_error`: Whether to return the errors too.

    **Returns:**

    The adapter, with all the targets that any of them has, for `lorax.attach`; it goes
    with the frozen part of the first one's model if that has all of them. With
    `return_error` also a dictionary from the path of each weight to what the sum has
    lost, relative to its Frobenius norm (over all layers of a stack). Without it, a
    loss of more than a percent is told by a `UserWarning`.

    **Raises:**

    `ValueError` if the adapters are not of one model, if something other than factors
    was trained, differs, and there is no `base`, or if an argument is out of range or
    for another method.

    !!! note

        PEFT's `"ties"`, `"dare_linear"` and so on prune the two factors one by one and
        add the factors up. That is `(Σ b)(Σ a)` of pruned factors, which is not the sum
        of the pruned updates that the papers define. The numbers here are those of the
        papers, except for what a `rank` loses.

    ??? cite

        Eckart and Young, *The approximation of one matrix by another of lower rank*,
        1936, for `"svd"`; [TIES-Merging](https://arxiv.org/abs/2306.01708), algorithm
        1, for `"ties"`, where its mean is over weighted entries, so that equal weights
        are its λ; [Language Models are Super
        Mario](https://arxiv.org/abs/2311.03099), equation 1, for `"dare"`.
    """
    _check_method(method, rank)
    pruning = Pruning.check(method, density, key)
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} `weights` for {len(adapters)} `adapters`.")
    aligned = align(adapters, "weighted_sum")
    own = find_base_arrays(base)
    combined: list[Any] = []
    errors: dict[str, Array] = {}
    for column in aligned.columns:
        if not column.is_factored:
            combined.append(_sum_whole(column, weights, own))
            continue
        path = column.place.dotted
        parts, factors = zip(
            *((x, factor) for x, factor in zip(column.nodes, weights) if x is not None)
        )
        _check_summable(path, parts, pruning is not None)
        ranks = [getattr(part, "rank", 0) for part in parts]
        largest = max(1, *ranks) if rank is None else rank
        if pruning is not None:
            total, errors[path] = sum_pruned(parts, factors, largest, pruning, path)
            combined.append(total)
            continue
        total, errors[path] = _side_by_side(parts, factors), zeros((), float)
        if method == "svd":
            total, errors[path] = compress(total, largest)
        total = rescale_like(parts[0], total, 1.0)
        dtype = promote(*(part.b.dtype for part in parts))
        combined.append(total.replace(b=total.b.astype(dtype)))
    adapter = aligned.filled(combined)
    if return_error:
        return adapter, errors
    exact = ", `method='exact'` everything" * (pruning is None)
    fix = f"A larger `rank` keeps more{exact}; `return_error=True` returns this."
    warn_of_loss(errors, "the summed adapters", fix)
    return adapter


def _check_method(method: str, rank: Any) -> None:
    if method not in _METHODS:
        near = difflib.get_close_matches(str(method), _METHODS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"`method={method!r}` is unknown.{hint} There are "
            f"{', '.join(map(repr, _METHODS))}."
        )
    if rank is not None and (method == "exact" or rank < 1):
        raise ValueError(
            f"`rank={rank}` is for `method='svd'` and those that prune, and at least "
            "1; with 'exact' the ranks add up."
        )


def _check_summable(path: str, parts: Sequence[Any], is_dense: bool) -> None:
    others = [part for part in parts if not isinstance(part, LoraWeight)]
    if not others:
        return
    name = type(others[0]).__name__
    if is_missing(others[0].w):
        raise ValueError(
            f"{path} is a {name}, which has its factors only together with its frozen "
            "part. Pass whole models, `lorax.combine(params, frozen)`."
        )
    if not is_dense:
        raise ValueError(
            f"{path} is a {name}, which scales its base, so that its update is no "
            "product of two factors. Convert the models to LoRA first, "
            "`lorax.as_lora(model, rank)`, or use a method that prunes."
        )


def _sum_whole(column: Column, weights: Weights, base: Any) -> Array:
    """The weighted sum of arrays that were trained as they are, such as heads. Their
    updates are the differences from the base."""
    first = column.first
    if all(array is not None and _is_same(first, array) for array in column.nodes):
        return first
    if not base and all(array is not None for array in column.nodes):
        raise ValueError(
            f"{column.place.dotted} was trained too and differs between the adapters. "
            "Only updates add up: pass the model without adapters, `base=model`, or "
            "partition without `also`."
        )
    start = find_base_array(column, base, "weighted_sum")
    total = start.astype(accumulation_dtype(first.dtype))
    for array, factor in zip(column.nodes, weights):
        if array is not None:
            check_real("weights", factor, column.place.dotted, first.dtype)
            update = array.astype(total.dtype) - start.astype(total.dtype)
            total = total + multiply(update, factor).astype(total.dtype)
    return total.astype(first.dtype)


def _side_by_side(weights: Sequence[LoraWeight], factors: Weights) -> LoraWeight:
    first = weights[0]
    b_dtype = promote(*(accumulation_dtype(weight.b.dtype) for weight in weights))
    a_dtype = promote(*(weight.a.dtype for weight in weights))
    for factor in factors:
        check_real("weights", factor, "an adapter", b_dtype)
    b = [
        multiply(multiply(weight.b, factor), weight.scale).astype(b_dtype)
        for weight, factor in zip(weights, factors)
    ]
    a = [weight.a.astype(a_dtype) for weight in weights]
    return first.replace(
        b=jnp.concatenate(b, axis=-1), a=jnp.concatenate(a, axis=find_rank_axis(first))
    )


def _is_same(x: Any, y: Any) -> bool:
    # Traced arrays have no values to compare.
    is_traced = isinstance(x, Tracer) or isinstance(y, Tracer)
    return x is y or not is_traced and bool(np.array_equal(*jax.device_get((x, y))))

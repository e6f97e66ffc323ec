"""Doing things with several adapters of one model: scaling, adding up, stacking.

An adapter here is any pytree with factored weights in it: usually the `params` of
`lorax.partition`, but a whole model will do.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, PyTree

from ._arrays import promote, wide
from ._lora import LoraWeight
from ._tree import Place, Places, rebuild
from ._weight import is_weight


_Adapter = TypeVar("_Adapter")


def scale(adapter: _Adapter, factor: ArrayLike) -> _Adapter:
    """An adapter whose update is `factor` times that of `adapter`.

    `-1` makes one that undoes it where both are added, `0` one that does nothing.
    Heads and whatever else is no factor stay as they are.

    **Arguments:**

    - `adapter`: A pytree with factored weights.
    - `factor`: A number, or a scalar array, also inside `jax.jit`.

    **Returns:**

    An adapter of the same structure: it can be used in the place of the other without
    compiling anything again. Its `b` is rounded once, to the dtype that it had.
    """
    factor = jnp.asarray(factor)
    if factor.shape != ():
        raise ValueError(f"`factor` must be one number, not of shape {factor.shape}.")

    def scaled(weight: LoraWeight) -> LoraWeight:
        dtype = promote(wide(weight.b.dtype), factor.dtype)
        b = weight.b.astype(dtype) * factor.astype(dtype)
        return weight.replace(b=b.astype(weight.b.dtype))

    return jax.tree.map(
        lambda x: scaled(x.as_lora()) if is_weight(x) else x,
        adapter,
        is_leaf=is_weight,
    )


def stack(adapters: Sequence[PyTree | None]) -> PyTree:
    """Adapters of one model as one, with an axis more in front of every array.

    Below `equinox.filter_vmap` each example takes its own by an index, while the frozen
    weights are shared.

    !!! example

        ```python
        stacked = lorax.stack([params_of_ada, params_of_bob, None])


        @eqx.filter_vmap
        def answers(index, x):
            params = jax.tree.map(lambda array: array[index], stacked)
            return eqx.combine(params, frozen)(x)


        y = answers(jnp.array([0, 2, 1, 0]), x)  # the second one by the base alone
        ```

    **Arguments:**

    - `adapters`: Adapters with the same targets, usually the `params` of
        `lorax.partition`. Ranks may differ: smaller ones are padded with zeros. Where
        scales differ they go into `b`. `None` stands for the base alone, that is for
        factors of zeros.

    **Returns:**

    An adapter all of whose arrays have a leading axis of `len(adapters)`. It goes with
    the frozen part of the first one's model.

    **Raises:**

    `ValueError` if the adapters do not have the same targets and shapes, or if there is
    a `None` and something else than factors was trained, for which the base's value is
    not known here.
    """
    given = [adapter for adapter in adapters if adapter is not None]
    aligned = _aligned(given, "stack")
    stacked: list[Any] = []
    for place, column in aligned.columns:
        if is_weight(column[0]):
            if column[0].w is not None:
                raise ValueError(
                    f"{place.dotted} has its frozen base with it, which `stack` would "
                    "not share. Pass the `params` of `lorax.partition`."
                )
            parts = iter(_common(place, column))
            every = [None if adapter is None else next(parts) for adapter in adapters]
            stacked.append(_stacked_weights(every))
        elif len(given) < len(adapters):
            raise ValueError(
                f"{place.dotted} was trained too, and what it is in the base is not "
                "known to `stack`. Instead of `None` pass an adapter that does "
                "nothing, `lorax.scale(params, 0)`, with the base's own array there."
            )
        else:
            stacked.append(jnp.stack(column))
    return aligned.filled(stacked)


@overload
def weighted_sum(
    adapters: Sequence[_Adapter],
    weights: Sequence[ArrayLike],
    method: Literal["exact", "svd"] = "exact",
    *,
    rank: int | None = None,
    return_error: Literal[False] = False,
) -> _Adapter: ...


@overload
def weighted_sum(
    adapters: Sequence[_Adapter],
    weights: Sequence[ArrayLike],
    method: Literal["exact", "svd"] = "exact",
    *,
    rank: int | None = None,
    return_error: Literal[True],
) -> tuple[_Adapter, dict[str, Array]]: ...


def weighted_sum(
    adapters: Sequence[Any],
    weights: Sequence[ArrayLike],
    method: Literal["exact", "svd"] = "exact",
    *,
    rank: int | None = None,
    return_error: bool = False,
) -> Any:
    """One adapter whose update is the weighted sum of the updates of several.

    **Arguments:**

    - `adapters`: Adapters with the same targets; ranks and scales may differ.
    - `weights`: A number for each of them; `-1` takes an update away.
    - `method`: `"exact"` puts the factors side by side, so that the ranks add up.
        `"svd"` then keeps the largest singular values of each sum, by QR
        decompositions of its factors and without forming it: the best approximation of
        that rank there is.
    - `rank`: The rank for `"svd"`. Defaults to the largest among the adapters.
    - `return_error`: Whether to return the errors too.

    **Returns:**

    The adapter, which goes with the frozen part of the first one's model; with
    `return_error` also a dictionary from the path of each weight to what the sum has
    lost, relative to its Frobenius norm (over all layers of a stack). Without it, a
    loss of more than a percent is told by a `UserWarning`.

    **Raises:**

    `ValueError` if the adapters do not have the same targets and shapes, or if anything
    else than factors was trained and differs.

    ??? cite

        Eckart and Young, *The approximation of one matrix by another of lower rank*,
        1936, for `"svd"`.
    """
    if method not in ("exact", "svd"):
        raise ValueError(f"`method={method!r}` is neither 'exact' nor 'svd'.")
    if rank is not None and (method == "exact" or rank < 1):
        raise ValueError(
            f"`rank={rank}` is for `method='svd'`, and at least 1; with 'exact' the "
            "ranks add up."
        )
    if len(weights) != len(adapters):
        raise ValueError(f"{len(weights)} `weights` for {len(adapters)} `adapters`.")
    aligned = _aligned(adapters, "weighted_sum")
    combined: list[Any] = []
    errors: dict[str, Array] = {}
    for place, column in aligned.columns:
        if not is_weight(column[0]):
            if any(not _same(column[0], other) for other in column[1:]):
                raise ValueError(
                    f"{place.dotted} was trained too and differs between the adapters. "
                    "Only updates add up: partition without `also`."
                )
            combined.append(column[0])
            continue
        parts = [weight.as_lora() for weight in column]
        total, errors[place.dotted] = _side_by_side(parts, weights), jnp.zeros(())
        if method == "svd":
            largest = max(part.rank for part in parts) if rank is None else rank
            total, errors[place.dotted] = _compressed(total, largest)
        total = _like(parts[0], total, 1.0)
        dtype = promote(*(part.b.dtype for part in parts))
        combined.append(total.replace(b=total.b.astype(dtype)))
    adapter = aligned.filled(combined)
    if return_error:
        return adapter, errors
    _warn_of(errors)
    return adapter


@dataclasses.dataclass(frozen=True)
class _Aligned:
    """Several adapters, place by place."""

    like: Any
    """The first one."""
    columns: list[tuple[Place, list[Any]]]
    """What each of them has at each place: weights and arrays."""

    def filled(self, new: Sequence[Any]) -> Any:
        """An adapter with other things at these places."""
        edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
            place.steps: lambda _, value=value: value
            for (place, _), value in zip(self.columns, new, strict=True)
        }
        return rebuild(self.like, edits)


def _aligned(adapters: Sequence[Any], name: str) -> _Aligned:
    """**Raises:**

    `ValueError` if they do not have the same targets and shapes, but for ranks.
    """
    places = [
        {place.path: place for place in Places(adapter).all if place.is_array}
        for adapter in adapters
    ]
    if not places or not any(is_weight(place.node) for place in places[0].values()):
        raise ValueError(
            f"There is no adapter in what was passed to `{name}`. Pass the `params` of "
            "`lorax.partition`."
        )
    for i, other in enumerate(places[1:], 1):
        apart = sorted(".".join(path) for path in places[0].keys() ^ other.keys())
        if apart:
            raise ValueError(
                f"The adapters 0 and {i} do not have the same targets: only one has "
                f"{', '.join(apart[:8])}."
            )
        for path, place in places[0].items():
            wrong = _mismatch(place.node, other[path].node)
            if wrong:
                raise ValueError(
                    f"{place.dotted} differs in {wrong} between the adapters 0 and {i}."
                )
    return _Aligned(
        adapters[0],
        [
            (place, [other[path].node for other in places])
            for path, place in places[0].items()
        ],
    )


def _mismatch(x: Any, y: Any) -> str | None:
    if is_weight(x) != is_weight(y):
        return "kind"
    if not is_weight(x):
        return None if x.shape == y.shape else f"shape, {x.shape} and {y.shape},"
    x, y = x.as_lora(), y.as_lora()
    if (x.rows, x.columns) != (y.rows, y.columns):
        return "rows and columns"
    without_rank = [(z.b.shape[:-1], _without_rank(z)) for z in (x, y)]
    return None if without_rank[0] == without_rank[1] else "shape"


def _without_rank(weight: LoraWeight) -> tuple[int, ...]:
    axis = rank_axis(weight)
    return (*weight.a.shape[:axis], *weight.a.shape[axis + 1 :])


def rank_axis(weight: LoraWeight) -> int:
    return weight.a.ndim - 1 - len(weight.columns)


def _common(place: Place, column: Sequence[Any]) -> list[LoraWeight]:
    """The weights with the largest rank, and with the scale that the first one has at
    that rank."""
    weights = [weight.as_lora() for weight in column]
    rank = max(weight.rank for weight in weights)
    if len({(weight.b.dtype, weight.a.dtype) for weight in weights}) > 1:
        raise ValueError(
            f"{place.dotted} has factors of several dtypes: cast them to one."
        )
    return [
        _like(weights[0], _padded(weight, rank), weight.scale) for weight in weights
    ]


def _padded(weight: LoraWeight, rank: int) -> LoraWeight:
    more = rank - weight.rank
    if not more:
        return weight
    axis = rank_axis(weight)
    b, a = weight.b, weight.a
    return weight.replace(
        b=jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, more)]),
        a=jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)]),
    )


def _like(first: LoraWeight, weight: LoraWeight, scale: ArrayLike) -> LoraWeight:
    """`scale * (b · a)` with the static fields of `first`, so that it goes with the
    same frozen model. What its scale is not goes into `b`, which is rounded once."""
    new = first.replace(b=weight.b, a=weight.a)
    factor = scale / new.scale
    if isinstance(factor, float) and factor == 1:
        return new
    b = weight.b.astype(wide(weight.b.dtype)) * factor
    return new.replace(b=b.astype(weight.b.dtype))


def _stacked_weights(weights: Sequence[LoraWeight | None]) -> LoraWeight:
    like = next(weight for weight in weights if weight is not None)

    def stacked(get: Callable[[LoraWeight], Array]) -> Array:
        nothing = jnp.zeros_like(get(like))
        return jnp.stack([nothing if w is None else get(w) for w in weights])

    return like.replace(b=stacked(lambda w: w.b), a=stacked(lambda w: w.a))


def _side_by_side(
    weights: Sequence[LoraWeight], factors: Sequence[ArrayLike]
) -> LoraWeight:
    first = weights[0]
    dtype = promote(*(wide(weight.b.dtype) for weight in weights))
    b = jnp.concatenate(
        [
            weight.b.astype(dtype) * (factor * weight.scale)
            for weight, factor in zip(weights, factors)
        ],
        axis=-1,
    )
    a = jnp.concatenate([weight.a for weight in weights], axis=rank_axis(first))
    return first.replace(b=b, a=a)


def _compressed(weight: LoraWeight, rank: int) -> tuple[LoraWeight, Array]:
    """The nearest weight of this rank, and the relative error."""
    axis = rank_axis(weight)
    total = weight.rank
    batch = weight.a.shape[:axis]
    dtype = promote(wide(weight.b.dtype), wide(weight.a.dtype))
    b = weight.b.reshape(*batch, -1, total).astype(dtype)
    a = weight.a.reshape(*batch, total, -1).astype(dtype)
    left, upper = jnp.linalg.qr(b)
    right, lower = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
    core = upper @ jnp.swapaxes(lower, -1, -2)
    u, sizes, v = jnp.linalg.svd(core, full_matrices=False)
    rank = min(rank, sizes.shape[-1])
    root = jnp.sqrt(sizes[..., :rank])
    new_b = (left @ u[..., :rank]) * root[..., None, :]
    new_a = root[..., :, None] * (v[..., :rank, :] @ jnp.swapaxes(right, -1, -2))
    lost, all_of_it = (jnp.sum(jnp.square(part)) for part in (sizes[..., rank:], sizes))
    error = jnp.sqrt(lost / jnp.where(all_of_it == 0, 1, all_of_it))
    columns = weight.a.shape[axis + 1 :]
    compressed = weight.replace(
        b=new_b.reshape(*weight.b.shape[:-1], rank).astype(weight.b.dtype),
        a=new_a.reshape(*batch, rank, *columns).astype(weight.a.dtype),
    )
    return compressed, error


def _same(x: Any, y: Any) -> bool:
    # What is traced has no value that could be compared.
    is_traced = isinstance(x, Tracer) or isinstance(y, Tracer)
    return x is y or not is_traced and bool(np.array_equal(x, y))


def _warn_of(errors: dict[str, Array]) -> None:
    if any(isinstance(error, Tracer) for error in errors.values()):
        return
    large = {path: float(error) for path, error in errors.items() if error > 0.01}
    if large:
        worst = sorted(large, key=lambda path: -large[path])[:4]
        listed = ", ".join(f"{path} {large[path]:.0%}" for path in worst)
        warnings.warn(
            f"At this rank the summed adapters lose more than 1 % of the update of "
            f"{len(large)} of {len(errors)} weights: {listed}. A larger `rank` keeps "
            "more, `method='exact'` everything; `return_error=True` returns this.",
            stacklevel=3,
        )

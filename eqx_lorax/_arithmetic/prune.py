"""Updates that are pruned before they are added up: TIES, DARE, and by magnitude."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .._factored import Factored
from .._methods import AbstractLoraWeight, check_key, key_for, LoraWeight
from .._shared import as_array, check_real, promote
from .aligned import rescale_like, Weights
from .compress import as_matrices, relative_error, split, with_matrices
from .updates import bare, dense_update, split_layers


METHODS = ("ties", "dare", "magnitude")

_DENSITY = 0.2


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How updates are pruned."""

    method: str
    density: float
    """The share of the entries that is kept."""
    key: PRNGKeyArray | None
    """For `"dare"` alone."""

    @classmethod
    def check(cls, method: str, density: Any, key: Any) -> "Pruning | None":
        """The pruning of these arguments; `None` if `method` prunes nothing.

        **Raises:**

        `ValueError` or `TypeError` if an argument is out of range, is missing, or is
        for another method.
        """
        if (key is None) != (method != "dare"):
            fix = (
                "Leave it out." if key is not None else "Pass `key=jax.random.key(0)`."
            )
            raise ValueError(f"`key` is for `method='dare'`, which draws by it. {fix}")
        if key is not None:
            check_key(key)
        if method not in METHODS:
            if density is not None:
                raise ValueError(
                    f"`density={density}` is for {', '.join(map(repr, METHODS))}; "
                    f"{method!r} keeps every entry. Leave it out."
                )
            return None
        density = _DENSITY if density is None else density
        is_number = isinstance(density, int | float) and not isinstance(density, bool)
        if not is_number or not 0 < density <= 1:
            raise ValueError(
                f"`density={density!r}` must be the share of the entries that is kept, "
                "above 0 and at most 1, such as 0.2."
            )
        return cls(method, float(density), key)


def sum_pruned(
    parts: Sequence[AbstractLoraWeight],
    factors: Weights,
    rank: int,
    pruning: Pruning,
    path: str,
) -> tuple[LoraWeight, Array]:
    """The sum of the pruned updates as a weight of this rank, and the relative error of
    that, over all layers of a stack.

    **Raises:**

    `ValueError` if the updates are complex, and signs are needed.
    """
    layers = zip(*(_list_updates(part, path) for part in parts), strict=True)
    key = None if pruning.key is None else key_for(pruning.key, path)
    found = []
    for i, updates in enumerate(layers):
        of_layer = None if key is None else jr.fold_in(key, i)
        dtype = promote(*(update.dtype for update in updates))
        if pruning.method == "ties" and jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{path} is complex, and `method='ties'` elects signs. Use 'magnitude'."
            )
        for factor in factors:
            check_real("weights", factor, "an adapter", dtype)
        numbers = jnp.stack([as_array(x, dtype) for x in factors])
        stacked = jnp.stack([update.astype(dtype) for update in updates])
        how = pruning.method, pruning.density
        found.append(_approximate(stacked, numbers, of_layer, how, rank))
    b, a, lost, sizes = (jnp.stack(arrays) for arrays in zip(*found))
    return _make_weight(parts, b, a), relative_error(lost, sizes)


def _make_weight(parts: Sequence[Any], b: Array, a: Array) -> LoraWeight:
    """A weight with the factors of each layer, that fits the model of the first one."""
    first = parts[0]
    like = first if isinstance(first, LoraWeight) else bare(first.factored())
    batch = like.a.shape[: like.a.ndim - 1 - len(like.columns)]
    b, a = (array.reshape(*batch, *array.shape[1:]) for array in (b, a))
    if isinstance(like, Factored):
        return LoraWeight.from_factored(with_matrices(like, b, a))
    # It is rounded once, when its scale is in it.
    wide = with_matrices(like.replace(b=like.b.astype(b.dtype)), b, a)
    weight = rescale_like(like, wide, 1.0)
    return weight.replace(b=weight.b.astype(promote(*(x.b.dtype for x in parts))))


def _list_updates(weight: AbstractLoraWeight, path: str) -> Iterator[Array]:
    """The dense update of each layer, one at a time."""
    if not isinstance(weight, LoraWeight):
        for _, layer in split_layers(weight.factored(), path):
            yield dense_update(layer)
        return
    # Also where there is no base.
    b, a = as_matrices(weight)
    b = b.reshape(-1, *b.shape[-2:])
    a = a.reshape(-1, *a.shape[-2:])
    for i in range(len(b)):
        yield weight.scale * jnp.matmul(b[i], a[i], precision="highest")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _approximate(
    updates: Array, factors: Array, key: Any, how: tuple[str, float], rank: int
) -> tuple[Array, Array, Array, Array]:
    method, density = how
    factors = factors[:, None, None]
    if method == "ties":
        total = _ties(jax.vmap(lambda x: _trim(x, density))(updates) * factors)
    elif method == "magnitude":
        total = jnp.sum(jax.vmap(lambda x: _trim(x, density))(updates) * factors, 0)
    else:
        is_kept = jr.bernoulli(key, density, updates.shape)
        total = jnp.sum(jnp.where(is_kept, updates / density, 0) * factors, 0)
    with jax.default_matmul_precision("highest"):
        u, sizes, v = jnp.linalg.svd(total, full_matrices=False)
    return *split(u, sizes, v, rank), sizes[rank:], sizes


def _trim(update: Array, density: float) -> Array:
    """`update` with zeros for all but the largest of its entries. Equal ones are all
    kept."""
    count = max(1, round(density * update.size))
    sizes = jnp.abs(update)
    least = jnp.sort(sizes.ravel())[update.size - count]
    return jnp.where(sizes >= least, update, 0)


def _ties(updates: Array) -> Array:
    """For each entry the mean of those updates that have the sign of the sum."""
    sign = jnp.sign(jnp.sum(updates, 0, keepdims=True))
    agrees = (jnp.sign(updates) == sign) & (sign != 0)
    count = jnp.maximum(jnp.sum(agrees, 0), 1).astype(updates.dtype)
    return jnp.sum(jnp.where(agrees, updates, 0), 0) / count

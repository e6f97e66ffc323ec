"""The nearest product of two factors of a smaller rank, and what that loses."""

import functools
import warnings
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from .._factored import Factored
from .._methods import LoraWeight
from .._shared import accumulation_dtype, promote, unshard


_Factors = TypeVar("_Factors", LoraWeight, Factored)


def compress(factors: _Factors, rank: int) -> tuple[_Factors, Array]:
    """The nearest weight of this rank, or of the smaller side where that is less, with
    a scale of its own, and the error relative to the Frobenius norm of the update, over
    all layers of a stack."""
    b, a = as_matrices(factors)
    with jax.default_matmul_precision("highest"):
        new_b, new_a, error = _approximate(b, a, rank)
    return with_matrices(factors, new_b, new_a), error


def as_matrices(factors: LoraWeight | Factored) -> tuple[Array, Array]:
    """The factors as `(*batch, rows, rank)` and `(*batch, rank, columns)`, without the
    scale, in the accumulation dtype."""
    a, b, rank = unshard(factors.a), unshard(factors.b), factors.rank
    batch = a.shape[: a.ndim - 1 - len(factors.columns)]
    dtype = promote(accumulation_dtype(b.dtype), accumulation_dtype(a.dtype))
    b = b.reshape(*batch, -1, rank) if b.size else b.reshape(*batch, 0, rank)
    a = a.reshape(*batch, rank, -1) if a.size else a.reshape(*batch, rank, 0)
    return b.astype(dtype), a.astype(dtype)


def with_matrices(factors: _Factors, b: Array, a: Array) -> _Factors:
    """`factors` with these in the place of those of `as_matrices`, in their dtypes."""
    old_b, old_a = factors.b, factors.a
    batch, rank = b.shape[:-2], b.shape[-1]
    columns = old_a.shape[old_a.ndim - len(factors.columns) :]
    return factors.replace(
        b=b.reshape(*old_b.shape[:-1], rank).astype(old_b.dtype),
        a=a.reshape(*batch, rank, *columns).astype(old_a.dtype),
    )


def decompose(b: Array, a: Array) -> tuple[Array, Array, Array]:
    """A small matrix with the singular values of `b · a`, and the orthonormal columns
    on its left and on its right: `b · a = left · core · right.T`."""
    left, upper = jnp.linalg.qr(b)
    right, lower = jnp.linalg.qr(jnp.swapaxes(a, -1, -2))
    return left, upper @ jnp.swapaxes(lower, -1, -2), right


@functools.partial(jax.jit, static_argnums=2)
def _approximate(b: Array, a: Array, rank: int) -> tuple[Array, Array, Array]:
    left, core, right = decompose(b, a)
    u, sizes, v = jnp.linalg.svd(core, full_matrices=False)
    new_b, new_a = split(u, sizes, v, rank)
    error = relative_error(sizes[..., rank:], sizes)
    return left @ new_b, new_a @ jnp.swapaxes(right, -1, -2), error


def split(u: Array, sizes: Array, v: Array, rank: int) -> tuple[Array, Array]:
    """The two factors of the largest `rank` of the singular values, whose square roots
    are in both."""
    root = jnp.sqrt(sizes[..., :rank]).astype(u.dtype)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def relative_error(lost: Array, sizes: Array) -> Array:
    """The norm of the lost singular values over that of all."""
    lost, all_of_it = (jnp.sum(jnp.square(part)) for part in (lost, sizes))
    return jnp.sqrt(lost / jnp.where(all_of_it == 0, 1, all_of_it))


def warn_of_loss(errors: dict[str, Array], what: str, fix: str) -> None:
    """Warns the caller's caller of weights that lost more than one percent of their
    update.

    **Arguments:**

    - `errors`: The relative error of each weight by its path.
    - `what`: Who loses: `"the summed adapters"`.
    - `fix`: A sentence at the end.
    """
    if any(isinstance(error, Tracer) for error in errors.values()):
        return
    known = {path: float(jax.device_get(error)) for path, error in errors.items()}
    large = {path: error for path, error in known.items() if error > 0.01}
    if large:
        worst = sorted(large, key=lambda path: -large[path])[:4]
        listed = ", ".join(f"{path} {large[path]:.0%}" for path in worst)
        warnings.warn(
            f"At this rank {what} lose more than 1 % of the update of {len(large)} of "
            f"{len(errors)} weights: {listed}. {fix}",
            stacklevel=3,
        )

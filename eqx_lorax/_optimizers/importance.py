"""How important the triplets of AdaLoRA are."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .._shared import accumulation_dtype, unshard
from .trees import column_matrices, has_arrays, row_matrices


def smooth(
    weights: list[Any],
    gradients: list[Any],
    smoothed: tuple[list[Any], list[Any]],
    is_counted: Array,
    betas: tuple[float, float],
) -> tuple[list[Any], list[Any]]:
    """Equations 8 to 10: sensitivity, and how uncertain it is, both smoothed."""

    def follow(x: Array, g: Array, old: Array, unsure: Array) -> tuple[Array, Array]:
        dtype = accumulation_dtype(x.dtype)
        found = jnp.abs(x.astype(dtype) * g.astype(dtype))
        mean = betas[0] * old + (1 - betas[0]) * found
        spread = betas[1] * unsure + (1 - betas[1]) * jnp.abs(found - mean)
        pairs = (mean, old), (spread, unsure)
        new, new_unsure = (jnp.where(is_counted, x, y) for x, y in pairs)
        return new, new_unsure

    importance, uncertainty = [], []
    for weight, gradient, *old in zip(weights, gradients, *smoothed, strict=True):
        new = {
            name: follow(*(getattr(x, name) for x in (weight, gradient, *old)))
            for name in list_parts(weight)
        }
        for found, state, i in ((importance, old[0], 0), (uncertainty, old[1], 1)):
            changes = {name: pair[i] for name, pair in new.items()}
            found.append(state.with_base(None, **changes))
    return importance, uncertainty


def score(importance: Any, uncertainty: Any) -> Array:
    """Equation 7: the importance of each triplet of a weight, of the shape of its
    gate."""
    entries = {
        name: getattr(importance, name) * getattr(uncertainty, name)
        for name in list_parts(importance)
    }
    total = unshard(entries["gate"])
    if "b" in entries:
        total = total + row_matrices(importance, entries["b"]).mean(-2)
    if "a" in entries:
        total = total + column_matrices(importance, entries["a"]).mean(-1)
    return total


def list_parts(weight: Any) -> list[str]:
    """The trained arrays of a triplet."""
    return [name for name in ("b", "a", "gate") if has_arrays(weight, name)]


def keep_best(scores: list[Array], budget: Array) -> list[Array]:
    """Which triplets are the `budget` most important ones. Of equals, later ones."""
    flat = jnp.concatenate([x.ravel() for x in scores])
    places = jnp.argsort(jnp.argsort(flat))
    is_kept = places >= flat.size - budget
    kept, done = [], 0
    for x in scores:
        kept.append(is_kept[done : done + x.size].reshape(x.shape))
        done += x.size
    return kept

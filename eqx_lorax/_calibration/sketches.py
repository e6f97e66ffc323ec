"""Random matrices, and what is found out about a large matrix from its products with
them."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._methods import key_for


def draw_orthonormal(
    key: PRNGKeyArray, name: str, shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """Random matrices of shape `(*batch, size, count)` with orthonormal columns. They
    are drawn by NumPy, so that nothing is compiled for their shapes."""
    words = jax.device_get(jr.bits(key_for(key, name), (4,)))
    random = np.random.default_rng(words.tolist())
    q, _ = np.linalg.qr(random.normal(size=shape))
    return q.astype(dtype)


def count_columns(rank: int, rows: int, columns: int) -> tuple[int, int]:
    """How many products from the right and from the left find the `rank` leading
    directions of a matrix: more than there are directions, and twice as many from the
    left."""
    right = min(2 * rank + 8, columns, rows)
    return right, min(2 * right + 1, rows)


def decompose_sketched(
    right: Array, left: Array, of_left: Array
) -> tuple[Array, Array, Array]:
    """The singular value decomposition of a matrix `G`, seen in two products.

    **Arguments:**

    - `right`: `G Ω`, of shape `(*batch, m, k)`.
    - `left`: `Ψᵀ G`, of shape `(*batch, l, n)`.
    - `of_left`: `Ψ`, of shape `(*batch, m, l)`, with orthonormal columns.

    **Returns:**

    `u (*batch, m, k)`, `s (*batch, k)` and `v (*batch, k, n)`, whose product is `G` if
    that has rank `k` or less.

    ??? cite

        [Practical sketching algorithms for low-rank matrix
        approximation](https://arxiv.org/abs/1609.00048), algorithm 4.
    """
    with jax.default_matmul_precision("highest"):
        q, _ = jnp.linalg.qr(right)
        seen = jnp.swapaxes(of_left, -1, -2) @ q
        # The least-squares solution of `seen x = left`.
        basis, triangle = jnp.linalg.qr(seen)
        x = jnp.linalg.solve(triangle, jnp.swapaxes(basis, -1, -2) @ left)
        u, s, v = jnp.linalg.svd(x, full_matrices=False)
        return q @ u, s, v


def decompose_semidefinite(product: Array, sketch: Array) -> tuple[Array, Array]:
    """The leading eigenvalues and eigenvectors of a positive semidefinite matrix, by
    Nyström's approximation.

    **Arguments:**

    - `product`: `C Ω`, of shape `(*batch, n, k)`.
    - `sketch`: `Ω`, with orthonormal columns.

    **Returns:**

    The eigenvalues `(*batch, k)`, the largest first, and the eigenvectors
    `(*batch, n, k)`.

    ??? cite

        [Fixed-rank approximation of a positive-semidefinite matrix from streaming
        data](https://arxiv.org/abs/1706.05736), algorithm 3.
    """
    with jax.default_matmul_precision("highest"):
        # A shift keeps the small matrix definite. It is taken off at the end.
        size = jnp.linalg.norm(product, axis=(-2, -1), keepdims=True)
        shift = jnp.finfo(product.dtype).eps * jnp.maximum(size, 1e-30)
        shifted = product + shift * sketch
        small = jnp.swapaxes(sketch, -1, -2) @ shifted
        small = (small + jnp.swapaxes(small, -1, -2)) / 2
        values, vectors = jnp.linalg.eigh(small)
        floor = shift[..., 0]
        root = vectors / jnp.sqrt(jnp.maximum(values, floor))[..., None, :]
        u, s, _ = jnp.linalg.svd(shifted @ root, full_matrices=False)
        return jnp.maximum(s**2 - floor, 0), u

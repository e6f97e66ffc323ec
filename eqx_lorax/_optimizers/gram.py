"""Small matrices of inner products, and their inverses."""

import jax.numpy as jnp
from jaxtyping import Array


class Gram:
    """The eigenvalues and eigenvectors of Hermitian matrices of inner products, of
    shape `(*batch, rank, rank)`, and their pseudo-inverse."""

    def __init__(self, products: Array):
        self.values, self.vectors = jnp.linalg.eigh(products)
        inverse = invert(self.values)[..., None, :].astype(products.dtype)
        self.inverse = (self.vectors * inverse) @ adjoint(self.vectors)


def invert(values: Array) -> Array:
    """One over each value, and zero where a value is of rounding alone, beside the
    largest along the last axis."""
    largest = jnp.max(values, axis=-1, keepdims=True)
    smallest = values.shape[-1] * jnp.finfo(values.dtype).eps * largest
    is_large = values > smallest
    return jnp.where(is_large, 1 / jnp.where(is_large, values, 1), 0)


def adjoint(x: Array) -> Array:
    """The conjugate transpose of matrices."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def identity_like(products: Array) -> Array:
    """The identity, of the shape and dtype of square matrices."""
    size = products.shape[-1]
    return jnp.broadcast_to(jnp.eye(size, dtype=products.dtype), products.shape)

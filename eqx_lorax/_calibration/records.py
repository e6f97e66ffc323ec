"""What is known of one weight after calibration."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .probe import Side
from .sketches import decompose_semidefinite, decompose_sketched


class InputRecord(eqx.Module):
    """Sums over all inputs `x` of a weight. Its batch axes come first in all arrays,
    and its input axes are one."""

    count: Float[Array, "*batch"]
    """How many inputs there were."""

    energy: Float[Array, "*batch"]
    """`Σ |x|²`."""

    total: Float[Array, "*batch n"]
    """`Σ x`."""

    product: Float[Array, "*batch n k"]
    """`Σ x xᵀ`, of shape `(*batch, n, n)`, or `Σ x xᵀ Ω` where it was sketched."""

    sketch: Float[Array, "*batch n k"] | None
    """The random matrix `Ω`."""

    side: Side = eqx.field(static=True)
    """The side of the weight that the inputs are summed over."""

    def spectrum(self, centred: bool = False) -> tuple[Array, Array, Array]:
        """The eigenvalues of the covariance, the largest first, its eigenvectors as
        rows, of shape `(*batch, k, n)`, and the sum of all eigenvalues."""
        return _find_spectrum(self, centred)

    def covariance(self) -> Array:
        """`Σ x xᵀ / count`, uncentred, of shape `(*batch, n, n)`; where it was
        sketched, its approximation."""
        return _find_covariance(self)


class GradientRecord(eqx.Module):
    """Products of the gradient `G` in a weight, as a matrix of rows and columns, with
    random matrices. The batch axes of the weight come first."""

    right: Float[Array, "*batch m k"]
    """`G Ω`, the mean over the batches of data."""

    left: Float[Array, "*batch l n"]
    """`Ψᵀ G`."""

    of_left: Float[Array, "*batch m l"]
    """The random matrix `Ψ`."""

    side: Side = eqx.field(static=True)
    """The side of the weight that its inputs are summed over."""

    def decompose(self) -> tuple[Array, Array, Array]:
        """The leading singular values `s (*batch, k)` of `G` and its singular vectors:
        `u (*batch, outputs, k)` and `v (*batch, k, inputs)`."""
        return _find_gradient(self)


# Each is one program, compiled once for all weights of a shape.
@functools.partial(jax.jit, static_argnums=1)
def _find_spectrum(record: InputRecord, centred: bool) -> tuple[Array, Array, Array]:
    product, sketch = record.product, record.sketch
    energy = record.energy / record.count
    with jax.default_matmul_precision("highest"):
        if centred:
            mean = record.total / record.count[..., None]
            side = mean
            if sketch is not None:
                side = jnp.einsum("...n,...nk->...k", mean, sketch)
            product = product - record.total[..., :, None] * side[..., None, :]
            energy = energy - jnp.sum(mean**2, -1)
        product = product / record.count[..., None, None]
        if sketch is not None:
            values, vectors = decompose_semidefinite(product, sketch)
        else:
            values, vectors = jnp.linalg.eigh(product)
            values, vectors = jnp.maximum(values, 0)[..., ::-1], vectors[..., ::-1]
    vectors = jnp.swapaxes(vectors, -1, -2)
    # In PEFT, too, the largest entry of each is positive.
    largest = jnp.argmax(jnp.abs(vectors), -1, keepdims=True)
    signs = jnp.sign(jnp.take_along_axis(vectors, largest, -1))
    return values, vectors * signs, energy


@jax.jit
def _find_covariance(record: InputRecord) -> Array:
    if record.sketch is None:
        return record.product / record.count[..., None, None]
    values, vectors, _ = record.spectrum()
    with jax.default_matmul_precision("highest"):
        return jnp.swapaxes(vectors, -1, -2) @ (values[..., :, None] * vectors)


@jax.jit
def _find_gradient(record: GradientRecord) -> tuple[Array, Array, Array]:
    u, s, v = decompose_sketched(record.right, record.left, record.of_left)
    if record.side == "rows":
        u, v = jnp.swapaxes(v, -1, -2), jnp.swapaxes(u, -1, -2)
    return u, s, v

"""Starts from the base: its singular value decomposition or its QR decomposition."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from .start import AbstractStart


@dataclasses.dataclass(frozen=True)
class Pissa(AbstractStart):
    """The largest singular values and vectors of the base: `b = U sqrt(S / scale)`,
    `a = sqrt(S / scale) Vᴴ`.

    !!! example

        ```python
        model = lorax.loraify(model, init="pissa", key=key)
        model = lorax.loraify(plain_model, init=lorax.Pissa(iterations=4), key=key)
        ```

    **Arguments:**

    - `iterations`: By default the decomposition is exact. Otherwise it is the
        randomised one with so many power iterations, which is much faster for large
        weights; PEFT's `"pissa_niter_4"` has 4. Then the factors are near to the
        leading ones, and a fresh adapter adds nothing all the same.

    ??? cite

        [PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
        Language Models](https://arxiv.org/abs/2404.02948), equations 2 to 4; [Finding
        Structure with Randomness](https://arxiv.org/abs/0909.4061), algorithm 4.4.
    """

    iterations: int | None = None
    changes_base = True

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        w = fresh.matrices()
        if self.iterations is None:
            u, s, v = jnp.linalg.svd(w, full_matrices=False)
        else:
            u, s, v = approximate_svd(w, fresh.rank, self.iterations, fresh.key)
        return share_out(fresh, u, s, v, slice(0, fresh.rank))


@dataclasses.dataclass(frozen=True)
class Milora(AbstractStart):
    """The smallest singular values and vectors of the base.

    !!! example

        ```python
        model = lorax.loraify(plain_model, init="milora", key=key)
        ```

    ??? cite

        [MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
        Finetuning](https://arxiv.org/abs/2406.09044), equation 4.
    """

    changes_base = True

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(fresh.matrices(), full_matrices=False)
        return share_out(fresh, u, s, v, slice(s.shape[-1] - fresh.rank, None))


@dataclasses.dataclass(frozen=True)
class Olora(AbstractStart):
    """The first columns of `Q` and the first rows of `R`, where the base is `Q R`.

    !!! example

        ```python
        model = lorax.loraify(plain_model, init="olora", key=key)
        ```

    ??? cite

        [OLoRA: Orthonormal Low-Rank Adaptation of Large Language
        Models](https://arxiv.org/abs/2406.01775), algorithm 1.
    """

    changes_base = True

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        q, r = jnp.linalg.qr(fresh.matrices())
        return fresh.to_factors(q[..., : fresh.rank], r[..., : fresh.rank, :])


@dataclasses.dataclass(frozen=True)
class Orthogonal(AbstractStart):
    """Two factors with orthogonal components, whose product is zero. The rank has to be
    even.

    !!! example

        ```python
        model = lorax.loraify(plain_model, init="orthogonal", key=key)
        ```

    ??? cite

        PEFT's `init_lora_weights="orthogonal"`, after [Orthogonality in low-rank
        adaptation](https://datta0.github.io/posts/rethink-lora-init/).
    """

    changes_base = False

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        rank = fresh.rank
        if rank % 2:
            raise ValueError(
                f"`init='orthogonal'` needs an even rank, and {fresh.name} has {rank}."
            )
        *batch, outputs, inputs = fresh.matrix_shape
        keys = jr.split(fresh.key, 3)
        dtype = fresh.wide_dtype
        basis, _ = jnp.linalg.qr(jr.normal(keys[0], (*batch, rank, rank), dtype))
        of_a = jr.normal(keys[1], (*batch, inputs, rank // 2), dtype)
        of_b = jr.normal(keys[2], (*batch, outputs, rank // 2), dtype)
        a = jnp.swapaxes(of_a @ basis[..., 0::2, :], -1, -2)
        b = of_b @ basis[..., 1::2, :]
        return fresh.to_factors(b / 10, a / 10)


def approximate_svd(
    w: Array, rank: int, iterations: int, key: PRNGKeyArray
) -> tuple[Array, Array, Array]:
    """The leading singular values and vectors of `w`, by a randomised range finder with
    power iterations and some more columns than `rank`."""
    *batch, rows, columns = w.shape
    width = min(rank + 8, rows, columns)
    q = jr.normal(key, (*batch, columns, width), w.dtype)
    adjoint = jnp.conj(jnp.swapaxes(w, -1, -2))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(w @ q)
        q, _ = jnp.linalg.qr(adjoint @ q)
    q, _ = jnp.linalg.qr(w @ q)
    u, s, v = jnp.linalg.svd(jnp.conj(jnp.swapaxes(q, -1, -2)) @ w, full_matrices=False)
    return q @ u, s, v


def share_out(
    fresh: Any, u: Array, s: Array, v: Array, chosen: slice
) -> tuple[Array, Array]:
    """The factors whose product, times the scale, has the chosen singular values. Each
    has their square roots."""
    root = jnp.sqrt(s[..., chosen]).astype(u.dtype) / math.sqrt(fresh.scale)
    left = u[..., :, chosen] * root[..., None, :]
    return fresh.to_factors(left, root[..., :, None] * v[..., chosen, :])

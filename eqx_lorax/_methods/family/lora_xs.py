"""LoRA-XS: a small trained matrix between the leading singular vectors of the base."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight
from ..starts import approximate_svd
from ..weight import Weight


class LoraXsWeight(AbstractScaledWeight):
    """`w + scale * (b · core · a)`, where only the `core` is trained.

    `b` is the leading left singular vectors of the base times their singular values,
    and `a` the right ones. The `core` starts at zero, so `rank²` numbers are trained,
    whatever the size of the base.

    - `b`: `(*batch, *rows, rank)`,
    - `core`: `(*batch, rank, rank)`,
    - `a`: `(*batch, rank, *columns)`.

    **Options:**

    - `iterations`: The power iterations of a randomised decomposition, for large
        weights. By default it is exact.

    !!! example

        ```python
        model = lorax.loraify(model, method="lora_xs", rank=8, key=key)
        ```

    ??? cite

        [LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
        Parameters](https://arxiv.org/abs/2405.17604), equation 2. There the core starts
        at random numbers of size `1e-5`.
    """

    w: Weight
    b: AnyArray
    core: AnyArray
    a: AnyArray
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "lora_xs"
    frozen = ("w", "b", "a")
    axes = {
        "b": ("rows", "rank"),
        "core": ("rank", "other rank"),
        "a": ("other rank", "columns"),
    }

    @classmethod
    def create(cls, fresh: Fresh, *, iterations: int | None = None) -> "LoraXsWeight":
        def decompose(w: Array) -> tuple[Array, Array]:
            if iterations is None:
                u, s, v = jnp.linalg.svd(w, full_matrices=False)
            else:
                u, s, v = approximate_svd(w, fresh.rank, iterations, fresh.key)
            left = u[..., : fresh.rank] * s[..., None, : fresh.rank].astype(u.dtype)
            return fresh.to_factors(left, v[..., : fresh.rank, :])

        b, a = fresh.derive_factors(decompose)
        axes = fresh.axes("rank", ("other rank", fresh.rank))
        core = fresh.zeros(axes)
        return LoraXsWeight(fresh.w, b=b, core=core, a=a, **fresh.settings)

    def factored(self) -> Factored:
        self.check_whole()
        b = self.flatten(self.b, "rows", "rank") @ self.core
        return self.to_form(self.unflatten_rows(b), self.a, self.scale)

    def scaled(self, factor: ArrayLike) -> "LoraXsWeight":
        return self.with_scaled("core", factor)

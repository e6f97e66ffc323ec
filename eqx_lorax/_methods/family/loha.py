"""LoHa: the entrywise product of two low-rank updates."""

import equinox as eqx
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight
from ..weight import Weight


class LohaWeight(AbstractScaledWeight):
    """`w + scale * (b1 · a1) ∘ (b2 · a2)`: low-rank Hadamard product adaptation.

    The product has a rank of up to `rank²` with the trained numbers of `2 * rank`. It
    is computed as a product of two factors of that rank, whose components are the
    products of one component of each pair.

    - `b1`, `b2`: `(*batch, *rows, rank)`; `a1`, `a2`: `(*batch, rank, *columns)`. `a2`
      starts at zero, the others are uniform on `±1 / sqrt(fan_in)`.

    !!! example

        ```python
        model = lorax.loraify(model, method="loha", rank=4, key=key)
        ```

    ??? cite

        [FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
        Learning](https://arxiv.org/abs/2108.06098), proposition 1; [Navigating
        Text-to-Image Customization](https://arxiv.org/abs/2309.14859) for LoHa.
    """

    w: Weight
    b1: AnyArray
    a1: AnyArray
    b2: AnyArray
    a2: AnyArray
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "loha"
    frozen = ("w",)
    axes = {
        "b1": ("rows", "rank"),
        "a1": ("rank", "columns"),
        "b2": ("rows", "rank"),
        "a2": ("rank", "columns"),
    }

    @classmethod
    def create(cls, fresh: Fresh) -> "LohaWeight":
        b_axes, a_axes = fresh.b_axes, fresh.a_axes
        b_placement, a_placement = fresh.factor_placements
        return LohaWeight(
            fresh.w,
            b1=fresh.uniform(b_axes, fresh.rank, "b1", b_placement),
            a1=fresh.draw(a_axes, a_placement, name="a1"),
            b2=fresh.uniform(b_axes, fresh.rank, "b2", b_placement),
            a2=fresh.zeros(a_axes, a_placement),
            **fresh.settings,
        )

    def factored(self) -> Factored:
        self.check_whole()
        b1, b2 = (self.flatten(b, "rows", "rank") for b in (self.b1, self.b2))
        a1, a2 = (self.flatten(a, "rank", "columns") for a in (self.a1, self.a2))
        b = b1[..., :, None] * b2[..., None, :]
        a = a1[..., :, None, :] * a2[..., None, :, :]
        return self.to_form(
            self.unflatten_rows(b.reshape(*b.shape[:-2], -1)),
            self.unflatten_columns(a.reshape(*a.shape[:-3], -1, a.shape[-1])),
            self.scale,
        )

    def scaled(self, factor: ArrayLike) -> "LohaWeight":
        return self.with_scaled("a2", factor)

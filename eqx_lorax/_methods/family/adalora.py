"""AdaLoRA: an update with singular values of its own, which a budget can prune."""

import equinox as eqx
import jax.nn.initializers as initialisers
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight
from ..weight import Weight


class AdaLoraWeight(AbstractScaledWeight):
    """`w + scale * (b · diag(gate) · a)`: adaptive budget allocation.

    `b`, `gate` and `a` are `P`, `Λ` and `Q` of the paper. The gate starts at zero.
    `lorax.adalora` prunes it during training, down to a budget for all weights
    together, and `lorax.orthogonality` is the penalty that keeps `b` and `a` near to
    orthogonal.

    - `b`: `(*batch, *rows, rank)`,
    - `a`: `(*batch, rank, *columns)`,
    - `gate`: `(*batch, rank)`.

    !!! example

        ```python
        model = lorax.loraify(model, method="adalora", rank=8, key=key)
        ```

    ??? cite

        [AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
        Fine-Tuning](https://arxiv.org/abs/2303.10512), equation 3.
    """

    w: Weight
    b: AnyArray
    a: AnyArray
    gate: AnyArray
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "adalora"
    frozen = ("w",)
    axes = {"b": ("rows", "rank"), "a": ("rank", "columns"), "gate": ("rank",)}

    @classmethod
    def create(cls, fresh: Fresh) -> "AdaLoraWeight":
        b_placement, a_placement = fresh.factor_placements
        # As in PEFT.
        normal = initialisers.normal(0.02)
        return AdaLoraWeight(
            fresh.w,
            b=fresh.draw(fresh.b_axes, b_placement, init=normal, name="b"),
            a=fresh.draw(fresh.a_axes, a_placement, init=normal, name="a"),
            gate=fresh.zeros(fresh.axes("rank")),
            **fresh.settings,
        )

    def factored(self) -> Factored:
        self.check_whole()
        return self.to_form(self.b, self.a, self.scale, gate=self.gate)

    def scaled(self, factor: ArrayLike) -> "AdaLoraWeight":
        return self.with_scaled("gate", factor)

"""LoRA-FA: LoRA with a frozen random factor."""

import equinox as eqx
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight
from ..weight import Weight


class LoraFaWeight(AbstractScaledWeight):
    """`w + scale * (b · a)`, where only `b` is trained. It starts at zero.

    Half as many numbers are trained, and the backward pass needs only the `rank` hidden
    numbers of each input instead of the input itself.

    - `b`: `(*batch, *rows, rank)`,
    - `a`: `(*batch, rank, *columns)`.

    !!! example

        ```python
        model = lorax.loraify(model, method="lora_fa", rank=8, key=key)
        ```

    ??? cite

        [LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
        Fine-tuning](https://arxiv.org/abs/2308.03303), section 3.
    """

    w: Weight
    b: AnyArray
    a: AnyArray
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "lora_fa"
    frozen = ("w", "a")
    is_plain_lora = True
    axes = {"b": ("rows", "rank"), "a": ("rank", "columns")}

    @classmethod
    def create(cls, fresh: Fresh) -> "LoraFaWeight":
        b, a = fresh.factors()
        return LoraFaWeight(fresh.w, b=b, a=a, **fresh.settings)

    def factored(self) -> Factored:
        self.check_whole()
        return self.to_form(self.b, self.a, self.scale)

    def scaled(self, factor: ArrayLike) -> "LoraFaWeight":
        return self.with_scaled("b", factor)

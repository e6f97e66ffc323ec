"""IA³: a trained scale of each output, or of each input, of a weight."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from ..._factored import Factored, Labels
from ..._shared import AnyArray, multiply
from ..fresh import Fresh
from ..sided import AbstractSidedWeight
from ..weight import Weight


class Ia3Weight(AbstractSidedWeight):
    """`diag(gain) · w` or `w · diag(gain)`: infused adapters that inhibit and amplify.

    - `gain`: `(*batch, *scaled_axes)`, the axes of the outputs or of the inputs. It
      starts at one.

    With `scale_inputs=True` it scales the inputs, as in PEFT's `feedforward_modules`.
    By default it scales the outputs. Those of a layer with a bias are refused, because
    PEFT scales the bias too, which no weight can do.

    **Options:**

    - `scale_inputs`: Whether inputs are scaled. `False` by default.

    !!! example

        ```python
        model = lorax.loraify(model, method="ia3", scale_inputs=True, key=key)
        ```

    ??? cite

        [Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
        Learning](https://arxiv.org/abs/2205.05638), section 3.3.
    """

    w: Weight
    gain: AnyArray
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    scaled_axes: tuple[int, ...] = eqx.field(static=True, default=(-2,))

    method = "ia3"
    frozen = ("w",)
    axes = {"gain": ("scaled",)}

    @classmethod
    def create(cls, fresh: Fresh, *, scale_inputs: bool = False) -> "Ia3Weight":
        if fresh.has_bias and not scale_inputs:
            raise ValueError(
                f"IA³ scales the outputs of a layer, and {fresh.name} is of one with a "
                "bias, which would have to be scaled too. Scale its inputs, "
                "`scale_inputs=True`, or leave it out, with `exclude`."
            )
        others = {"rows": "columns", "columns": "rows"}
        side = others[fresh.outputs] if scale_inputs else fresh.outputs
        # All of a convolution's window has one scale.
        owned = fresh.rows if side == "rows" else fresh.columns
        scaled = tuple(axis for axis in owned if axis not in fresh.window)
        return Ia3Weight(
            fresh.w,
            gain=fresh.full(fresh.axes(*scaled), 1.0),
            rows=fresh.rows,
            columns=fresh.columns,
            scaled_axes=scaled,
        )

    def array_axes(self) -> dict[str, Labels]:
        return {"gain": [*self.batch_axes(), *self.scaled_axes]}

    @property
    def rank(self) -> int:
        """Zero: there are no factors."""
        return 0

    def factored(self) -> Factored:
        self.check_whole()
        gain = self.lay_out(self.gain, self.scaled_axes)
        return self.without_factors(self.gain.dtype, gain=gain)

    def scaled(self, factor: ArrayLike) -> "Ia3Weight":
        change = multiply(self.gain - 1, factor).astype(self.gain.dtype)
        return self.with_base(self.w, gain=1 + change)

    @classmethod
    def stacked(cls, weights: Sequence[Any]) -> "Ia3Weight":
        like = next(weight for weight in weights if weight is not None)
        ones = jax.tree.map(jnp.ones_like, like)
        return super().stacked([ones if x is None else x for x in weights])

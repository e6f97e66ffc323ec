"""Segments: LoRA for some of the equal parts of a fused weight."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight, choose_some
from ..weight import Weight


class SegmentsWeight(AbstractScaledWeight):
    """LoRA with factors of their own for some of the equal parts of a weight's outputs,
    as for the query and the value of a fused projection.

    - `to_outputs`: `(*batch, segments, outputs / parts, rank)`, starts at zero,
    - `from_inputs`: `(*batch, segments, rank, inputs)`, with all axes of a side in one.

    `parts` is the number of parts, and `segments` are those that are adapted. The
    others stay as they are. As plain LoRA it has the rank of all segments together.

    **Options:**

    - `parts`: The number of parts.
    - `segments`: The numbers of those that are adapted.

    !!! example

        ```python
        # The query and the value of a projection to query, key and value.
        qkv = lorax.loraify(qkv, method="segments", parts=3, segments=[0, 2], key=key)
        ```

    ??? cite

        `MergedLinear(enable_lora=[True, False, True])` of
        [loralib](https://github.com/microsoft/LoRA).
    """

    w: Weight
    to_outputs: AnyArray
    from_inputs: AnyArray
    parts: int = eqx.field(static=True)
    segments: tuple[int, ...] = eqx.field(static=True)
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)
    outputs: str = eqx.field(static=True, default="rows")

    method = "segments"
    frozen = ("w",)
    is_plain_lora = True
    axes = {
        "to_outputs": ("segments", "part", "rank"),
        "from_inputs": ("segments", "rank", "all inputs"),
    }

    @classmethod
    def create(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, fresh: Fresh, *, parts: int, segments: Sequence[int]
    ) -> "SegmentsWeight":
        *_, outputs, inputs = fresh.matrix_shape
        if outputs % parts:
            raise ValueError(
                f"`parts={parts}` does not divide the {outputs} outputs of "
                f"{fresh.name}."
            )
        chosen = choose_some("segments", segments, parts, f"parts of {fresh.name}")
        count, part = ("segments", len(chosen)), ("part", outputs // parts)
        of_inputs = fresh.axes(count, "rank", ("all inputs", inputs))
        return SegmentsWeight(
            fresh.w,
            to_outputs=fresh.zeros(fresh.axes(count, part, "rank")),
            from_inputs=fresh.uniform(of_inputs, inputs, "from_inputs"),
            parts=parts,
            segments=chosen,
            outputs=fresh.outputs,
            **fresh.settings,
        )

    def factored(self) -> Factored:
        self.check_whole()
        left, right = self._lay_out_parts(), self.from_inputs
        right = right.reshape(*right.shape[:-3], -1, right.shape[-1])
        if self.outputs == "columns":
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        b, a = self.unflatten_rows(left), self.unflatten_columns(right)
        return self.to_form(b, a, self.scale)

    def _lay_out_parts(self) -> Array:
        """The factor of the outputs, with zeros for every other part: of shape
        `(*batch, outputs, segments * rank)`."""
        *batch, count, size, rank = self.to_outputs.shape
        zeros = jnp.zeros((*batch, size, rank), self.to_outputs.dtype)
        rows = [
            jnp.concatenate(
                [
                    self.to_outputs[..., i, :, :] if self.segments[i] == part else zeros
                    for i in range(count)
                ],
                axis=-1,
            )
            for part in range(self.parts)
        ]
        return jnp.concatenate(rows, axis=-2)

    def scaled(self, factor: ArrayLike) -> "SegmentsWeight":
        return self.with_scaled("to_outputs", factor)

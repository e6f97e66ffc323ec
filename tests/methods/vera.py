"""VeRA, written like a method in another package: one file."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike

import eqx_lorax as lorax


class VeraWeight(lorax.AbstractLoraWeight):
    """Vector-based random matrix adaptation (https://arxiv.org/abs/2310.11454): random
    frozen factors, scaled by two trained vectors."""

    w: Any
    b: Array
    a: Array
    row_gain: Array
    rank_gain: Array
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    method = "vera of these tests"
    frozen = ("w", "b", "a")

    @classmethod
    def create(cls, fresh: lorax.Fresh) -> "VeraWeight":
        *row_axes, _ = fresh.b_axes
        *batch, _ = fresh.a_axes[: len(fresh.a_axes) - len(fresh.columns)]
        tenth = jax.nn.initializers.constant(0.1)
        return cls(
            fresh.w,
            fresh.draw(fresh.b_axes, name="b"),
            fresh.draw(fresh.a_axes, name="a"),
            fresh.zeros(row_axes),
            fresh.draw([*batch, "rank"], init=tenth),
            fresh.rows,
            fresh.columns,
        )

    def factored(self) -> lorax.Factored:
        self.check_whole()
        rank_gain = self.rank_gain.reshape(
            (*self.rank_gain.shape, *(1 for _ in self.columns))
        )
        b, a = self.row_gain[..., None] * self.b, rank_gain * self.a
        return lorax.Factored(self.base_form(), b, a, 1.0, self.rows, self.columns)

    def scaled(self, factor: ArrayLike) -> "VeraWeight":
        return eqx.tree_at(lambda x: x.row_gain, self, self.row_gain * factor)

    def array_axes(self) -> dict[str, Any]:
        owned = {*self.rows, *self.columns}
        batch = [axis for axis in range(-self.w.ndim, 0) if axis not in owned]
        return {
            "b": [*batch, *self.rows, "rank"],
            "a": [*batch, "rank", *self.columns],
            "row_gain": [*batch, *self.rows],
            "rank_gain": [*batch, "rank"],
        }

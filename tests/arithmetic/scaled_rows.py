"""A method that scales its base, as DoRA and IA³ do, in one file."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

import eqx_lorax as lorax


class ScaledRows(lorax.AbstractLoraWeight):
    """`gain * (w + b · a)`, the gain along the first axis of the rows."""

    w: Any
    b: Array
    a: Array
    gain: Array
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    method = "scaled rows of these tests"
    frozen = ("w",)

    @classmethod
    def create(cls, fresh: lorax.Fresh) -> "ScaledRows":
        *rows, _ = fresh.b_axes
        b, a = fresh.zeros(fresh.b_axes), fresh.draw(fresh.a_axes)
        return cls(fresh.w, b, a, 1 + fresh.zeros(rows), fresh.rows, fresh.columns)

    def factored(self) -> lorax.Factored:
        self.check_whole()
        # For layers whose rows come before their columns.
        gain = self.gain.reshape((*self.gain.shape, *(1 for _ in self.columns)))
        return lorax.Factored(
            self.base_form(), self.b, self.a, 1.0, self.rows, self.columns, None, gain
        )

    def array_axes(self) -> dict[str, Any]:
        owned = {*self.rows, *self.columns}
        batch = [axis for axis in range(-self.w.ndim, 0) if axis not in owned]
        return {
            "b": [*batch, *self.rows, "rank"],
            "a": [*batch, "rank", *self.columns],
            "gain": [*batch, *self.rows],
        }

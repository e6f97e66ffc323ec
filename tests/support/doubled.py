"""A method as another package would write it."""

from typing import Any

import equinox as eqx
import jax

import eqx_lorax as lorax


class Doubled(lorax.AbstractLoraWeight):
    """A method of another package."""

    w: Any
    b: jax.Array
    a: jax.Array
    times: int = eqx.field(static=True)

    method = "doubled"
    frozen = ("w",)

    def factored(self):
        scale = self.times / self.b.shape[-1]
        return lorax.Factored(self.w, self.b, self.a, scale)

    def array_axes(self):
        return {"b": (-2, "rank"), "a": ("rank", -1)}

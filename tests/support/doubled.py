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

    def as_lora(self):
        return lorax.LoraWeight(self.w, self.b, self.a, alpha=self.times)

    def array_axes(self):
        return {"b": (-2, "rank"), "a": ("rank", -1)}

    @property
    def shape(self):
        return self.w.shape

    @property
    def dtype(self):
        return self.w.dtype

"""VeRA: random factors that all layers share, scaled by two trained vectors."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray, multiply
from ..fresh import Fresh
from ..sided import AbstractSidedWeight
from ..weight import Weight


class VeraWeight(AbstractSidedWeight):
    """`w + diag(output_gain) · b · diag(rank_gain) · a`: vector-based random matrix
    adaptation.

    The random factors are the same for all layers: the beginnings of two matrices
    without end that a `seed` says. They are computed where they are used, so they are
    in no file and take no memory between steps; a loop over stacked layers makes them
    once. Or they are arrays, `to_outputs` and `from_inputs`, as in files that have
    them.

    - `output_gain`: `(*batch, *outputs)`, starts at zero,
    - `rank_gain`: `(*batch, rank)`, starts at `d_initial`,
    - `to_outputs`: `(*batch, outputs, rank)`, `from_inputs`: `(*batch, rank, inputs)`,
      with all axes of a side in one.

    The entries are uniform on `±sqrt(6 / fan_in)`, with the fan-in of the layer itself:
    PEFT takes that of the widest one.

    ??? cite

        [VeRA: Vector-based Random Matrix Adaptation](https://arxiv.org/abs/2310.11454),
        equation 2.
    """

    w: Weight
    output_gain: AnyArray
    rank_gain: AnyArray
    to_outputs: AnyArray | None = None
    from_inputs: AnyArray | None = None
    seed: int | None = eqx.field(static=True, default=None)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    outputs: Literal["rows", "columns"] = eqx.field(static=True, default="rows")

    method = "vera"
    frozen = ("w", "to_outputs", "from_inputs")
    axes = {
        "output_gain": ("outputs",),
        "rank_gain": ("rank",),
        "to_outputs": ("all outputs", "rank"),
        "from_inputs": ("rank", "all inputs"),
    }

    @classmethod
    def create(
        cls, fresh: Fresh, *, seed: int = 0, d_initial: float = 0.1
    ) -> "VeraWeight":
        return VeraWeight(
            fresh.w,
            output_gain=fresh.zeros(fresh.axes(fresh.outputs)),
            rank_gain=fresh.full(fresh.axes("rank"), d_initial),
            seed=seed,
            rows=fresh.rows,
            columns=fresh.columns,
            outputs=fresh.outputs,
        )

    def used_axes(self) -> dict[str, tuple[str, ...]]:
        axes = {**self.axes, "output_gain": (self.outputs,)}
        names = axes if self.seed is None else ("output_gain", "rank_gain")
        return {name: axes[name] for name in names}

    def factored(self) -> Factored:
        self.check_whole()
        left, right = self._random_factors()
        left = multiply(self.flatten(self.output_gain, self.outputs)[..., None], left)
        right = jnp.broadcast_to(right, (*self.batch_shape, *right.shape[-2:]))
        if self.outputs == "columns":
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        b, a = self.unflatten_rows(left), self.unflatten_columns(right)
        return self.to_form(b, a, gate=self.rank_gain)

    def _random_factors(self) -> tuple[Array, Array]:
        """The factor of the outputs and that of the inputs."""
        if self.seed is None:
            return self.to_outputs, self.from_inputs  # pyright: ignore[reportReturnType]
        rank, dtype = self.rank_gain.shape[-1], self.rank_gain.dtype
        sides = [
            math.prod(self.w.shape[axis] for axis in axes)
            for axes in (self.rows, self.columns)
        ]
        outputs, inputs = sides if self.outputs == "rows" else sides[::-1]
        keys = jr.split(jr.key(self.seed))
        left = _draw_rows(keys[0], outputs, rank, rank, dtype)
        right = _draw_rows(keys[1], inputs, rank, inputs, dtype)
        return left, jnp.swapaxes(right, -1, -2)

    def scaled(self, factor: ArrayLike) -> "VeraWeight":
        return self.with_scaled("output_gain", factor)


def _draw_rows(key: Any, rows: int, size: int, fan_in: int, dtype: Any) -> Array:
    """The first rows of a matrix without end: the others do not change them."""
    bound = math.sqrt(6 / fan_in)
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(rows))
    real = jnp.finfo(dtype).dtype
    draw = lambda key: jr.uniform(key, (size,), real, -bound, bound)  # noqa: E731
    return jax.vmap(draw)(keys).astype(dtype)

"""VeRA: random factors that all layers share, scaled by two trained vectors."""

import math
from typing import Literal

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

    **Options:**

    - `seed`: Of the random factors, 0 by default.
    - `d_initial`: Where the `rank_gain` starts, 0.1 by default.

    !!! example

        ```python
        model = lorax.loraify(model, method="vera", rank=8, seed=0, key=key)
        ```

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
        left, right = (
            jnp.broadcast_to(x, (*self.batch_shape, *x.shape[-2:]))
            for x in (left, right)
        )
        left = multiply(self.flatten(self.output_gain, self.outputs)[..., None], left)
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
        left = _draw(self.seed, 0, (outputs, rank), rank)
        right = _draw(self.seed, 1, (rank, inputs), inputs)
        return left.astype(dtype), right.astype(dtype)

    def scaled(self, factor: ArrayLike) -> "VeraWeight":
        return self.with_scaled("output_gain", factor)


def _draw(seed: int, number: int, shape: tuple[int, int], fan_in: int) -> Array:
    """The beginning of a random matrix without end. Each entry depends on the seed and
    on its place alone, and neither on dtypes nor on how JAX is configured."""
    key = jr.fold_in(jr.key(seed, impl="threefry2x32"), number)
    rows, columns = (jnp.arange(size) for size in shape)
    of_row = jax.vmap(jr.fold_in, (None, 0))
    keys = jax.vmap(of_row, (0, None))(of_row(key, rows), columns)
    bits = jr.key_data(keys)[..., 0] >> 8
    unit = 2 * bits.astype(jnp.float32) / 2**24 - 1
    return math.sqrt(6 / fan_in) * unit

"""DoRA: the magnitude and the direction of a weight, trained apart."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..norms import norms_along
from ..relative import join_start, refuse_missing
from ..sided import AbstractScaledWeight
from ..weight import Weight


class DoraWeight(AbstractScaledWeight):
    """`magnitude * v / |v|` with `v = w + scale * (b · a)`: weight-decomposed low-rank
    adaptation.

    The norm is over all inputs of an output, and has no derivative. The `magnitude`, of
    shape `(*batch, *outputs)`, starts at the norm of the base.

    - `b`: `(*batch, *rows, rank)`,
    - `a`: `(*batch, rank, *columns)`,
    - `b_start`, `a_start`: of the same shapes, or none. If there are, `b · a` is
        measured from their product, as in a `lorax.RelativeLoraWeight`.

    !!! example

        ```python
        model = lorax.loraify(model, method="dora", rank=8, key=key)
        ```

    ??? cite

        [DoRA: Weight-Decomposed Low-Rank Adaptation](https://arxiv.org/abs/2402.09353),
        equations 5 and 11.
    """

    w: Weight
    b: AnyArray
    a: AnyArray
    magnitude: AnyArray
    b_start: AnyArray | None = None
    a_start: AnyArray | None = None
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)
    outputs: Literal["rows", "columns"] = eqx.field(static=True, default="rows")
    is_relative: bool = eqx.field(static=True, default=False)

    method = "dora"
    frozen = ("w", "b_start", "a_start")
    axes = {
        "b": ("rows", "rank"),
        "a": ("rank", "columns"),
        "magnitude": ("outputs",),
        "b_start": ("rows", "rank"),
        "a_start": ("rank", "columns"),
    }

    @classmethod
    def create(cls, fresh: Fresh) -> "DoraWeight":
        if jnp.issubdtype(fresh.w.dtype, jnp.complexfloating):
            raise TypeError(
                f"DoRA has a real magnitude, and {fresh.name} is complex: take "
                "`method='lora'` for it."
            )
        b, a = fresh.factors(may_change_base=True)
        start = dict(b_start=b, a_start=a) if fresh.changes_base else {}
        norms = functools.partial(jnp.linalg.norm, axis=-1)
        # Rounded to a narrow dtype, the magnitude would change the model.
        dtype = fresh.wide_dtype
        return DoraWeight(
            fresh.w,
            b=b,
            a=a,
            magnitude=fresh.derive(norms, fresh.axes(fresh.outputs), dtype=dtype),
            **start,
            outputs=fresh.outputs,
            is_relative=fresh.changes_base,
            **fresh.settings,
        )

    def used_axes(self) -> dict[str, tuple[str, ...]]:
        axes = {**self.axes, "magnitude": (self.outputs,)}
        is_used = lambda name: self.is_relative or not name.endswith("_start")  # noqa: E731
        return {name: words for name, words in axes.items() if is_used(name)}

    def factored(self) -> Factored:
        self.check_whole()
        b, a = join_start(self) if self.is_relative else (self.b, self.a)
        form = self.to_form(b, a, self.scale)
        norms = norms_along(lax.stop_gradient(form), self.outputs)
        # An output without inputs has the norm zero, and a magnitude of zero.
        norms = jnp.where(norms == 0, 1, norms)
        owned = self.rows if self.outputs == "rows" else self.columns
        return form.replace(gain=self.lay_out(self.magnitude, owned) / norms)

    def scaled(self, factor: ArrayLike) -> "DoraWeight":
        raise TypeError(
            "A DoraWeight cannot be scaled: its update is not linear in what is "
            "trained. Convert it: `lorax.as_lora(model, rank=...)`."
        )

    @classmethod
    def stacked(cls, weights: Sequence[Any]) -> "DoraWeight":
        refuse_missing(cls, weights)
        return super().stacked(weights)

"""LoRA whose update is measured from where its factors started."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .._factored import Factored
from .._shared import AnyArray
from .fresh import Fresh
from .sided import AbstractScaledWeight
from .weight import Weight


class RelativeLoraWeight(AbstractScaledWeight):
    """`w + scale * (b · a - b_start · a_start)`: LoRA of factors that did not start at
    zero, as those of PiSSA, OLoRA or MiLoRA.

    Others replace the base by the rest, `w - scale * (b_start · a_start)`, and round
    it. Here the base stays as it is, bit for bit, and other adapters of it stay valid.
    The price is twice the rank in products, though not in what is trained. For files
    of PEFT this is LoRA of twice the rank.

    - `b`, `b_start`: `(*batch, *rows, rank)`,
    - `a`, `a_start`: `(*batch, rank, *columns)`.
    """

    w: Weight
    b: AnyArray
    a: AnyArray
    b_start: AnyArray
    a_start: AnyArray
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)

    method = "relative_lora"
    frozen = ("w", "b_start", "a_start")
    is_plain_lora = True
    axes = {
        "b": ("rows", "rank"),
        "a": ("rank", "columns"),
        "b_start": ("rows", "rank"),
        "a_start": ("rank", "columns"),
    }

    @classmethod
    def create(cls, fresh: Fresh) -> "RelativeLoraWeight":
        if not fresh.changes_base:
            raise ValueError(
                f"A RelativeLoraWeight has a start that is not zero, and {fresh.name} "
                "has none: pass `init='pissa'`, or another one of these."
            )
        b, a = fresh.factors(may_change_base=True)
        start = dict(b_start=b, a_start=a)
        return RelativeLoraWeight(fresh.w, b=b, a=a, **start, **fresh.settings)

    def factored(self) -> Factored:
        self.check_whole()
        b, a = join_start(self)
        return self.to_form(b, a, self.scale)

    def scaled(self, factor: ArrayLike) -> "RelativeLoraWeight":
        raise TypeError(
            "The update of a RelativeLoraWeight, as `init='pissa'` makes it, is a "
            "difference from its start, which its own factors alone do not tell. Scale "
            "plain LoRA: `lorax.scale(lorax.as_lora(model), factor)`."
        )

    @classmethod
    def stacked(cls, weights: Any) -> "RelativeLoraWeight":
        refuse_missing(cls, weights)
        return super().stacked(weights)


def join_start(weight: Any) -> tuple[Array, Array]:
    """The factors `[b, b_start]` and `[a; -a_start]`, whose product is the change since
    the start."""
    axis = weight.a.ndim - 1 - len(weight.columns)
    b = jnp.concatenate([weight.b, weight.b_start], -1)
    return b, jnp.concatenate([weight.a, -weight.a_start], axis)


def refuse_missing(kind: type, weights: Any) -> None:
    """**Raises:**

    `TypeError` if one of the weights to be stacked is `None`, for which a method has no
    arrays without its base.
    """
    if any(weight is None for weight in weights):
        raise TypeError(
            f"The base alone, `None`, cannot be stacked with a {kind.__name__}: arrays "
            "of zeros do add something there. Stack a fresh adapter in its place."
        )

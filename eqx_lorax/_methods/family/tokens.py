"""Trainable tokens: some rows of a table."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractSidedWeight, choose_some
from ..weight import Weight


class TokensWeight(AbstractSidedWeight):
    """A table with some trained rows: `w`, plus `delta` in those rows.

    - `delta`: `(*batch, tokens, *columns)`, starts at zero;
    - `indices`: the numbers of those rows.

    For new tokens append rows to the table first. The normal form has a frozen `b` with
    a single one in each column. A lookup computes only the rows that it needs.

    **Options:**

    - `indices`: The numbers of the rows.

    !!! example

        ```python
        words = lorax.loraify(words, "weight", method="tokens", indices=[7, 8], key=key)
        ```

    ??? cite

        PEFT's `trainable_token_indices`.
    """

    w: Weight
    delta: AnyArray
    indices: tuple[int, ...] = eqx.field(static=True)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    method = "tokens"
    frozen = ("w",)
    axes = {"delta": ("tokens", "columns")}

    @classmethod
    def create(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, fresh: Fresh, *, indices: Sequence[int]
    ) -> "TokensWeight":
        if len(fresh.rows) != 1:
            raise ValueError(
                f"`method='tokens'` trains rows, and {fresh.name} has the axes "
                f"{fresh.rows} for them: it is for tables of embeddings."
            )
        size = fresh.shape[fresh.rows[0]]
        chosen = choose_some("indices", indices, size, f"rows of {fresh.name}")
        delta = fresh.zeros(fresh.axes(("tokens", len(chosen)), "columns"))
        sides = dict(rows=fresh.rows, columns=fresh.columns)
        return TokensWeight(fresh.w, delta=delta, indices=chosen, **sides)

    @property
    def rank(self) -> int:
        """The number of trained rows."""
        return len(self.indices)

    def factored(self) -> Factored:
        self.check_whole()
        # Compared, not scattered, so that a lookup is compiled together with it.
        places = jnp.arange(self.w.shape[self.rows[0]])[:, None]
        b = places == jnp.asarray(self.indices)[None]
        b = jnp.broadcast_to(b, (*self.batch_shape, *b.shape))
        return self.to_form(b.astype(self.delta.dtype), self.delta)

    def scaled(self, factor: ArrayLike) -> "TokensWeight":
        return self.with_scaled("delta", factor)

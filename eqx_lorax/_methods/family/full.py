"""A trained update of full rank."""

import equinox as eqx
from jaxtyping import ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractSidedWeight, split_whole
from ..weight import Weight


class FullWeight(AbstractSidedWeight):
    """`w + delta`: the update itself is trained, and can be taken away again.

    The `delta`, `(*batch, rows, columns)` with all axes of a side in one, starts at
    zero. As a normal form it is a product with the identity, on the smaller side. To
    train weights without keeping their base, leave them out of the adapters and name
    them in `also` of `lorax.partition`.

    !!! example

        ```python
        model = lorax.loraify(model, method="full", key=key)
        ```
    """

    w: Weight
    delta: AnyArray
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    method = "full"
    frozen = ("w",)
    axes = {"delta": ("rows", "columns")}

    @classmethod
    def create(cls, fresh: Fresh) -> "FullWeight":
        delta = fresh.zeros(fresh.axes("rows", "columns"))
        return FullWeight(fresh.w, delta=delta, rows=fresh.rows, columns=fresh.columns)

    @property
    def rank(self) -> int:
        """That of a product: the smaller side."""
        return min(self.flatten(self.delta, "rows", "columns").shape[-2:])

    def factored(self) -> Factored:
        self.check_whole()
        b, a = split_whole(self.flatten(self.delta, "rows", "columns"))
        return self.to_form(self.unflatten_rows(b), self.unflatten_columns(a))

    def scaled(self, factor: ArrayLike) -> "FullWeight":
        return self.with_scaled("delta", factor)

"""A weight of any method with a choice of how its products are formed: see
`lorax.merged_forward`."""

from typing import Any

import equinox as eqx
from jaxtyping import ArrayLike

from .._factored import Factored, Labels
from .weight import AbstractLoraWeight, is_weight


class FusedWeight(AbstractLoraWeight):
    """Stands for the same array as the weight inside, and is trained in its place.

    Attributes that it does not have are those of the weight inside.
    """

    weight: AbstractLoraWeight
    is_fused: bool = eqx.field(static=True)
    """Whether products form the sum of base and update, or never do."""

    frozen = ()

    def __init__(self, weight: AbstractLoraWeight, is_fused: bool = True):
        self.weight = weight
        self.is_fused = is_fused

    def factored(self) -> Factored:
        return self.weight.factored().replace(fuses=self.is_fused)

    @property
    def w(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The frozen base."""
        return self.weight.w

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def array_axes(self) -> dict[str, Labels]:
        return self.weight.array_axes()

    def scaled(self, factor: ArrayLike) -> "FusedWeight":
        return FusedWeight(self.weight.scaled(factor), self.is_fused)

    def with_base(self, base: Any, **changes: Any) -> "FusedWeight":
        return FusedWeight(self.weight.with_base(base, **changes), self.is_fused)

    def trainable(self) -> "FusedWeight":
        return FusedWeight(self.weight.trainable(), self.is_fused)

    def view(self, form: Factored) -> AbstractLoraWeight:
        return FusedWeight(self.weight.view(form.replace(fuses=None)), self.is_fused)

    def __getattr__(self, name: str) -> Any:
        # `weight` is missing only while Python builds or copies the object.
        if name == "weight" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.weight, name)


def unfuse(weight: Any) -> Any:
    """The weight inside a `FusedWeight`; anything else as it is."""
    if isinstance(weight, FusedWeight):
        weight = weight.weight
    base = weight.w if is_weight(weight) else None
    if is_weight(base) and (inner := unfuse(base)) is not base:
        weight = weight.with_base(inner)
    return weight

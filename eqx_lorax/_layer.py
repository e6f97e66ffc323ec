"""What all layers that stand in the place of adapted ones have in common."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx

from ._function import AbstractOpaque, lora


class AbstractLoraLayer(AbstractOpaque):
    """A module some of whose weights are adapted, in that module's place."""

    wrapped: eqx.AbstractVar[Any]
    """The module as it was, but with each adapted weight an `AbstractLoraWeight`."""

    adapts: ClassVar[tuple[type, ...]]
    """The types, exactly these, that it stands for."""

    by_default: ClassVar[bool]
    """Whether a filter that only names what is around such a module selects it."""

    has_dropout: ClassVar[bool]
    """Whether it has a field `dropout`, for the input of the low-rank branch."""

    is_lookup: ClassVar[bool]
    """Whether its weight is looked up in rather than multiplied with."""

    def __getattr__(self, name: str) -> Any:
        # `wrapped` is missing only while Python builds or copies the object.
        if name == "wrapped" or name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.wrapped, name)
        # A method of the module computes with the module's weights.
        is_own = getattr(value, "__self__", None) is self.wrapped
        return lora(value) if is_own else value

    @property
    def is_opaque(self) -> bool:
        # Only the layer knows which branch its dropout is for.
        dropout = self.dropout if self.has_dropout else None
        return dropout is not None and not dropout.inference

    # Models ask `isinstance(layer, eqx.nn.Linear)` and would take another branch.
    # `type(layer)` remains the truth.
    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.wrapped)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # The default is refused by `pickle`, because of `__class__`.
        fields = dataclasses.fields(type(self))
        return type(self), tuple(getattr(self, field.name) for field in fields)


def is_layer(node: Any) -> bool:
    """Whether `node` is one of the layers here, which pass for other modules."""
    return issubclass(type(node), AbstractLoraLayer)

"""What all layers that stand in the place of adapted ones have in common."""

from typing import Any, ClassVar

import equinox as eqx

from .._functions import AbstractOpaque
from .._shared import layer_document
from .forwarding import (
    ARRAY_PROTOCOLS,
    get_attribute,
    get_fields,
    SPECIAL_METHODS,
    SpecialMethod,
)


class AbstractLoraLayer(AbstractOpaque):
    """A module some of whose weights are adapted, in that module's place."""

    wrapped: eqx.AbstractVar[Any]
    """The module as it was, but with each adapted weight an `AbstractLoraWeight`."""

    adapts: ClassVar[tuple[type, ...]]
    """The types that it stands for: these, and subclasses that compute as they do."""

    by_default: ClassVar[bool]
    """Whether a filter that only names what is around such a module selects it."""

    has_dropout: ClassVar[bool]
    """Whether it has the fields `dropout`, for the input of the low-rank branch, and
    `key`, for where it is called without one."""

    is_lookup: ClassVar[bool]
    """Whether its weight is looked up in rather than multiplied with."""

    def __getattr__(self, name: str) -> Any:
        # `wrapped` is missing only while Python builds or copies the object.
        is_special = name.startswith("__") and name not in ARRAY_PROTOCOLS
        if name == "wrapped" or is_special:
            raise AttributeError(name)
        return get_attribute(self, name)

    @property
    def is_opaque(self) -> bool:
        # Only the layer knows which branch its dropout is for.
        return has_active_dropout(self)

    # Models ask `isinstance(layer, eqx.nn.Linear)` and would take another branch.
    # `type(layer)` remains the truth.
    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.wrapped)

    def __pdoc__(self, **options: Any) -> Any:
        # Not as what it passes for.
        return layer_document(self, **options)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # The default is refused by `pickle`, because of `__class__`.
        return type(self), get_fields(self)


for _name in SPECIAL_METHODS:
    setattr(AbstractLoraLayer, _name, SpecialMethod(_name))


def is_layer(node: Any) -> bool:
    """Whether `node` is one of the layers here, which pass for other modules."""
    return issubclass(type(node), AbstractLoraLayer)


# Functions, because every attribute of a layer's own hides one of its module.
def has_active_dropout(layer: AbstractLoraLayer) -> bool:
    """Whether it has active dropout."""
    dropout: Any = layer.dropout if layer.has_dropout else None
    return dropout is not None and not dropout.inference

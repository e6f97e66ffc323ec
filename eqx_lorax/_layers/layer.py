"""The base class of the layers that stand in the place of adapted modules."""

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
    """A layer that replaces a module with adapted arrays.

    The layer passes for the module: attributes and `isinstance` answer as the module
    does.

    !!! example

        ```python
        layer = lorax.loraify(model, key=key).layers[0]
        assert isinstance(layer, lorax.AbstractLoraLayer)
        assert isinstance(layer, eqx.nn.Linear)
        ```
    """

    wrapped: eqx.AbstractVar[Any]
    """The module, with an `AbstractLoraWeight` in the place of each adapted array."""

    adapts: ClassVar[tuple[type, ...]]
    """The types of modules that it stands for. Subclasses that compute as they do are
    included."""

    by_default: ClassVar[bool]
    """Whether such a module is adapted where a filter names only a container of it."""

    has_dropout: ClassVar[bool]
    """Whether it has the fields `dropout`, for the input of the low-rank branch, and
    `key`, the default of its calls."""

    takes_quantised: ClassVar[bool] = False
    """Whether the module's own code runs with a `lorax.QuantisedArray` in the place of
    its weight: whether it only multiplies it by `@`, or indexes it."""

    is_lookup: ClassVar[bool]
    """Whether its weight is a table that is indexed, not multiplied with."""

    def __getattr__(self, name: str) -> Any:
        # Only while Python makes or copies the object is there no `wrapped`.
        is_special = name.startswith("__") and name not in ARRAY_PROTOCOLS
        if name == "wrapped" or is_special:
            raise AttributeError(name)
        return get_attribute(self, name)

    @property
    def is_opaque(self) -> bool:
        # Only the layer itself knows that its dropout is for the low-rank branch.
        return has_active_dropout(self)

    # Models branch on `isinstance(layer, eqx.nn.Linear)`. `type(layer)` is the type of
    # the layer.
    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.wrapped)

    def __pdoc__(self, **options: Any) -> Any:
        # With the name of the layer, not of the module that it passes for.
        return layer_document(self, **options)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # `pickle` refuses the default, because of `__class__`.
        return type(self), get_fields(self)


for _name in SPECIAL_METHODS:
    setattr(AbstractLoraLayer, _name, SpecialMethod(_name))


def is_layer(node: Any) -> bool:
    """Whether `node` is an adapted layer. `isinstance` would see its module."""
    return issubclass(type(node), AbstractLoraLayer)


# A function: an attribute of the layer would hide that of its module.
def has_active_dropout(layer: AbstractLoraLayer) -> bool:
    """Whether `layer` has dropout that is switched on."""
    dropout: Any = layer.dropout if layer.has_dropout else None
    return dropout is not None and not dropout.inference

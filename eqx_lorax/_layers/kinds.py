"""The kinds of layers: which layer stands for a module, and which arrays of the module
it adapts.

Layers register themselves; nothing here knows any of them by name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from .._shared import axes_from_end
from .forwarding import NORMS
from .layer import AbstractLoraLayer


Axes: TypeAlias = tuple[int, ...]

FindAxes: TypeAlias = Callable[[Any, int], tuple[Axes, Axes]]
"""From a module, and the number of axes of one of its arrays, to the row and the column
axes of that array, counted from the end. All other axes are batch axes, such as that of
a stack of layers."""

_Layer = TypeVar("_Layer", bound=type[AbstractLoraLayer])


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The modules of one type and its subclasses, and their layer."""

    module_type: type
    layer: type[AbstractLoraLayer]
    arrays: Mapping[str, FindAxes]

    def computes(self, module: Any) -> bool:
        """Whether the layer computes what `module` does: it inherits all that the code
        of its kind calls and reads, and has no attribute that the layer would hide."""
        ancestors = type(module).__mro__
        overridden = {
            name
            for ancestor in ancestors[: ancestors.index(self.module_type)]
            for name, value in vars(ancestor).items()
            if hasattr(value, "__get__")
        }
        hidden = {x.name for x in dataclasses.fields(self.layer)} - {"wrapped"}
        is_hidden = any(hasattr(module, name) for name in hidden)
        return not is_hidden and overridden.isdisjoint({"__call__", *self.names})

    @property
    def names(self) -> set[str]:
        """The names of the fields, methods and properties that all of the kind have."""
        own = {name for name in vars(self.module_type) if not name.startswith("__")}
        return own | {field.name for field in dataclasses.fields(self.module_type)}


_KINDS: dict[type, _Kind] = {}


def register(arrays: Mapping[str, FindAxes]) -> Callable[[_Layer], _Layer]:
    """A class decorator: the layer stands for the modules of the types that it
    `adapts`.

    **Arguments:**

    - `arrays`: The names of the arrays of such a module that the layer adapts, and for
        each a function that finds its axes: `find_matrix_axes`, `find_kernel_axes`, or
        another `(module, ndim) -> (rows, columns)`.
    """

    def decorate(layer: _Layer) -> _Layer:
        for kind in layer.adapts:
            _KINDS[kind] = _Kind(kind, layer, dict(arrays))
        return layer

    return decorate


def find_layer(module: Any) -> type[AbstractLoraLayer] | None:
    """The layer of the kind of `module`; `None` if it is of no kind, or if it computes
    something else than its kind does. Its own code then has to be run."""
    kind = _find_kind(module)
    return kind.layer if kind is not None and kind.computes(module) else None


def is_known_layer(module: Any) -> bool:
    """Whether `module` can be adapted without naming one of its arrays."""
    return _find_kind(module) is not None or type(module) in NORMS


def is_adapted_by_default(module: Any) -> bool:
    """Whether `module` is adapted where a filter names only what is around it."""
    kind = _find_kind(module)
    return kind is not None and kind.layer.by_default


def is_field_of_kind(module: Any, field: str) -> bool:
    """Whether `module` has its field `field` because all of its kind have it: a
    subclass may have others."""
    kind = _find_kind(module)
    return kind is not None and field in kind.names


def list_adapted_names(module: Any) -> tuple[str, ...]:
    """The names of the arrays that are adapted where only `module` is named. In modules
    of no kind that is `weight`, if there is one."""
    kind = _find_kind(module)
    return ("weight",) if kind is None else tuple(kind.arrays)


def find_axes(module: Any, name: str, ndim: int) -> tuple[Axes, Axes]:
    """The row and the column axes, counted from the end, of the array `name` of
    `module`, which has `ndim` axes."""
    kind = _find_kind(module)
    if kind is not None and name in kind.arrays:
        return kind.arrays[name](module, ndim)
    # A convolution of another library may have `num_spatial_dims` too.
    return (find_kernel_axes if name == "weight" else find_matrix_axes)(module, ndim)


def find_matrix_axes(module: Any, ndim: int) -> tuple[Axes, Axes]:
    """The axes of a matrix, `(out, in)`: the last two."""
    return (-2,), (-1,)


def find_kernel_axes(module: Any, ndim: int) -> tuple[Axes, Axes]:
    """The axes of the kernel of a convolution, `(out, in, *window)`, where
    `module.num_spatial_dims` says that it is one; otherwise the last two."""
    spatial = getattr(module, "num_spatial_dims", 0)
    if not isinstance(spatial, int) or ndim < spatial + 2:
        spatial = 0
    return (-spatial - 2,), tuple(axes_from_end(spatial + 1))


def _find_kind(module: Any) -> _Kind | None:
    return next((_KINDS[x] for x in type(module).__mro__ if x in _KINDS), None)

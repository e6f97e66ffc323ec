"""What a file of PEFT has for one method: the base class of all formats."""

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..._methods import AbstractSidedWeight
from ..config import Options
from ..tensors import Counterpart, Linear


Tensors = dict[str, np.ndarray]

OTHER_MODEL = (
    "The file is for a model with other sizes, or `names` leads to another layer"
)
ELSE = (
    "Convert it with `lorax.as_lora(model, rank)`, or save it with `lorax.save_adapter`"
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One adapted layer: what is in the weight here, without axes of a stack."""

    counterpart: Counterpart
    arrays: Tensors
    """The arrays, by fields of the class of weights."""
    settings: dict[str, Any]
    """The static fields, without rows and columns."""


class Format(abc.ABC):
    """How PEFT stores the layers of one method beside LoRA."""

    peft_type: ClassVar[str]
    weight: ClassVar[type[AbstractSidedWeight]]
    options: ClassVar[Options]
    names: ClassVar[tuple[str, ...]]
    """The last names of all tensors that a layer can have."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Options that are not here, and matter in training alone."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The names of tensors that all layers share."""

    def list_wanted(self, found: Collection[str]) -> tuple[str, ...]:
        """Which tensors a layer has that has these."""
        return self.names

    def refuse(self, counterpart: Counterpart) -> str | None:
        """Why there is no form for a layer of this kind; `None` if there is."""
        return None

    @abc.abstractmethod
    def read(
        self,
        config: Mapping[str, Any],
        path: str,
        counterpart: Counterpart,
        tensors: Tensors,
        shared: Tensors,
    ) -> Layer:
        """The layer of the tensors at `path`.

        **Raises:**

        `ValueError` if they do not fit the array here or the configuration.
        """

    @abc.abstractmethod
    def write(self, layers: Mapping[str, Layer]) -> tuple[Tensors, dict[str, Any]]:
        """The tensors of all layers, which are given by their paths, and the options
        beside those that all methods have.

        **Raises:**

        `ValueError` if PEFT has no form for them together.
        """

    def match(self, like: Layer, layer: Layer) -> Layer:
        """`layer`, changed to have the settings and the sizes of `like`, of the same
        stack.

        **Raises:**

        `ValueError` if that cannot be.
        """
        shapes = [{k: x.shape for k, x in y.arrays.items()} for y in (like, layer)]
        if like.settings != layer.settings or shapes[0] != shapes[1]:
            raise ValueError(
                f"the layers of the stack at {like.counterpart.dotted} have adapters "
                "of different forms, which one weight cannot have. Make a list of "
                "layers of the stack"
            )
        return layer

    def fill(self, like: Layer) -> Tensors:
        """The arrays of a layer of a stack that has no adapter."""
        return {name: np.zeros_like(x) for name, x in like.arrays.items()}


class ScaledFormat(Format):
    """A format whose update has the scale `alpha / rank`."""

    scaled_names: ClassVar[tuple[str, ...]]
    """The arrays one of which, the first that there is, is multiplied if layers of a
    stack have different scales."""

    def match(self, like: Layer, layer: Layer) -> Layer:
        rank, wanted = self.rank_of(layer), self.rank_of(like)
        padded = {
            name: self._pad(name, x, wanted - rank) for name, x in layer.arrays.items()
        }
        factor = (layer.settings["alpha"] / rank) / (like.settings["alpha"] / wanted)
        name = next(name for name in self.scaled_names if name in padded)
        padded[name] = multiply(padded[name], factor)
        settings = {**layer.settings, "alpha": like.settings["alpha"]}
        if "factor_rank" in settings:
            settings["factor_rank"] = wanted
        changed = dataclasses.replace(layer, arrays=padded, settings=settings)
        return super().match(like, changed)

    def _pad(self, name: str, x: np.ndarray, more: int) -> np.ndarray:
        words = self.weight.axes[name]
        if "rank" not in words:
            return x
        return pad(x, 0 if words[0] == "rank" else x.ndim - 1, more)

    @abc.abstractmethod
    def rank_of(self, layer: Layer) -> int:
        """The rank by which `alpha` is divided."""


def pad(x: np.ndarray, axis: int, more: int) -> np.ndarray:
    """`x` with so many zeros at the end of an axis."""
    return np.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def multiply(x: np.ndarray, factor: Any) -> np.ndarray:
    """`x` times a number, or an array, rounded once to its dtype."""
    if np.ndim(factor) == 0 and factor == 1:
        return x
    return (x.astype(np.float64) * factor).astype(x.dtype)


def check_shape(name: str, x: np.ndarray, wanted: Sequence[int]) -> None:
    """**Raises:**

    `ValueError` if `x` has another shape.
    """
    if x.shape != tuple(wanted):
        raise ValueError(
            f"`{name}` has shape {x.shape}, and for this layer of `model` it is "
            f"{tuple(wanted)}. {OTHER_MODEL}"
        )


def has_turned(counterpart: Counterpart) -> bool:
    """Whether the array here is stored `(in, out)`."""
    layout = counterpart.layout
    return isinstance(layout, Linear) and layout.a_has_rows


def matrix_shape(counterpart: Counterpart) -> tuple[int, int]:
    """The outputs, and the inputs with all axes of the window, in PyTorch."""
    first, *others = counterpart.shape
    rest = int(np.prod(others))
    return (rest, first) if has_turned(counterpart) else (first, rest)


def to_torch(
    counterpart: Counterpart, b: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Factors `b` and `a` here as `(out, rank)` and `(rank, inputs)` of PyTorch."""
    if has_turned(counterpart):
        return a.T, b.T
    return b, a.reshape(a.shape[0], -1)


def from_torch(
    counterpart: Counterpart, b: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The reverse of `to_torch`."""
    if has_turned(counterpart):
        return a.T, b.T
    return b, a.reshape(a.shape[0], *counterpart.shape[1:])

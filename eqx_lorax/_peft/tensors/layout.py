"""The tensors of PEFT: how each kind of layer has its factors there."""

import abc
import dataclasses
import warnings
from typing import Any, ClassVar

import equinox as eqx
import numpy as np

from ..._layers import adapted_names, find_axes
from ..._trees import Place


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one weight without batch axes but for those of experts, as they
    are here, and what scales them."""

    b: np.ndarray
    a: np.ndarray
    alpha: float
    rank_stabilised: bool
    counted: int
    """The rank by which `alpha` is divided."""

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def scale(self) -> float:
        """What multiplies `b · a`."""
        return self.alpha / self.counted ** (0.5 if self.rank_stabilised else 1.0)

    def scaled_for(self, rank: int, rank_stabilised: bool) -> float:
        """The alpha that gives the same scale if another rank is counted."""
        power = 0.5 if self.rank_stabilised else 1.0
        wanted = 0.5 if rank_stabilised else 1.0
        if (rank, wanted) == (self.counted, power):
            return self.alpha
        return self.alpha * rank**wanted / self.counted**power


class Layout(abc.ABC):
    """How PEFT has the factors of one kind of layer."""

    names: ClassVar[tuple[str, str]] = "lora_A.weight", "lora_B.weight"
    is_parameter: ClassVar[bool] = False
    """Whether PEFT adapts a parameter of a module and not the module."""

    @abc.abstractmethod
    def to_torch(self, b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(A, B)` of PEFT."""

    @abc.abstractmethod
    def from_torch(
        self, first: np.ndarray, second: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`(b, a)` of what PEFT has. Raises `ValueError` if it has no such form."""

    def torch_rank(self, rank: int) -> int:
        """The rank that PEFT counts."""
        return rank

    def with_sides(self, exchanged: bool) -> "Layout | None":
        """The same with `A` having the side of the rows here, or of the columns; `None`
        if that is not open."""
        return None


@dataclasses.dataclass(frozen=True)
class Linear(Layout):
    """`A (r, in)`, `B (out, r)`."""

    exchanged: bool = False
    """Whether `A` has the side of the rows here: those of a weight `(in, out)`."""

    def to_torch(self, b, a):
        return (b.T, a.T) if self.exchanged else (a, b)

    def from_torch(self, first, second):
        return (first.T, second.T) if self.exchanged else (second, first)

    def with_sides(self, exchanged):
        return dataclasses.replace(self, exchanged=exchanged)


class Embedding(Layout):
    """`A (r, entries)`, `B (size, r)`: the update is transposed."""

    names = "lora_embedding_A", "lora_embedding_B"

    def to_torch(self, b, a):
        return b.T, a.T

    def from_torch(self, first, second):
        return first.T, second.T


@dataclasses.dataclass(frozen=True)
class Experts(Layout):
    """`A (r · experts, in)`, expert first; `B (out, r · experts)`, rank first."""

    experts: int
    exchanged: bool = False
    """As of `Linear`."""

    is_parameter = True

    def to_torch(self, b, a):
        if self.exchanged:
            b, a = _exchanged(b, a)
        experts, rank, columns = a.shape
        wide = np.transpose(b, (1, 2, 0)).reshape(-1, rank * experts)
        return a.reshape(experts * rank, columns), wide

    def from_torch(self, first, second):
        if first.shape[0] % self.experts:
            raise ValueError(f"{first.shape[0]} rows for {self.experts} experts")
        a = first.reshape(self.experts, -1, first.shape[1])
        b = second.reshape(second.shape[0], -1, self.experts)
        b = np.transpose(b, (2, 0, 1))
        return _exchanged(b, a) if self.exchanged else (b, a)

    def with_sides(self, exchanged):
        return dataclasses.replace(self, exchanged=exchanged)


def _exchanged(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the transposed matrices."""
    return np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
    """`A (r, in, *window)` without groups, `B (out, r / groups, 1, ...)` with them: the
    outputs of each group mix a part of the rank of their own.

    Here all groups share `a (r, in / groups, *window)`. In PEFT that is a block of `A`
    for each group, which sees the inputs of this group alone.
    """

    groups: int

    def torch_rank(self, rank):
        return rank * self.groups

    def to_torch(self, b, a):
        rank, inputs, *window = a.shape
        wide = np.zeros((self.groups, rank, self.groups, inputs, *window), a.dtype)
        for group in range(self.groups):
            wide[group, :, group] = a
        first = wide.reshape(self.groups * rank, self.groups * inputs, *window)
        return first, b.reshape(*b.shape, *(1 for _ in window))

    def from_torch(self, first, second):
        rank, inputs, *window = first.shape
        b = second.reshape(second.shape[:2])
        if self.groups == 1:
            return b, first
        shape = (self.groups, rank // self.groups, self.groups, -1, *window)
        wide = first.reshape(shape)
        a = wide[0, :, 0]
        expected, _ = self.to_torch(b, a)
        if not np.array_equal(expected, first):
            raise ValueError(
                "its groups see each other's inputs, or each has factors of its own, "
                "which no update of the kernel's own shape does"
            )
        return b, a


def layout_of(place: Place, experts: int | None, exchanged: bool = False) -> Layout:
    """The layout of the weight at `place`; `experts` is the size of the batch axis that
    is left once a stack is taken apart.

    **Raises:**

    `ValueError` if PEFT has none.
    """
    module = place.owner.module if place.owner is not None else None
    plain = Linear(exchanged) if experts is None else Experts(experts, exchanged)
    name = place.path[-1]
    if name not in adapted_names(module):
        return plain
    if isinstance(module, eqx.nn.ConvTranspose):
        raise ValueError("PEFT has no transposed convolutions")
    is_conv = find_axes(module, name, len(place.node.shape))[1] != (-1,)
    is_embedding = isinstance(module, eqx.nn.Embedding)
    if experts is not None and (is_conv or is_embedding):
        raise ValueError("PEFT has no experts of this kind")
    if is_conv:
        return Conv(getattr(module, "groups", 1))
    return Embedding() if is_embedding else plain


def layout_for(place: Place, torch: str, batch: list[int], is_in_out: bool) -> Layout:
    """The layout of the weight at `place`, which is at `torch` there; `is_in_out` says
    that it is stored `(..., in, out)` here.

    **Raises:**

    `ValueError` if PEFT has none, or if `torch` does not take its stack apart.
    """
    left = batch[torch.count("{}") :]
    if len(left) > 1 or torch.count("{}") > len(batch):
        raise ValueError(
            f"`names` gives {torch!r} for {place.dotted}, which is a stack of "
            f"{tuple(batch)}: it needs one '{{}}' for each of these axes, or one fewer "
            "for experts."
        )
    try:
        return layout_of(place, left[0] if left else None, is_in_out)
    except ValueError as error:
        raise ValueError(f"{place.dotted}: {error}.") from error


def warn_of_convolution(place: Place) -> None:
    """Says so where PEFT computes something else than what the factors are."""
    module: Any = place.owner.module if place.owner is not None else None
    if getattr(module, "num_spatial_dims", 0) and (
        any(step != 1 for step in module.dilation) or module.padding_mode != "ZEROS"
    ):
        warnings.warn(
            f"{place.dotted} is dilated or not padded with zeros. PEFT (0.21) leaves "
            "both out of the low-rank branch, so that its outputs differ from those "
            "here, which are those of the merged kernel.",
            stacklevel=4,
        )

"""Layouts: how PEFT stores the factors of each kind of layer."""

import abc
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import numpy as np

from ..._layers import find_axes, list_adapted_names
from ..._trees import Place


# The name of DoRA's magnitude, which is that of a parameter, not of a module.
MAGNITUDE = "lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one weight as they are here, and their scale. The only batch axis
    that they may have is that of experts."""

    b: np.ndarray
    a: np.ndarray
    alpha: float
    rank_stabilised: bool
    alpha_rank: int
    """The rank by which `alpha` is divided."""
    magnitude: np.ndarray | None = None
    """The size of each output, if the method is DoRA."""
    outputs: Literal["rows", "columns"] = "rows"
    """Which side of the weight here is the output of the layer in PyTorch."""

    @property
    def rank(self) -> int:
        return self.b.shape[-1]

    @property
    def scale(self) -> float:
        """The factor by which `b · a` is multiplied."""
        return self.alpha / self.alpha_rank ** (0.5 if self.rank_stabilised else 1.0)

    def alpha_for(self, rank: int, rank_stabilised: bool) -> float:
        """The alpha that gives the same scale if `rank` divides it."""
        power = 0.5 if self.rank_stabilised else 1.0
        wanted = 0.5 if rank_stabilised else 1.0
        if (rank, wanted) == (self.alpha_rank, power):
            return self.alpha
        return self.alpha * rank**wanted / self.alpha_rank**power


class Layout(abc.ABC):
    """How PEFT stores the factors of one kind of layer."""

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
        """`(b, a)` of PEFT's `(A, B)`.

        **Raises:**

        `ValueError` if the two have no such form.
        """

    @property
    def outputs(self) -> Literal["rows", "columns"]:
        """Which side of the weight here is the output of the layer in PyTorch."""
        return "rows"

    def magnitude_to_torch(self, magnitude: np.ndarray) -> np.ndarray:
        """The magnitude of DoRA, one number for each output, as PEFT stores it."""
        return magnitude

    def refuse_dora(self) -> str | None:
        """Why PEFT has no DoRA for this kind of layer; `None` if it has."""
        return "PEFT has no DoRA of parameters" if self.is_parameter else None

    def torch_rank(self, rank: int) -> int:
        """The rank that PEFT has for an adapter of this rank."""
        return rank

    def with_a_on_rows(self, a_has_rows: bool) -> "Layout | None":
        """The same layout with `A` on the rows of the weight here, or on its columns;
        `None` if the kind of layer fixes that."""
        return None


@dataclasses.dataclass(frozen=True)
class Linear(Layout):
    """`A (r, in)`, `B (out, r)`."""

    a_has_rows: bool = False
    """Whether `A` is on the rows of the weight here, as for a weight `(in, out)`."""

    @property
    def outputs(self):
        return "columns" if self.a_has_rows else "rows"

    def to_torch(self, b, a):
        return (b.T, a.T) if self.a_has_rows else (a, b)

    def from_torch(self, first, second):
        return (first.T, second.T) if self.a_has_rows else (second, first)

    def with_a_on_rows(self, a_has_rows):
        return dataclasses.replace(self, a_has_rows=a_has_rows)


class Embedding(Layout):
    """`A (r, entries)`, `B (size, r)`: the update in PEFT is transposed."""

    names = "lora_embedding_A", "lora_embedding_B"

    @property
    def outputs(self):
        return "columns"

    def to_torch(self, b, a):
        return b.T, a.T

    def from_torch(self, first, second):
        return first.T, second.T


@dataclasses.dataclass(frozen=True)
class Experts(Layout):
    """`A (r · experts, in)`, expert first; `B (out, r · experts)`, rank first."""

    experts: int
    a_has_rows: bool = False
    """See `Linear`."""

    is_parameter = True

    def to_torch(self, b, a):
        if self.a_has_rows:
            b, a = _transpose_factors(b, a)
        experts, rank, columns = a.shape
        second = np.transpose(b, (1, 2, 0)).reshape(-1, rank * experts)
        return a.reshape(experts * rank, columns), second

    def from_torch(self, first, second):
        if first.shape[0] % self.experts:
            raise ValueError(f"{first.shape[0]} rows for {self.experts} experts")
        a = first.reshape(self.experts, -1, first.shape[1])
        b = second.reshape(second.shape[0], -1, self.experts)
        b = np.transpose(b, (2, 0, 1))
        return _transpose_factors(b, a) if self.a_has_rows else (b, a)

    def with_a_on_rows(self, a_has_rows):
        return dataclasses.replace(self, a_has_rows=a_has_rows)


def _transpose_factors(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the transposed matrices."""
    return np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
    """`A (r, in, *window)`, which has no groups, and `B (out, r / groups, 1, ...)`,
    which has: the outputs of each group mix their own part of the rank.

    Here all groups share `a (r, in / groups, *window)`. In PEFT that is one block of
    `A` for each group, which is zero for the inputs of other groups.
    """

    groups: int
    window: int
    """The number of axes of the window."""

    def magnitude_to_torch(self, magnitude):
        return magnitude.reshape(1, -1, *(1 for _ in range(self.window)))

    def refuse_dora(self):
        if self.groups > 1:
            return "PEFT has no DoRA of grouped convolutions: it raises an error itself"
        return None

    def torch_rank(self, rank):
        return rank * self.groups

    def to_torch(self, b, a):
        rank, inputs, *window = a.shape
        blocks = np.zeros((self.groups, rank, self.groups, inputs, *window), a.dtype)
        for group in range(self.groups):
            blocks[group, :, group] = a
        first = blocks.reshape(self.groups * rank, self.groups * inputs, *window)
        return first, b.reshape(*b.shape, *(1 for _ in window))

    def from_torch(self, first, second):
        rank, inputs, *window = first.shape
        b = second.reshape(second.shape[:2])
        if self.groups == 1:
            return b, first
        shape = (self.groups, rank // self.groups, self.groups, -1, *window)
        blocks = first.reshape(shape)
        a = blocks[0, :, 0]
        expected, _ = self.to_torch(b, a)
        if not np.array_equal(expected, first):
            raise ValueError(
                "its groups see each other's inputs, or each has factors of its own, "
                "which no update of the kernel's own shape does"
            )
        return b, a


def choose_layout(
    place: Place, experts: int | None, a_has_rows: bool = False
) -> Layout:
    """The layout of the weight at `place`, or of one layer of the stack there.

    **Arguments:**

    - `experts`: The number of experts; `None` if they are none.

    **Raises:**

    `ValueError` if PEFT has no layout for it.
    """
    module = place.owner.module if place.owner is not None else None
    plain = Linear(a_has_rows) if experts is None else Experts(experts, a_has_rows)
    name = place.path[-1]
    if name not in list_adapted_names(module):
        return plain
    if isinstance(module, eqx.nn.ConvTranspose):
        raise ValueError("PEFT has no transposed convolutions")
    axes = find_axes(module, name, len(place.node.shape))[1]
    is_conv = axes != (-1,)
    is_embedding = isinstance(module, eqx.nn.Embedding)
    if experts is not None and (is_conv or is_embedding):
        raise ValueError("PEFT has no experts of this kind")
    if is_conv:
        return Conv(getattr(module, "groups", 1), len(axes) - 1)
    return Embedding() if is_embedding else plain


def choose_part_layout(
    place: Place, torch: str, batch: Sequence[int], is_in_out: bool
) -> Layout:
    """The layout of each part of the weight at `place` that is a module, or a
    parameter, of its own in PyTorch.

    **Arguments:**

    - `torch`: The path in PyTorch, with `{}` for each axis of a stack.
    - `batch`: The sizes of the batch axes of the weight.
    - `is_in_out`: Whether the weight is stored `(..., in, out)` here.

    **Raises:**

    `ValueError` if PEFT has no layout for it, or if `torch` has too few or too many
    `{}`.
    """
    left = batch[torch.count("{}") :]
    if len(left) > 1 or torch.count("{}") > len(batch):
        raise ValueError(
            f"`names` gives {torch!r} for {place.dotted}, which is a stack of "
            f"{tuple(batch)}: it needs one '{{}}' for each of these axes, or one fewer "
            "for experts."
        )
    try:
        return choose_layout(place, left[0] if left else None, is_in_out)
    except ValueError as error:
        raise ValueError(f"{place.dotted}: {error}.") from error


def warn_of_convolution(place: Place) -> None:
    """Warns of a convolution that PEFT computes in another way than its factors
    say."""
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

"""What a traced program holds when it holds most."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from .._shared import format_table
from .._training import format_bytes
from .costs import find_weights, Operation, Program, Value
from .origins import make_origin, Origin


@dataclasses.dataclass(frozen=True)
class HeldArrays:
    """Arrays that a step holds when it holds most, made in the same way."""

    name: str
    """The operation that made them, or the name that the model gave to its result by
    `jax.ad_checkpoint.checkpoint_name`. An adapted layer gives `"lorax_product"` to its
    output and `"lorax_hidden"` to what is between the factors."""
    scope: str
    """The `jax.named_scope`s in which they were made, such as those of Equinox's
    layers."""
    is_backward: bool
    """Whether the backward pass made them, or made them again. The others come from the
    forward pass and are kept."""
    shape: tuple[int, ...]
    """That of each. Arrays that a `scan` keeps have its length in front."""
    dtype: str
    """Its name."""
    count: int
    """The number of these arrays."""
    nbytes: int
    """The bytes of all of them on one device."""


def find_held(program: Program) -> tuple[HeldArrays, ...]:
    """What is live when most bytes are, without inputs and outputs, largest first. This
    counts the weights that are gathered for a product."""
    sizes: dict[Origin, list[int]] = collections.defaultdict(list)
    for origin, nbytes in _find_live(program):
        sizes[origin].append(nbytes)
    alike = [
        HeldArrays(
            *(x.name, x.scope, x.is_backward, x.shape, x.dtype),
            count=len(of_each),
            nbytes=sum(of_each),
        )
        for x, of_each in sizes.items()
    ]
    return tuple(sorted(alike, key=lambda x: -x.nbytes))


def format_held(held: Sequence[HeldArrays], least: int | float) -> str:
    """A table of the arrays. Those of fewer bytes than `least` are one line."""
    large = [x for x in held if x.nbytes >= least]
    small = [x for x in held if x.nbytes < least]
    rows = [
        (
            "backward" if x.is_backward else "forward",
            x.name,
            x.scope,
            "×".join(map(str, x.shape)),
            x.dtype,
            str(x.count),
            format_bytes(x.nbytes),
        )
        for x in large
    ]
    if small:
        count, nbytes = sum(x.count for x in small), sum(x.nbytes for x in small)
        rows.append(("", "smaller ones", "", "", "", str(count), format_bytes(nbytes)))
    columns = ("pass", "made by", "scope", "shape", "dtype", "arrays", "bytes")
    return format_table(columns, ("arrays", "bytes"), rows)


# An array and its bytes.
_Live = tuple[Origin, int]


def _find_live(program: Program) -> list[_Live]:
    """What is live when most bytes are."""
    last: dict[Value, int] = {}
    for i, op in enumerate(program.operations):
        last |= dict.fromkeys((*op.writes, *op.reads), i)
    first = {v: i for i, op in enumerate(program.operations) for v in op.writes}
    for v in program.outputs:
        first.pop(v, None)
    freed = collections.Counter[int]()
    for v in first:
        freed[last[v]] += v.nbytes
    slices = _describe(program.slices)
    live = most = 0
    at, within = -1, list[_Live]()
    for i, op in enumerate(program.operations):
        live += sum(v.nbytes for v in op.writes if v in first)
        during = _find_live_within(op)
        now = live + _count_bytes(during)
        if now > most:
            most, at, within = now, i, during
        live -= freed[i]
    return [*slices, *_describe(v for v in first if first[v] <= at <= last[v]), *within]


def _find_live_within(op: Operation) -> list[_Live]:
    """What is there only while an operation runs."""
    inner = max(map(_find_live, op.inner), key=_count_bytes, default=[])
    unpacked = [] if op.unpacked is None else [op.unpacked]
    return [*inner, *_find_gathered(op), *_describe(unpacked)]


def _find_gathered(op: Operation) -> Iterator[_Live]:
    for value, weight, aval in find_weights(op):
        # The slices of a loop are counted as such.
        if value.nbytes or weight.parts == weight.gathered_parts:
            continue
        nbytes = math.prod(aval.shape) * weight.itemsize // weight.gathered_parts
        yield make_origin(aval, "gathered weight", ""), nbytes


def _describe(values: Iterable[Value]) -> list[_Live]:
    sizes = {
        v: v.nbytes // (v.weight.gathered_parts if v.weight else 1) for v in values
    }
    # Inputs have no origin, and count as no bytes.
    return [(v.origin, size) for v, size in sizes.items() if v.origin and size]


def _count_bytes(arrays: Sequence[_Live]) -> int:
    return sum(nbytes for _, nbytes in arrays)

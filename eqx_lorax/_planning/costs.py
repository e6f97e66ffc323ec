"""What a traced program costs: the products it computes, and what it must hold.

Functions inside a program are inlined, what nobody reads is left out, and what only
moves entries is done on the way. Each other equation makes an array: XLA fuses some of
them and copies others into another layout, and which ones depends on the device.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.extend.core as jec

from .._shared import close, Jaxpr, manual_axes, scan_counts


@dataclasses.dataclass(frozen=True)
class Weight:
    """How an input of the program lies on the devices."""

    itemsize: int
    """Of the array that is stored."""
    parts: int
    """Into how many parts it is divided where it is stored."""
    gathered_parts: int
    """And where it is computed with."""


@dataclasses.dataclass(eq=False)
class Value:
    """An array in a program."""

    nbytes: int
    weight: Weight | None = None
    """The input of which it is a view or a slice."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """An equation that reads and writes arrays."""

    equation: Any
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    inner: tuple["Program", ...] = ()
    times: int = 1
    """How often the inner programs run."""
    everywhere: int = 1
    """On how many devices they run, each with arrays of its own."""

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def is_product(self) -> bool:
        return self.name in _PRODUCTS


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Operations in order."""

    operations: tuple[Operation, ...]
    outputs: frozenset[Value]
    """What is held by whoever runs it."""
    slices: tuple[Value, ...] = ()
    """What a loop cuts out of larger arrays for each of its rounds."""


def program(jaxpr: Jaxpr, inputs: Sequence[Value]) -> Program:
    """The program of a traced function."""
    operations: list[Operation] = []
    outputs = frozenset(_inline(close(jaxpr), inputs, operations))
    return Program(_needed(operations, outputs), outputs)


def flops(program: Program) -> int:
    """The floating point operations of the products: a multiplication and an addition
    for each term of each sum."""
    return sum(
        _PRODUCTS[op.name](op.equation)
        if op.is_product
        else op.times * op.everywhere * _of_inner(op, flops)
        for op in program.operations
    )


def peak(program: Program) -> int:
    """The most bytes that are live at once, besides inputs and outputs; with weights
    that are gathered to be computed with."""
    last: dict[Value, int] = {}
    for i, op in enumerate(program.operations):
        last |= dict.fromkeys((*op.writes, *op.reads), i)
    own = {v for op in program.operations for v in op.writes} - program.outputs
    live = most = sum(map(_slice_bytes, program.slices))
    for i, op in enumerate(program.operations):
        new = sum(v.nbytes for v in op.writes if v in own)
        dying = {v for v in (*op.reads, *op.writes) if v in own and last[v] == i}
        freed = sum(v.nbytes for v in dying)
        gathered = sum(map(_gathered_bytes, _weights(op)))
        during = max((peak(inner) for inner in op.inner), default=0) + gathered
        most = max(most, live + new + during)
        live += new - freed
    return most


def weight_reads(program: Program) -> tuple[int, int]:
    """The bytes of weights that products read on a device, and how many of them come
    from other devices."""
    read = received = 0
    for op in program.operations:
        inner = [weight_reads(inner) for inner in op.inner]
        read += op.times * max((x for x, _ in inner), default=0)
        received += op.times * max((x for _, x in inner), default=0)
        for v, weight, size in _weights(op):
            whole = size * weight.itemsize
            read += whole // weight.gathered_parts
            received += whole // weight.gathered_parts - whole // weight.parts
    return read, received


def _of_inner(op: Operation, cost: Callable[[Program], int]) -> int:
    costs = [cost(inner) for inner in op.inner]
    return max(costs, default=0) if op.name == "cond" else sum(costs)


def _weights(op: Operation) -> Iterator[tuple[Value, Weight, int]]:
    """The weights of a product, and their numbers of elements."""
    if op.is_product:
        for v, variable in zip(op.reads, op.equation.invars):
            if v.weight is not None:
                yield v, v.weight, math.prod(variable.aval.shape)


def _gathered_bytes(read: tuple[Value, Weight, int]) -> int:
    value, weight, size = read
    # The slices of a loop are counted as such.
    if value.nbytes or weight.parts == weight.gathered_parts:
        return 0
    return size * weight.itemsize // weight.gathered_parts


def _slice_bytes(value: Value) -> int:
    return value.nbytes // (value.weight.gathered_parts if value.weight else 1)


# From jaxprs to operations


def _inline(
    jaxpr: Jaxpr, inputs: Sequence[Value], operations: list[Operation]
) -> list[Value]:
    """Appends the operations of `jaxpr`, and returns the values that it returns."""
    jaxpr = jaxpr.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= {variable: Value(0) for variable in jaxpr.constvars}

    def value(atom: Any) -> Value:
        return Value(0) if isinstance(atom, jec.Literal) else values[atom]

    for equation in jaxpr.eqns:
        reads = [value(atom) for atom in equation.invars]
        called = _called(equation)
        if called is not None:
            writes = _inline(called, reads, operations)
        elif equation.primitive.name in _VIEWS:
            writes = reads[:1]
        elif equation.primitive.name in _WEIGHT_VIEWS and reads[0].weight is not None:
            writes = reads[:1]
        else:
            writes = [Value(_nbytes(variable.aval)) for variable in equation.outvars]
            operations.append(_operation(equation, reads, writes))
        values |= dict(zip(equation.outvars, writes, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _operation(
    equation: Any, reads: Sequence[Value], writes: Sequence[Value]
) -> Operation:
    inner: list[Program] = []
    times = everywhere = 1
    match equation.primitive.name, equation.params:
        case "scan", params:
            inner, times = [_round(equation, reads)], params["length"]
        case "while", params:
            # Not more than once: how often is not known.
            called = [close(params[name]) for name in ("cond_jaxpr", "body_jaxpr")]
            inner = [program(jaxpr, _unknown(jaxpr)) for jaxpr in called]
        case "cond", params:
            inner = [program(branch, reads[1:]) for branch in params["branches"]]
        case "shard_map", params:
            called = close(params["jaxpr"])
            inner = [program(called, _unknown(called))]
            sizes = params["mesh"].shape
            everywhere = math.prod(sizes[name] for name in manual_axes(params))
    return Operation(
        equation, tuple(reads), tuple(writes), tuple(inner), times, everywhere
    )


def _round(equation: Any, reads: Sequence[Value]) -> Program:
    """One round of a `scan`."""
    called = close(equation.params["jaxpr"])
    constants, carried = scan_counts(equation.params, len(reads))
    whole = constants + carried
    slices = tuple(
        Value(_nbytes(variable.aval), v.weight)
        for variable, v in zip(called.jaxpr.invars[whole:], reads[whole:])
    )
    one = program(called, [*reads[:constants], *_zeros(carried), *slices])
    return dataclasses.replace(one, slices=slices)


def _called(equation: Any) -> Jaxpr | None:
    """The function of which an equation is no more than a call."""
    if equation.primitive.name in _WITH_INNER:
        return None
    found = [equation.params.get(name) for name in ("call_jaxpr", "jaxpr", "fun_jaxpr")]
    for jaxpr in found:
        if not isinstance(jaxpr, jec.ClosedJaxpr | jec.Jaxpr):
            continue
        inner = close(jaxpr).jaxpr
        if _same(inner.invars, equation.invars) and _same(
            inner.outvars, equation.outvars
        ):
            return close(jaxpr)
    return None


def _same(variables: Sequence[Any], others: Sequence[Any]) -> bool:
    # The kernels of accelerators are given references, to blocks.
    shapes = [
        [getattr(v.aval, "shape", None) for v in vs] for vs in (variables, others)
    ]
    return shapes[0] == shapes[1]


def _needed(
    operations: Sequence[Operation], outputs: frozenset[Value]
) -> tuple[Operation, ...]:
    """Without those of which nothing is read."""
    read = set(outputs)
    needed: list[Operation] = []
    for op in reversed(operations):
        if op.equation.effects or not read.isdisjoint(op.writes):
            read |= set(op.reads)
            needed.append(op)
    return tuple(needed[::-1])


def _nbytes(aval: Any) -> int:
    # Tokens have neither.
    shape, dtype = getattr(aval, "shape", (0,)), getattr(aval, "dtype", None)
    return math.prod(shape) * (0 if dtype is None else dtype.itemsize)


def _zeros(count: int) -> list[Value]:
    return [Value(0) for _ in range(count)]


def _unknown(jaxpr: Jaxpr) -> list[Value]:
    return _zeros(len(jaxpr.jaxpr.invars))


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    terms = math.prod(shape[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms


def _convolution_flops(equation: Any) -> int:
    params = equation.params
    kernel = equation.invars[1].aval.shape
    terms = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    # The entries between those of a dilated input are zeros.
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms // zeros


_PRODUCTS = {
    "dot_general": _dot_flops,
    "conv_general_dilated": _convolution_flops,
}
_WITH_INNER = {"scan", "while", "cond", "shard_map"}
# Done on the way from or to the operation next to them.
_VIEWS = {"broadcast_in_dim", "copy", "copy_p", "expand_dims", "reshape", "squeeze"}
_VIEWS |= {"stop_gradient", "transpose"}
_WEIGHT_VIEWS = {"convert_element_type", "slice", "dynamic_slice"}

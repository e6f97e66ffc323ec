"""The costs of a traced program: the products that it computes, and the weights that
these read. What it holds is in `held`.

Functions inside a program are inlined, arrays that nothing reads are left out, and
equations that only move entries cost nothing. Every other equation is taken to make an
array. XLA fuses some of these and copies others into another layout, which depends on
the device.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import jax.extend.core as jec

from .._factored import trace_sum, trace_unpack
from .._shared import close, Jaxpr, manual_axes, scan_counts
from .origins import make_origin, Origin, reshape_origin, slice_origin


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """How an input of the program is placed on the devices."""

    itemsize: int
    """The bytes of an element as it is stored."""
    parts: int
    """Into how many parts it is divided as it is stored."""
    gathered_parts: int
    """Into how many parts it is divided as it is computed with."""


@dataclasses.dataclass(eq=False)
class Value:
    """An array in a program."""

    nbytes: int
    weight: StoredWeight | None = None
    """The input, if this is an input, or a view or a slice of one."""
    origin: Origin | None = None
    """`None` for inputs."""


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
    """On how many devices the inner programs run, each with arrays of its own."""
    unpacked: Value | None = None
    """The array that a product makes of a quantised one; `None` for everything else."""

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
    outputs: tuple[Value, ...]
    """The values that are returned. They are held outside of the program."""
    slices: tuple[Value, ...] = ()
    """The slices of larger arrays that a loop makes for each of its rounds."""


def build_program(jaxpr: Jaxpr, inputs: Sequence[Value], scope: str = "") -> Program:
    """The program of a traced function, which is called in this scope."""
    building = _Building()
    numbered = [(v, building.number(v)) for v in inputs]
    outputs = tuple(v for v, _ in building.inline(close(jaxpr), numbered, scope))
    return Program(_drop_unread(building.operations, outputs), outputs)


def count_flops(program: Program) -> int:
    """The floating point operations of the products: a multiplication and an addition
    for each term of each sum."""
    return sum(
        _PRODUCTS[op.name](op.equation)
        if op.is_product
        else op.times * op.everywhere * _sum_inner(op, count_flops)
        for op in program.operations
    )


def count_weight_reads(program: Program) -> tuple[int, int]:
    """The bytes of weights that products read on a device, and how many of them come
    from other devices."""
    read = received = 0
    for op in program.operations:
        inner = [count_weight_reads(inner) for inner in op.inner]
        read += op.times * max((x for x, _ in inner), default=0)
        received += op.times * max((x for _, x in inner), default=0)
        for _, weight, aval in find_weights(op):
            whole = math.prod(aval.shape) * weight.itemsize
            read += whole // weight.gathered_parts
            received += whole // weight.gathered_parts - whole // weight.parts
    return read, received


def _sum_inner(op: Operation, cost: Callable[[Program], int]) -> int:
    costs = [cost(inner) for inner in op.inner]
    return max(costs, default=0) if op.name == "cond" else sum(costs)


def find_weights(op: Operation) -> Iterator[tuple[Value, StoredWeight, Any]]:
    """The weights of a product, and their abstract values."""
    if op.is_product or op.unpacked is not None:
        for v, variable in zip(op.reads, op.equation.invars):
            if v.weight is not None:
                yield v, v.weight, variable.aval


# From jaxprs to operations


# A value, and a number that it shares with all that are computed in the same way.
_Numbered: TypeAlias = tuple[Value, int]


class _Building:
    """The operations of a program. What is computed twice is there once, as compilers
    see to."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._numbers: dict[Hashable, int] = {}
        self._made: dict[int, list[Value]] = {}

    def number(self, how: Hashable) -> int:
        return self._numbers.setdefault(how, len(self._numbers))

    def inline(
        self, jaxpr: Jaxpr, inputs: Sequence[_Numbered], scope: str
    ) -> list[_Numbered]:
        """Appends the operations of `jaxpr`, and returns what it returns."""
        jaxpr = jaxpr.jaxpr
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {x: (Value(0), self.number(x)) for x in jaxpr.constvars}

        def read(atom: Any) -> _Numbered:
            if isinstance(atom, jec.Literal):
                return Value(0), self.number((str(atom.val), str(atom.aval)))
            return known[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            inner = f"{scope}/{equation.source_info.name_stack}"
            called = _find_called(equation)
            if _computes_again(equation):
                operands = [(value, self.number(object())) for value, _ in operands]
            if called is not None:
                results = self.inline(called, operands, inner)
            else:
                results = self._append(equation, operands, inner)
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _append(
        self, equation: Any, operands: Sequence[_Numbered], scope: str
    ) -> list[_Numbered]:
        how = self._number_equation(equation, [number for _, number in operands])
        if how not in self._made:
            reads = [value for value, _ in operands]
            self._made[how] = self._write(equation, reads, scope)
        return [(v, self.number((how, i))) for i, v in enumerate(self._made[how])]

    def _number_equation(self, equation: Any, operands: Sequence[int]) -> int:
        shapes = tuple(str(variable.aval) for variable in equation.outvars)
        params = tuple(sorted(equation.params.items()))
        try:
            how = (equation.primitive, params, tuple(operands), shapes)
            return self.number(object() if equation.effects else how)
        except TypeError:
            # Some parameters cannot be compared.
            return self.number(object())

    def _write(self, equation: Any, reads: Sequence[Value], scope: str) -> list[Value]:
        name = equation.primitive.name
        is_view = name in _WEIGHT_VIEWS and reads[0].weight is not None
        if name == "name" and reads[0].origin is not None:
            given = equation.params["name"]
            reads[0].origin = dataclasses.replace(reads[0].origin, name=given)
        if name in _VIEWS or is_view:
            return list(reads[: len(equation.outvars)])
        writes = [
            Value(_count_bytes(x.aval), origin=make_origin(x.aval, name, scope))
            for x in equation.outvars
        ]
        self.operations.append(_make_operation(equation, reads, writes, scope))
        return writes


def _make_operation(
    equation: Any, reads: Sequence[Value], writes: Sequence[Value], scope: str
) -> Operation:
    inner: list[Program] = []
    times = everywhere = 1
    called = _trace(trace_unpack, equation)
    if called is not None:
        return _make_unpacked(equation, reads, writes, scope, called)
    match equation.primitive.name, equation.params:
        case "scan", params:
            inner, times = [_build_round(equation, reads, scope)], params["length"]
            for value, x, made in zip(writes, equation.outvars, inner[0].outputs):
                if made.origin is not None:
                    value.origin = reshape_origin(made.origin, x.aval)
        case "while", params:
            # How often it runs is not known, so it counts once.
            called = [close(params[name]) for name in ("cond_jaxpr", "body_jaxpr")]
            inner = [build_program(x, _make_unknown(x), scope) for x in called]
        case "cond", params:
            branches = params["branches"]
            inner = [build_program(x, reads[1:], scope) for x in branches]
        case "shard_map", params:
            called = close(params["jaxpr"])
            inner = [build_program(called, _make_unknown(called), scope)]
            sizes = params["mesh"].shape
            everywhere = math.prod(sizes[name] for name in manual_axes(params))
    return Operation(
        equation, tuple(reads), tuple(writes), tuple(inner), times, everywhere
    )


def _make_unpacked(
    equation: Any,
    reads: Sequence[Value],
    writes: Sequence[Value],
    scope: str,
    called: Jaxpr,
) -> Operation:
    """A product with a quantised array. It makes the dense one in a single loop, so
    that of all steps in between only the result is an array."""
    inputs = [Value(_count_bytes(x.aval)) for x in called.jaxpr.invars]
    program = build_program(called, inputs, scope)
    products = tuple(op for op in program.operations if op.is_product)
    made = [
        Value(x.nbytes, origin=make_origin(variable.aval, "unpacked weight", scope))
        for op in products
        for x, variable in zip(op.reads, op.equation.invars)
        if x not in inputs
    ]
    return Operation(
        equation,
        tuple(reads),
        tuple(writes),
        (Program(products, program.outputs),),
        unpacked=max(made, key=lambda x: x.nbytes, default=Value(0)),
    )


def _build_round(equation: Any, reads: Sequence[Value], scope: str) -> Program:
    """One round of a `scan`."""
    called = close(equation.params["jaxpr"])
    constants, carried = scan_counts(equation.params, len(reads))
    whole = constants + carried
    variables = called.jaxpr.invars
    carry = [
        Value(0, origin=make_origin(x.aval, "carry", scope))
        for x in variables[constants:whole]
    ]
    slices = tuple(
        Value(_count_bytes(x.aval), v.weight, _describe_slice(x.aval, v, scope))
        for x, v in zip(variables[whole:], reads[whole:])
    )
    one = build_program(called, [*reads[:constants], *carry, *slices], scope)
    return dataclasses.replace(one, slices=slices)


def _describe_slice(aval: Any, whole: Value, scope: str) -> Origin:
    if whole.origin is not None:
        return slice_origin(aval, whole.origin, scope)
    return make_origin(aval, f"slice of {'weight' if whole.weight else 'input'}", scope)


def _find_called(equation: Any) -> Jaxpr | None:
    """The function that an equation calls, if it does nothing else."""
    if equation.primitive.name in _WITH_INNER:
        return None
    found = [equation.params.get(name) for name in ("call_jaxpr", "jaxpr", "fun_jaxpr")]
    found.append(_trace(trace_sum, equation))
    for jaxpr in found:
        if not isinstance(jaxpr, jec.ClosedJaxpr | jec.Jaxpr):
            continue
        inner = close(jaxpr).jaxpr
        if _have_same_shapes(inner.invars, equation.invars) and _have_same_shapes(
            inner.outvars, equation.outvars
        ):
            return close(jaxpr)
    return None


def _computes_again(equation: Any) -> bool:
    """Whether it is the backward pass of a checkpoint. Compilers keep what it computes
    apart from what the forward pass has computed, and so not kept."""
    params = equation.params
    return bool(params.get("differentiated") and params.get("prevent_cse"))


def _trace(trace: Callable[..., Any], equation: Any) -> Jaxpr | None:
    avals = [atom.aval for atom in equation.invars]
    return trace(equation.primitive, equation.params, avals)


def _have_same_shapes(variables: Sequence[Any], others: Sequence[Any]) -> bool:
    # The kernels of accelerators take references to blocks, which differ in shape.
    shapes = [
        [getattr(v.aval, "shape", None) for v in vs] for vs in (variables, others)
    ]
    return shapes[0] == shapes[1]


def _drop_unread(
    operations: Sequence[Operation], outputs: Sequence[Value]
) -> tuple[Operation, ...]:
    """The operations without those whose results nothing reads."""
    read = set(outputs)
    needed: list[Operation] = []
    for op in reversed(operations):
        if op.equation.effects or not read.isdisjoint(op.writes):
            read |= set(op.reads)
            needed.append(op)
    return tuple(needed[::-1])


def _count_bytes(aval: Any) -> int:
    # Tokens have neither a shape nor a dtype.
    shape, dtype = getattr(aval, "shape", (0,)), getattr(aval, "dtype", None)
    return math.prod(shape) * (0 if dtype is None else dtype.itemsize)


def _make_unknown(jaxpr: Jaxpr) -> list[Value]:
    return [Value(0) for _ in jaxpr.jaxpr.invars]


def _count_dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    terms = math.prod(shape[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms


def _count_convolution_flops(equation: Any) -> int:
    params = equation.params
    kernel = equation.invars[1].aval.shape
    terms = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    # The entries between those of a dilated input are zeros.
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms // zeros


_PRODUCTS = {
    "dot_general": _count_dot_flops,
    "lorax_multiply_vector": _count_dot_flops,
    "conv_general_dilated": _count_convolution_flops,
    "lorax_convolve_depthwise": _count_convolution_flops,
}
_WITH_INNER = {"scan", "while", "cond", "shard_map"}
# These are done as a part of the operation before or after them.
_VIEWS = {"broadcast_in_dim", "copy", "copy_p", "expand_dims", "reshape", "squeeze"}
_VIEWS |= {"name", "optimization_barrier", "reduce_precision"}
_VIEWS |= {"stop_gradient", "transpose"}
_WEIGHT_VIEWS = {"convert_element_type", "slice", "dynamic_slice"}

"""Primitives with programs inside them: each is made anew, by its public function, of
the program over weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.lax as lax
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array

from ..._factored import is_factored, map_arrays, NotFactored, trace_sum, views
from ..._shared import compat
from ..interpreter import Body, Equation
from ..registry import rule


@rule("closed_call", "core_call")
def _call(equation: Equation, *values: Any) -> Sequence[Any]:
    jaxpr = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
    return equation.body(jaxpr, *values)(*values)


@rule("lorax_unpack")
def _unpack(equation: Equation, *values: Any) -> Sequence[Any]:
    """A layer that is adapted already, and whose arrays are adapted once more."""
    program = trace_sum(equation.primitive, equation.params, equation.in_avals)
    if program is None:
        raise NotFactored("it has no factored form")
    return equation.body(program, *values)(*values)


@rule("jit", "pjit")
def _jit(equation: Equation, *values: Any) -> Sequence[Any]:
    params = equation.params
    body = equation.body(params["jaxpr"], *values)
    shardings = (tuple(params["in_shardings"]), tuple(params["out_shardings"]))
    return equation.run(_jitted(body, params["name"], *shardings), *values)


@functools.lru_cache(maxsize=1024)
def _jitted(
    body: Body,
    name: str,
    in_shardings: tuple[Any, ...],
    out_shardings: tuple[Any, ...],
) -> Callable[..., Sequence[Any]]:
    def run(*values: Any) -> Sequence[Any]:
        values = tuple(map(_constrained, values, in_shardings))
        return list(map(_constrained, body(*values), out_shardings))

    run.__name__ = run.__qualname__ = name
    return jax.jit(run)


def _constrained(value: Any, sharding: Any) -> Any:
    if is_factored(value) or not isinstance(sharding, Sharding):
        return value
    return lax.with_sharding_constraint(value, sharding)


@rule("checkpoint", "remat", "remat2")
def _remat(equation: Equation, *values: Any) -> Sequence[Any]:
    """The primitive itself, of the rewritten program: what was differentiated already
    stays so."""
    params = equation.params
    body = equation.body(params["jaxpr"], *values)
    traced, shapes = jax.make_jaxpr(body, return_shape=True)(*values)
    jaxpr, consts = compat.hoist_constants(traced)
    leaves = [*consts, *jax.tree.leaves(values)]
    outputs = equation.primitive.bind(*leaves, **params | dict(jaxpr=jaxpr))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


@rule("cond", makes_functions=True)
def _cond(equation: Equation, index: Any, *values: Any) -> Sequence[Any]:
    branches = equation.params["branches"]
    bodies = [equation.body(jaxpr, *values) for jaxpr in branches]
    shapes = [equation.output_shapes(jaxpr, *values) for jaxpr in branches]
    reason = "the branches do not return the same kind of weight"
    same = [all(_alike(x, other) for other in xs) for x, *xs in zip(*shapes)]

    def branch(body: Body) -> Callable[..., Sequence[Any]]:
        def run(*values: Any) -> Sequence[Any]:
            outputs = body(*values)
            return [
                x if kept else equation.dense(x, reason)
                for x, kept in zip(outputs, same)
            ]

        return body if all(same) else run

    return lax.switch(index, [branch(body) for body in bodies], *values)


def _alike(x: Any, y: Any) -> bool:
    """Whether two shapes, of arrays or of weights, are of one structure and type."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y))
    return all((i.shape, i.dtype) == (j.shape, j.dtype) for i, j in pairs)


def _fix_carry(
    equation: Equation,
    carry: Sequence[Any],
    outputs: Callable[[Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """`carry`, in which each weight that the loop does not return as a weight of the
    same kind is an array; `outputs` gives the shapes of what it returns."""
    reason = "the loop does not hand it on as the same kind of weight"
    carry = list(carry)
    while any(map(is_factored, carry)):
        handed_on = outputs(carry)
        changed = [
            i
            for i, (x, y) in enumerate(zip(carry, handed_on))
            if is_factored(x) and not _alike(x, y)
        ]
        if not changed:
            break
        for i in changed:
            carry[i] = equation.dense(carry[i], reason)
    return carry


def _as_carried(equation: Equation, x: Any, like: Any) -> Any:
    if is_factored(like):
        return x
    return equation.dense(x, "the loop carries an array there")


@rule("while", makes_functions=True)
def _while(equation: Equation, *values: Any) -> Sequence[Any]:
    params = equation.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:first], values[first : first + second]
    carry = values[first + second :]

    def step(carry: Sequence[Any]) -> list[Any]:
        body = equation.body(params["body_jaxpr"], *body_consts, *carry)
        outputs = body(*body_consts, *carry)
        return [_as_carried(equation, *pair) for pair in zip(outputs, carry)]

    def goes_on(carry: Sequence[Any]) -> Array:
        body = equation.body(params["cond_jaxpr"], *cond_consts, *carry)
        (result,) = body(*cond_consts, *carry)
        return result

    def shapes(carry: Sequence[Any]) -> Sequence[Any]:
        return equation.output_shapes(params["body_jaxpr"], *body_consts, *carry)

    carry = _fix_carry(equation, carry, shapes)
    return lax.while_loop(goes_on, step, carry)


@rule("scan", makes_functions=True)
def _scan(equation: Equation, *values: Any) -> Sequence[Any]:
    params = equation.params
    num_consts, num_carry = compat.scan_counts(params, len(values))
    consts = values[:num_consts]
    carry = values[num_consts : num_consts + num_carry]
    xs = [_sliceable(equation, x) for x in values[num_consts + num_carry :]]

    def shapes(carry: Sequence[Any]) -> Sequence[Any]:
        slices = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
        return equation.output_shapes(params["jaxpr"], *consts, *carry, *slices)

    carry = _fix_carry(equation, carry, shapes)
    body = equation.body(params["jaxpr"], *consts, *carry, *xs)

    def step(carry: Sequence[Any], xs: Sequence[Any]) -> Any:
        outputs = body(*consts, *carry, *xs)
        new = [_as_carried(equation, *pair) for pair in zip(outputs, carry)]
        return new, outputs[len(carry) :]

    names = ("length", "reverse", "unroll", "_split_transpose")
    options = {name: params[name] for name in names if name in params}
    carry, ys = lax.scan(step, carry, xs, **options)
    return [*carry, *ys]


def _sliceable(equation: Equation, x: Any) -> Any:
    """`x` with the axis that `scan` goes along first in each of its leaves."""
    if not is_factored(x):
        return x
    first = x.logical_axes()[0]
    if first not in x.batch_axes():
        reason = "a loop goes along its rows or columns (layers that are stacked there "
        reason += "are adapted with `lorax.LoraSpec(rank, batch=(0,))`)"
        return equation.dense(x, reason)
    x = x if first == -x.ndim else views.store_in_order(x)
    if not views.is_led_by_first_axis(x):
        reason = "a loop goes along an axis that is not the first one in its storage"
        return equation.dense(x, reason)
    return x


@rule("shard_map", makes_functions=True)
def _shard_map(equation: Equation, *values: Any) -> Sequence[Any]:
    params = equation.params
    body = equation.body(params["jaxpr"], *values)

    def run(*values: Any) -> Sequence[Array]:
        reason = "it leaves a `shard_map`"
        return [equation.dense(x, reason) for x in body(*values)]

    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(map(_spec, values, params["in_specs"])),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=compat.manual_axes(params),
    )
    return mapped(*values)


def _spec(x: Any, spec: PartitionSpec) -> Any:
    """The specs of the leaves of a weight, given that of the array it stands for."""
    if not is_factored(x):
        return spec
    entries = [*spec, *(None,) * x.ndim]

    def of_array(array: Any, labels: Sequence[Any]) -> Any:
        axes = range(x.ndim)
        return PartitionSpec(*(entries[i] if i in axes else None for i in labels))

    return map_arrays(x, of_array, range(x.ndim))

"""Evaluating a traced program over factored weights.

Equations without a weight are run exactly as JAX traced them, with their custom
derivatives, name scopes and effects. An equation with a weight is evaluated by the rule
of its primitive, or with the dense weight if there is none.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jec
import numpy as np
from jaxtyping import Array

from .._factored import is_factored, materialise, NotFactored
from .._shared import compat, Jaxpr
from .registry import find_rule, makes_functions
from .report import Materialised, Report


class Equation:
    """An equation with weights among its operands, as a rule sees it."""

    def __init__(self, equation: Any, jaxpr: Jaxpr, report: Report):
        self.primitive: Any = equation.primitive
        self.params: dict[str, Any] = equation.params
        self.in_avals: list[Any] = [atom.aval for atom in equation.invars]
        self.out_avals: list[Any] = [var.aval for var in equation.outvars]
        self._equation = equation
        self._jaxpr = jaxpr
        self._report = report
        self._bodies: list[Body] = []

    def bind(self, *values: Any) -> Sequence[Array]:
        """The outputs for arrays and literals, as JAX computes them."""
        return jec.jaxpr_as_fun(self._alone())(*self._arguments(values))

    def _arguments(self, values: Sequence[Any]) -> list[Any]:
        """The operands that are no literals, each once."""
        pairs = zip(self._equation.invars, values, strict=True)
        return list({var: x for var, x in pairs if not _is_literal(var)}.values())

    def _alone(self) -> Jaxpr:
        """The equation alone, as a program of its `_arguments`."""
        inputs = list(dict.fromkeys(_read_by(self._equation)))
        return _part(self._jaxpr, [self._equation], inputs, self._equation.outvars)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        """Equal for two equations that compute the same."""
        literals = [
            (i, x.aval, np.asarray(x.val).tobytes())
            for i, x in enumerate(self._equation.invars)
            if _is_literal(x)
        ]
        return self.primitive, *self.params.items(), *literals

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equation) and self._key == other._key

    def body(self, jaxpr: Jaxpr, *values: Any) -> "Body":
        """A jaxpr within this equation as a function of arrays and weights like
        `values`. It has to be run: what it materialises is reported."""
        body = _body(jaxpr, jax.tree.structure(values))
        self._bodies.append(body)
        return body

    def output_shapes(self, jaxpr: Jaxpr, *values: Any) -> list[Any]:
        """The shapes of the arrays or weights that `body(jaxpr, *values)` returns."""
        return jax.eval_shape(_body(jaxpr, jax.tree.structure(values)), *values)

    def dense(self, value: Any, reason: str) -> Any:
        """The array that `value` stands for. Reports it if `value` is a weight."""
        if not is_factored(value):
            return value
        name = self.primitive.name
        self._report.add(Materialised(name, value.shape, reason, self._at))
        return materialise(value)

    def evaluate(self, *values: Any) -> Sequence[Any]:
        """The outputs; at least one operand is a weight."""
        with _name_scope(self._equation), self._equation.ctx.manager:
            try:
                outputs = self._by_rule(values)
            except NotFactored as error:
                outputs = self.bind(*(self.dense(x, str(error)) for x in values))
        self._report_bodies()
        return outputs

    def run(self, run: Callable[..., Any], *values: Any) -> Any:
        """`run(*values)`, which may compile bodies. If materialising is an error, they
        are traced first, so that it is raised before anything is compiled."""
        if self._report.raises:
            jax.eval_shape(run, *values)
            self._report_bodies()
        return run(*values)

    def _report_bodies(self) -> None:
        for body in self._bodies:
            for found in body.report.found:
                if body.is_library_code or found.at is None:
                    found = dataclasses.replace(found, at=self._at)
                self._report.add(found)

    def _by_rule(self, values: Sequence[Any]) -> Sequence[Any]:
        rule = find_rule(self.primitive.name)
        if rule is None:
            raise NotFactored("it has no factored form")
        leaves = jax.tree.leaves(values)
        is_traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
        if is_traced or not makes_functions(rule):
            return rule(self, *values)
        arguments = self._arguments(values)
        body = self.body(_alone(self), *arguments)
        return self.run(body.jitted, *arguments)

    @property
    def _at(self) -> tuple[str, int] | None:
        return compat.source_line(self._equation)


class Body:
    """A jaxpr as a function of arrays and weights.

    There is one for each jaxpr and each structure of its arguments. JAX caches by the
    function, so it traces and compiles each of them once.
    """

    def __init__(self, jaxpr: Jaxpr):
        self._jaxpr = compat.close(jaxpr)
        self.is_library_code = compat.is_library_code(self._jaxpr)
        # Filled when it is traced. Every caller reports it as its own.
        self.report = Report("allow")

    def __call__(self, *values: Any) -> list[Any]:
        return evaluate(self._jaxpr, values, self.report)

    @functools.cached_property
    def jitted(self) -> Callable[..., list[Any]]:
        return jax.jit(self)


@functools.lru_cache(maxsize=1024)
def _alone(equation: Equation) -> Jaxpr:
    return equation._alone()


@functools.lru_cache(maxsize=1024)
def _body(jaxpr: Jaxpr, structure: Any) -> Body:
    return Body(jaxpr)


def evaluate(jaxpr: Jaxpr, values: Sequence[Any], report: Report) -> list[Any]:
    """The outputs of a closed jaxpr; what has to be materialised goes to `report`."""
    if not any(map(is_factored, values)):
        return jec.jaxpr_as_fun(jaxpr)(*values)
    inner = jaxpr.jaxpr
    variables = [*inner.constvars, *inner.invars]
    known: dict[Any, Any] = dict(zip(variables, [*jaxpr.consts, *values]))
    last_use = {var: i for i, eqn in enumerate(inner.eqns) for var in _read_by(eqn)}
    last_use |= {var: len(inner.eqns) for var in _variables(inner.outvars)}
    waiting: list[Any] = []

    def run_waiting(before: int) -> None:
        """What has no weights runs in one piece, just before what has."""
        if not waiting:
            return
        made = dict.fromkeys(var for eqn in waiting for var in eqn.outvars)
        needed = dict.fromkeys(var for eqn in waiting for var in _read_by(eqn))
        inputs = [var for var in needed if var not in made]
        outputs = [var for var in made if last_use.get(var, -1) >= before]
        arguments = [known[var] for var in inputs]
        forget(inputs, before)
        run = jec.jaxpr_as_fun(_part(inner, waiting, inputs, outputs))
        known.update(zip(outputs, run(*arguments)))
        waiting.clear()

    def forget(variables: Sequence[Any], before: int) -> None:
        for var in variables:
            if last_use[var] < before:
                known.pop(var, None)

    for i, equation in enumerate(inner.eqns):
        if not any(is_factored(known.get(var)) for var in _read_by(equation)):
            waiting.append(equation)
            continue
        run_waiting(i)
        operands = [x.val if _is_literal(x) else known[x] for x in equation.invars]
        outputs = Equation(equation, inner, report).evaluate(*operands)
        known.update(zip(equation.outvars, outputs, strict=True))
        forget(_read_by(equation), i + 1)
    run_waiting(len(inner.eqns))
    return [x.val if _is_literal(x) else known[x] for x in inner.outvars]


def _name_scope(equation: Any) -> contextlib.AbstractContextManager[Any]:
    name = str(equation.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, jec.Literal)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not _is_literal(atom)]


def _read_by(equation: Any) -> list[Any]:
    return _variables(equation.invars)


def _part(
    jaxpr: Jaxpr,
    equations: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> Jaxpr:
    """Some of the equations of a jaxpr, exactly as they are, as a closed one."""
    part = jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=list(equations),
    )
    return jec.ClosedJaxpr(part, ())

"""`lorax.lora`: LoRA for any JAX function."""

import abc
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, get_args, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._factored import (
    as_form,
    find_explicit_sharding,
    is_factored,
    materialise,
    stands_for_array,
)
from .._shared import AbstractQuickModule, compat
from .interpreter import evaluate
from .report import Materialised, OnMaterialise, Report


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def lora(
    fn: Callable[_Parameters, _Result],
    *,
    on_materialise: OnMaterialise = "warn",
) -> Callable[_Parameters, _Result]:
    """A function that computes what `fn` does, with factored weights in its arguments.

    `fn` is any JAX function, written for arrays: `fn` sees an array wherever there is
    an `AbstractLoraWeight` or a `QuantisedArray`, and every product with that array is
    computed from base and factors, or from the quantised array. It is traced, as by
    `jax.jit`, and may itself be transformed, contain transformations, and be a module,
    a bound method or a `functools.partial` that holds weights.

    !!! example

        ```python
        def model(params, x):
            for w in params:
                x = jax.nn.relu(x @ w)
            return jnp.sum(x)

        params = lorax.init_lora(params, 64, jax.random.key(0))
        lorax.lora(model)(params, x)
        ```

    **Arguments:**

    - `fn`: Any JAX function. As in `jax.jit`, its Python control flow cannot depend on
        the values of arrays; on anything else that it is given, it can.
    - `on_materialise`: What happens where only the dense weight will do: it is formed
        silently (`"allow"`), with a `lorax.MaterialiseWarning` for each line of code
        where that happens (`"warn"`), or not at all, but the warning is raised
        (`"error"`).

    **Returns:**

    A function with the arguments and the results of `fn`. Without any weight in its
    arguments it is `fn`.

    **Raises:**

    `ValueError` if `on_materialise` is none of these; what `fn` raises.
    """
    if on_materialise not in get_args(OnMaterialise):
        raise ValueError(
            f"`on_materialise={on_materialise!r}` must be one of "
            f"{', '.join(map(repr, get_args(OnMaterialise)))}."
        )
    if not callable(fn):
        raise ValueError(
            f"`fn` must be a function, not a {type(fn).__name__}: `lorax.lora(fn)` "
            "gives a function, which is then called with the parameters."
        )

    options = CallOptions(on_materialise, _ADVICE, _TRACED)

    def with_weights(*args: Any, **kwargs: Any) -> Any:
        return call_with_weights(fn, args, kwargs, options)

    try:
        return functools.wraps(fn)(with_weights)
    except (AttributeError, TypeError):  # Not every callable has a name.
        return with_weights


class AbstractOpaque(AbstractQuickModule):
    """A module that may compute with its weights itself, so that they stay weights."""

    @property
    @abc.abstractmethod
    def is_opaque(self) -> bool:
        """Whether it does so now."""


def _is_opaque(node: Any) -> bool:
    return issubclass(type(node), AbstractOpaque) and node.is_opaque


class _Placeholder:
    """Stands for a weight where the function is going to see an array."""

    def __init__(self, weight: Any):
        self.weight = weight


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """How a function is called with weights, and what users are told."""

    on_materialise: OnMaterialise
    advice: str
    """How to avoid that a weight is materialised, or the warning."""
    traced: str
    """What to do if code needs the values of arrays."""
    keeps_weights: bool = False
    """Whether a weight that is returned unchanged is returned as a weight."""


def call_with_weights(fn: Any, args: Any, kwargs: Any, options: CallOptions) -> Any:
    """Calls `fn`, which sees an array in the place of each weight."""
    unbound, held = _hoist_state(fn)
    marked = jax.tree.map(
        lambda x: _Placeholder(x) if stands_for_array(x) else x,
        (held, args, kwargs),
        is_leaf=lambda x: stands_for_array(x) or _is_opaque(x),
    )
    leaves, treedef = jax.tree.flatten(marked)
    if not any(isinstance(leaf, _Placeholder) for leaf in leaves):
        return fn(*args, **kwargs)
    dynamic = [
        i for i, x in enumerate(leaves) if isinstance(x, _Placeholder | jax.Array)
    ]
    given = [_value(leaves[i]) for i in dynamic]
    forms = [as_form(x) if stands_for_array(x) else x for x in given]
    values = _stop_base_gradients(forms)
    for value in values:
        if is_factored(value):
            value.check_shapes()
    returned: Any = None

    def flat(*arrays: Array) -> Any:
        nonlocal returned
        filled = list(leaves)
        for i, array in zip(dynamic, arrays):
            filled[i] = array
        held, args, kwargs = treedef.unflatten(filled)
        returned = jax.tree.flatten(unbound(held, *args, **kwargs))
        return [leaf for leaf in returned[0] if isinstance(leaf, jax.Array)]

    try:
        jaxpr = jax.make_jaxpr(flat)(*map(_to_shape, values))
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        error.add_note(options.traced)
        raise
    report = Report(options.on_materialise, options.advice)
    outputs = evaluate(jaxpr, values, report)
    came_in = {id(x): value for value, x in zip(given, values)}
    kept = came_in if options.keeps_weights else {}
    outputs = iter(
        [kept[id(x)] if id(x) in kept else _to_output(x, report) for x in outputs]
    )
    leaves_out, structure = returned
    return structure.unflatten(
        [next(outputs) if isinstance(x, jax.Array) else x for x in leaves_out]
    )


_ADVICE = "If that is meant, say `lorax.lora(fn, on_materialise='allow')`."

_TRACED = (
    "`lorax.lora` traces its function as `jax.jit` does: Python's own control flow "
    "cannot depend on the values of arrays. Use `jax.lax.cond`, `jax.numpy.where` and "
    "the like, or pass what it depends on as a Python value."
)


def _value(leaf: Any) -> Any:
    return leaf.weight if isinstance(leaf, _Placeholder) else leaf


def _stop_base_gradients(values: list[Any]) -> list[Any]:
    """`values`, with no derivative of any order in their bases.

    Products stop the first derivative themselves. Stopping it here too would make a new
    array of each base, and a `scan` around it all would keep copies of these. So it is
    done only while a derivative is being taken, which the rule of a custom derivative
    notices.
    """
    bases = [value.base for value in values if _has_frozen_base(value)]
    is_differentiated = False

    @jax.custom_jvp
    def identity(bases: Any) -> Any:
        return bases

    @identity.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        nonlocal is_differentiated
        is_differentiated = True
        return primals[0], jax.tree.map(jnp.zeros_like, tangents[0])

    stopped = identity(bases)
    if not is_differentiated:
        return values
    new = iter(stopped)
    return [
        value.replace(base=next(new)) if _has_frozen_base(value) else value
        for value in values
    ]


def _has_frozen_base(value: Any) -> bool:
    return is_factored(value) and value.has_frozen_base


def _to_shape(value: Any) -> Any:
    if is_factored(value):
        sharding = find_explicit_sharding(value)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return value


def _to_output(value: Any, report: Report) -> Array:
    if not is_factored(value):
        return value
    reason, at = "the function returns it", compat.calling_line()
    report.add(Materialised("return", value.shape, reason, at))
    return materialise(value)


def _hoist_state(fn: Any) -> tuple[Callable[..., Any], Any]:
    """A function `call` and a pytree `held` such that `call(held, ...)` is `fn(...)`.
    The arrays in a module, a bound method or a `functools.partial` are in `held`."""
    if isinstance(fn, types.MethodType):
        return lambda held, *args, **kwargs: fn.__func__(held, *args, **kwargs), (
            fn.__self__
        )
    if isinstance(fn, functools.partial):
        call, held = _hoist_state(fn.func)
        return (
            lambda held, *args, **kwargs: call(
                held[0], *held[1], *args, **{**held[2], **kwargs}
            ),
            (held, fn.args, fn.keywords),
        )
    return lambda held, *args, **kwargs: held(*args, **kwargs), fn

"""Optimizers that leave frozen parameters alone."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax

from .._methods import is_packed, is_weight
from .._shared import PyTree
from .._trees import LORA_FREEZE, LORA_FULL, map_spec, SpecValue


@jax.tree_util.register_static
class NoUpdate:
    """The update of a frozen array: added to it, it returns that very array, which
    `jax.jit` then passes on without a copy."""

    # Then an array of NumPy on the left of `+` leaves the sum to `__radd__`.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return type(other) is NoUpdate

    def __hash__(self) -> int:
        return hash(NoUpdate)


def wrap_optimizer(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    spec: PyTree[SpecValue],
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that trains the parameters that the spec says, and no others.

    The optimizer inside never sees the frozen parameters: it has no state for them,
    decays none of them, and their norms do not count where it clips.

    !!! example

        ```python
        optimizer = lorax.wrap_optimizer(optax.adamw(1e-3), spec)
        state = optimizer.init(params)
        ```

    **Arguments:**

    - `optimizer`: Any Optax optimizer. Pass a whole chain of transformations: one that
        is outside of the wrapper would find no updates for frozen parameters.
    - `spec`: The spec that `lorax.init_lora` had, or a prefix of one.

    **Returns:**

    An Optax optimizer for the whole parameters that `lorax.init_lora` returned. Apply
    its updates with `optax.apply_updates`, which returns the very same frozen arrays.
    (With `equinox.apply_updates`, use `lorax.partition` instead.) If it is a line
    search, take value and gradient out of its state by
    `lorax.value_and_grad_from_state`.

    **Raises:**

    `ValueError`, when it is used, if the spec does not fit the tree, gives a rank where
    there is no adapter, or freezes everything.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    inner = optax.with_extra_args_support(optimizer)

    def trained(tree: PyTree) -> PyTree:
        return map_spec(_select_trained, tree, spec)

    def init(params: PyTree) -> Any:
        params = trained(params)
        if not jax.tree.leaves(params):
            raise ValueError(
                "`spec` freezes every parameter, so there is nothing to optimize."
            )
        return inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        whole = params
        if "grad" in extra:
            extra["grad"] = trained(extra["grad"])
        if "value_fn" in extra:
            value_fn = extra["value_fn"]
            extra["value_fn"] = lambda part: value_fn(eqx.combine(part, whole))
        if params is not None:
            params = trained(params)
        new, state = inner.update(trained(updates), state, params, **extra)
        # What is frozen is `None` in `new`, and an array in `updates`.
        whole_tree = updates if whole is None else whole
        filled = jax.tree.map(
            lambda _, new: NoUpdate() if new is None else new, whole_tree, new
        )
        return filled, state

    return optax.GradientTransformationExtraArgs(init, update)


def value_and_grad_from_state(
    value_fn: Callable[..., Any], spec: PyTree[SpecValue]
) -> Callable[..., tuple[Any, PyTree]]:
    """`optax.value_and_grad_from_state` for an optimizer in `lorax.wrap_optimizer`: it
    reuses the value and the gradient that a line search has computed already.

    The function of Optax needs a gradient for all parameters, but the state has one
    only for those that are trained.

    !!! example

        ```python
        value_and_grad = lorax.value_and_grad_from_state(value_fn, spec)
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        ```

    **Arguments:**

    - `value_fn`: A function whose first argument is the whole parameters, such as
        `lorax.lora(loss)`.
    - `spec`: The spec that the optimizer was wrapped with.

    **Returns:**

    A function of the arguments of `value_fn` and of `state`, the state of the
    optimizer. It returns the value and the gradient, with `None` for frozen parameters.
    An optimizer in `lorax.wrap_optimizer` takes such a gradient too.

    **Raises:**

    `ValueError`, when it is called, if the spec does not fit, see
    `lorax.wrap_optimizer`.
    """

    def value_and_grad(params: PyTree, *args: Any, state: Any, **kwargs: Any) -> Any:
        def value_of(part: PyTree, *args: Any, **kwargs: Any) -> Any:
            return value_fn(eqx.combine(part, params), *args, **kwargs)

        part = map_spec(_select_trained, params, spec)
        found = optax.value_and_grad_from_state(value_of)
        return found(part, *args, state=state, **kwargs)

    return value_and_grad


def _select_trained(path: str, x: Any, spec: SpecValue) -> Any:
    """The parameter, or gradient, with `None` for its frozen arrays."""
    if is_weight(x):
        if spec == LORA_FREEZE:
            return jax.tree.map(lambda _: None, x)
        if spec == LORA_FULL:
            raise ValueError(
                f"`spec` has `lorax.LORA_FULL` at {path}, where there is an adapter, "
                "whose base is never trained. Merge it first, or give its rank."
            )
        return eqx.filter(x, x.trainable())
    if spec not in (LORA_FREEZE, LORA_FULL):
        raise ValueError(
            f"`spec` has {spec!r} at {path}, where there is no adapter but an array. "
            "Were these parameters passed through `lorax.init_lora`?"
        )
    check_can_be_trained(path, x, spec)
    return x if spec == LORA_FULL else None


def check_can_be_trained(path: str, x: Any, spec: SpecValue) -> None:
    """**Raises:**

    `ValueError` if the spec says that a quantised parameter is trained.
    """
    if spec == LORA_FULL and is_packed(x):
        raise ValueError(
            f"`spec` has `lorax.LORA_FULL` at {path}, which is quantised and so has no "
            "derivative. Give it a rank, or leave it out of `lorax.quantise`, by "
            "`exclude`."
        )

"""Training steps, and the floors under them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from harness import compiled, Program
from jaxtyping import PyTree

import eqx_lorax as lorax


OPTIMIZER = optax.adam(1e-3)
# Returns the outputs for parameters and inputs.
Forward = Callable[[Any, Any], Any]


def loss_of(forward: Forward) -> Callable[[Any, Any], Any]:
    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))

    return loss


def frozen(name: str, forward: Forward, params: PyTree, x: Any) -> Program:
    """The floor: forward and backward to the inputs, with all parameters frozen."""
    arrays, rest = eqx.partition(params, eqx.is_array)

    def gradient(arrays: Any, x: Any) -> Any:
        return jax.grad(loss_of(forward), 1)(eqx.combine(arrays, rest), x)

    return compiled(name, gradient, arrays, x)


def step(
    name: str, forward: Forward, params: PyTree, trained: PyTree[bool], x: Any
) -> Program:
    """Forward, backward to the inputs and to `trained`, and an update by Adam. Frozen
    arrays are an argument but not a result."""
    train, rest = eqx.partition(params, trained)
    fixed, static = eqx.partition(rest, eqx.is_array)

    def update(train: Any, fixed: Any, state: Any, x: Any) -> Any:
        def loss(train: Any, x: Any) -> Any:
            return loss_of(forward)(eqx.combine(train, fixed, static), x)

        gradient, to_x = jax.grad(loss, (0, 1))(train, x)
        updates, state = OPTIMIZER.update(gradient, state, train)
        return eqx.apply_updates(train, updates), state, to_x

    return compiled(name, update, train, fixed, OPTIMIZER.init(train), x)


def adapted_and_frozen(model: PyTree, adapted: PyTree, x: Any) -> list[Program]:
    """The floor, and a step of the adapted model, both on a batch."""
    forward = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    floor = frozen("frozen", forward, model, x)
    return [floor, step("adapted", forward, adapted, lorax.trainable(adapted), x)]

"""Steps of optimizers with given gradients, for the tests."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def arrays_like(tree: Any, seed: int = 0) -> Any:
    """Random numbers in the place of every array."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree
    )


def take_steps(optimizer: Any, params: Any, gradients: Sequence[Any]) -> list[Any]:
    """The parameters after each step, all of them compiled as one program."""
    traces = []

    @jax.jit
    def step(params, state, gradient):
        traces.append(None)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, found = optimizer.init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        found.append(params)
    assert len(traces) == 1
    return found

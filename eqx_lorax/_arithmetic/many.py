"""Doing things with several adapters of one model: scaling, stacking.

An adapter here is any pytree with factored weights in it: usually the `params` of
`lorax.partition`, but a whole model will do.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .._methods import AbstractLoraWeight, is_missing, is_weight, LoraWeight
from .._shared import as_array, check_real, create, known_sharding, PyTree, zeros
from .aligned import align, find_base_array, find_base_arrays, share_rank


_Adapter = TypeVar("_Adapter")


def scale(adapter: _Adapter, factor: ArrayLike) -> _Adapter:
    """An adapter whose update is `factor` times that of `adapter`.

    `-1` makes one that undoes it where both are added, `0` one that does nothing.
    Heads and whatever else is no factor stay as they are.

    !!! example

        ```python
        half = lorax.scale(params_of_ada, 0.5)
        undone = lorax.scale(params_of_ada, -1)
        ```

    **Arguments:**

    - `adapter`: A pytree with factored weights.
    - `factor`: A number, or a scalar array, also inside `jax.jit`.

    **Returns:**

    An adapter of the same structure: it can be used instead of the other one without
    compiling anything again. Its `b` is rounded once, to the dtype that it had.
    """
    factor = as_array(factor)
    if factor.shape != ():
        raise ValueError(f"`factor` must be one number, not of shape {factor.shape}.")

    def scaled(weight: AbstractLoraWeight) -> AbstractLoraWeight:
        trained = jax.tree.leaves(eqx.filter(weight, weight.trainable()))
        for array in trained:
            check_real("factor", factor, "an adapter", array.dtype)
        return weight.scaled(factor)

    return jax.tree.map(
        lambda x: scaled(x) if is_weight(x) else x,
        adapter,
        is_leaf=is_weight,
    )


def stack(adapters: Sequence[PyTree | None], *, base: PyTree = None) -> PyTree:
    """Adapters of one model as one, with an axis more in front of every array.

    Below `equinox.filter_vmap` each example takes its own by an index, while the frozen
    weights are shared.

    !!! example

        ```python
        stacked = lorax.stack([params_of_ada, params_of_bob, None])


        @eqx.filter_vmap
        def answers(index, x):
            params = jax.tree.map(lambda array: array[index], stacked)
            return lorax.combine(params, frozen)(x)


        y = answers(jnp.array([0, 2, 1, 0]), x)  # the second one by the base alone
        ```

    **Arguments:**

    - `adapters`: Adapters of one model, usually the `params` of `lorax.partition`.
        Ranks may differ: smaller ones are padded with zeros. Where scales differ they
        go into `b`. Targets may differ too: what an adapter does not have is zero.
        `None` stands for the base alone.
    - `base`: The model, adapted or not. Its own arrays stand in where something else
        than factors was trained, such as a head, and not in every adapter.

    **Returns:**

    An adapter all of whose arrays have a leading axis of `len(adapters)`, with all the
    targets that any of them has. With one index for this axis, it is an adapter for
    `lorax.attach`, and goes with the frozen part of the first one's model if that has
    all the targets.

    **Raises:**

    `ValueError` if the adapters are not of one model, or if something else than factors
    was trained in some of them only, and `base` does not say what it is in the others.
    """
    aligned = align(adapters, "stack")
    own = find_base_arrays(base)
    stacked: list[Any] = []
    for column in aligned.columns:
        if not column.is_factored:
            arrays = [
                find_base_array(column, own, "stack") if array is None else array
                for array in column.nodes
            ]
            dtype = column.first.dtype
            stacked.append(jnp.stack([as_array(x, dtype) for x in arrays]))
            continue
        if not is_missing(column.first.w):
            raise ValueError(
                f"{column.place.dotted} has its frozen base with it, which `stack` "
                "would not share. Pass the `params` of `lorax.partition`."
            )
        if isinstance(column.first, LoraWeight):
            stacked.append(_stack_weights(share_rank(column)))
        else:
            stacked.append(type(column.first).stacked(column.nodes))
    return aligned.filled(stacked)


def _stack_weights(weights: Sequence[LoraWeight | None]) -> LoraWeight:
    like = next(weight for weight in weights if weight is not None)

    def stacked(get: Callable[[LoraWeight], Array]) -> Array:
        array = get(like)
        nothing = create(
            zeros, (array.shape, array.dtype), array, known_sharding(array)
        )
        return jnp.stack([nothing if w is None else get(w) for w in weights])

    return like.replace(b=stacked(lambda w: w.b), a=stacked(lambda w: w.a))

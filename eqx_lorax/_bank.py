"""Many adapters side by side, any mixture of which is one product away."""

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ._lora import LoraWeight
from ._many import rank_axis, stack
from ._weight import is_weight


class AdapterBank(eqx.Module):
    """Several adapters of one model, laid out so that a batch of single tokens, each
    with its own adapter, is two products with all of them and a mask in between.

    `lorax.stack` copies the factors of each example's adapter, which costs little
    beside a sequence of tokens and more than the base itself beside a single one. Here
    nothing is copied, and every example pays for the factors of all adapters.

    !!! example

        ```python
        bank = lorax.AdapterBank([params_of_ada, params_of_bob, None])


        @eqx.filter_vmap
        def next_token(index, x):
            return eqx.combine(bank[index], frozen)(x)


        @eqx.filter_vmap
        def of_a_mixture(weights, x):
            return eqx.combine(bank.mix(weights), frozen)(x)
        ```

    Convolutions, lookups, and whatever else is no product with a matrix, form the
    mixture of one of their factors.
    """

    _adapter: Any
    _size: int = eqx.field(static=True)

    def __init__(self, adapters: Sequence[PyTree | None]):
        """**Arguments:**

        - `adapters`: As of `lorax.stack`: with the same targets, of any ranks. `None`
            is the base alone.

        **Raises:**

        As `lorax.stack`.
        """
        self._size = len(adapters)
        self._adapter = jax.tree.map(
            lambda x: _side_by_side(x.as_lora()) if is_weight(x) else x,
            stack(adapters),
            is_leaf=is_weight,
        )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex | Int[Array, ""]) -> PyTree:
        """The adapter number `index`, for the frozen part of the first one's model.

        **Raises:**

        `IndexError` for a number that is not there. One that is only known at run time
        is the base alone then.
        """
        if not isinstance(index, jax.Array):
            index = range(self._size)[operator.index(index)]
        index = jnp.where(jnp.asarray(index) < 0, index + self._size, index)
        return self.mix(jax.nn.one_hot(index, self._size))

    def mix(self, weights: Sequence[float] | Float[ArrayLike, " adapters"]) -> PyTree:
        """The adapter whose update is the sum of all of them with these weights, which
        may be differentiated in. Heads are summed with them too."""
        weights = jnp.asarray(weights)
        if weights.shape != (self._size,):
            raise ValueError(
                f"`weights` must be one for each of {self._size} adapters, not of "
                f"shape {weights.shape}. For a batch use `eqx.filter_vmap`."
            )

        def mixed(x: LoraWeight) -> LoraWeight:
            # In the scale alpha is divided by the rank of all of them.
            of_all = math.sqrt(self._size) if x.rank_stabilised else self._size
            each = of_all * weights.astype(jnp.float32)
            gate = jnp.repeat(each, x.rank // self._size)
            batch = x.b.shape[: x.b.ndim - 1 - len(x.rows)]
            return x.replace(gate=jnp.broadcast_to(gate, (*batch, x.rank)))

        def summed(x: Array) -> Array:
            return jnp.tensordot(weights, x, 1).astype(x.dtype)

        return jax.tree.map(
            lambda x: mixed(x.as_lora()) if is_weight(x) else summed(x),
            self._adapter,
            is_leaf=is_weight,
        )


def _side_by_side(weight: LoraWeight) -> LoraWeight:
    """From a leading axis of adapters to one rank for all of them."""
    b = jnp.moveaxis(weight.b, 0, -2)
    axis = rank_axis(weight) - 1
    a = jnp.moveaxis(weight.a, 0, axis)
    return weight.replace(
        b=b.reshape(*b.shape[:-2], -1),
        a=a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :]),
    )

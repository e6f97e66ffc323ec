"""Many adapters side by side. Any mixture of them costs one product."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeGuard

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._factored import Factored
from .._methods import FactoredWeight, is_weight, list_weights, LoraWeight
from .._shared import (
    accumulation_dtype,
    as_array,
    check_real,
    multiply,
    promote,
    PyTree,
)
from .._trees import Place, Places, rebuild
from .aligned import find_base_arrays, find_rank_axis, Weights
from .many import stack


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
            return lorax.combine(bank[index], frozen)(x)


        @eqx.filter_vmap
        def of_a_mixture(weights, x):
            return lorax.combine(bank.mix(weights), frozen)(x)
        ```

    Convolutions, lookups, and whatever else is no product with a matrix, form the
    mixture of one of their factors.
    """

    _adapter: Any
    _size: int = eqx.field(static=True)

    def __init__(self, adapters: Sequence[PyTree | None], *, base: PyTree = None):
        """**Arguments:**

        - `adapters`: Adapters of one model, of any ranks and targets. `None` is the
            base alone. See `lorax.stack`.
        - `base`: The model, adapted or not. See `lorax.stack`.

        **Raises:**

        As `lorax.stack`.
        """
        self._size = len(adapters)
        own = find_base_arrays(base)
        stacked = stack(adapters, base=base)

        def laid_out(place: Place) -> Any:
            if isinstance(place.node, LoraWeight):
                return _side_by_side(place.node)
            if is_weight(place.node):
                return _append_neutral(place.node)
            if place.path not in own:
                return place.node
            last = as_array(own[place.path], place.node.dtype)
            return jnp.concatenate([place.node, jnp.expand_dims(last, 0)])

        edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
            place.indices: lambda _, new=laid_out(place): new
            for place in Places(stacked).all
            if place.is_array
        }
        self._adapter = rebuild(stacked, edits)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex | Int[Array, ""]) -> PyTree:
        """The adapter with this number. It fits the same frozen model as those of
        `lorax.stack`.

        **Raises:**

        `IndexError` for a number that is not there. One that is only known at run time
        is the base alone then. There is NaN in the place of what was trained as a
        whole, if `base` was not given, and of methods such as DoRA, of which no numbers
        add nothing.
        """
        if not isinstance(index, jax.Array):
            return self._slice_out(range(self._size)[operator.index(index)])
        which, row = _locate(as_array(index), self._size)
        return self._map(lambda x: self._mix(x, which), lambda x: _pick_row(x, row))

    def _slice_out(self, index: int) -> PyTree:
        """One adapter, with its own factors alone."""

        def part(x: LoraWeight) -> LoraWeight:
            rank, axis = x.rank // self._size, find_rank_axis(x)
            start = as_array(index * rank)
            b = _sliced(x.b, start, rank, x.b.ndim - 1)
            return x.replace(b=b, a=_sliced(x.a, start, rank, axis))

        return self._map(part, lambda x: _pick_row(x, as_array(index)))

    def mix(self, weights: Weights) -> PyTree:
        """The adapter whose update is the sum of all of them with these weights, which
        may be differentiated in. Heads are summed with them too."""
        weights = as_array(weights)
        if weights.shape != (self._size,):
            raise ValueError(
                f"`weights` must be one for each of {self._size} adapters, not of "
                f"shape {weights.shape}. For a batch use `eqx.filter_vmap`."
            )

        self._check_mixable()

        def summed(x: Array) -> Array:
            check_real("weights", weights, "a head", x.dtype)
            each = jnp.expand_dims(weights, range(1, x.ndim))
            x = lax.slice_in_dim(x, 0, self._size)
            return multiply(x, each).sum(0).astype(x.dtype)

        return self._map(lambda x: self._mix(x, weights), summed)

    def _check_mixable(self) -> None:
        for x in list_weights(self._adapter):
            if not _is_lora(x):
                raise TypeError(
                    f"A {type(x).__name__} cannot be mixed: its update is no sum of "
                    "those of several. Take one, `bank[index]`."
                )

    def _mix(self, x: LoraWeight, weights: Array) -> FactoredWeight:
        """The factors of all adapters, with these weights."""
        check_real("weights", weights, "an adapter", x.b.dtype)
        # The scale divides alpha by the rank of all adapters together.
        of_all = math.sqrt(self._size) if x.rank_stabilised else self._size
        kinds = accumulation_dtype(x.b.dtype), accumulation_dtype(x.a.dtype)
        dtype = promote(*kinds)
        each = multiply(weights.astype(dtype), of_all).astype(dtype)
        gate = jnp.repeat(each, x.rank // self._size)
        gate = jnp.broadcast_to(gate, (*x.batch_shape, x.rank))
        form = Factored(None, x.b, x.a, x.scale, x.rows, x.columns, gate=gate)
        return FactoredWeight(form)

    def _map(
        self, of_weight: Callable[[LoraWeight], Any], of_rest: Callable[[Array], Array]
    ) -> PyTree:
        """One adapter out of all of them."""
        return jax.tree.map(
            lambda x: of_weight(x) if _is_lora(x) else of_rest(x),
            self._adapter,
            is_leaf=_is_lora,
        )


@functools.partial(jax.jit, static_argnums=1)
def _locate(index: Array, size: int) -> tuple[Array, Array]:
    """A mask of the adapters, and the row of a head. For a number that is not there it
    is the row after the last, which has the base's own array if that is known."""
    index = jnp.where(index < 0, index + size, index)
    is_there = (0 <= index) & (index < size)
    return jnp.arange(size) == index, jnp.where(is_there, index, size)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sliced(x: Array, start: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


@jax.jit
def _pick_row(x: Array, row: Array) -> Array:
    return x.at[row].get(mode="fill", fill_value=jnp.nan)


def _is_lora(x: Any) -> TypeGuard[LoraWeight]:
    return isinstance(x, LoraWeight)


def _append_neutral(weight: Any) -> Any:
    """A stacked weight of another method, with a row after the last that adds nothing,
    or with NaN where the method has no such numbers."""
    like = jax.tree.map(lambda x: x[0], weight)
    try:
        none = jax.tree.map(lambda x: x[1:], type(weight).stacked([like, None]))
    except TypeError:
        none = jax.tree.map(lambda x: jnp.full_like(x[:1], jnp.nan), weight)
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), weight, none)


def _side_by_side(weight: Any) -> LoraWeight:
    """The factors of all adapters along one rank, not along a leading axis."""
    b = jnp.moveaxis(weight.b, 0, -2)
    axis = find_rank_axis(weight) - 1
    a = jnp.moveaxis(weight.a, 0, axis)
    return weight.replace(
        b=b.reshape(*b.shape[:-2], -1),
        a=a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :]),
    )

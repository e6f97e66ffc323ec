"""The protocol of bases: what can be asked of the array beneath an adapter.

A base has `shape`, `dtype` and `ndim`. Its type is registered with these functions, by
`functools.singledispatch`:

- `dense` (needed always), `as_form`, `find_explicit_sharding` and `map_arrays`, below;
- `contraction.contract_base`, a product with an activation;
- `convolution.convolve_base`, the same for a kernel;
- `gather.gather`, a lookup;
- `views.transpose`, `views.convert`, `views.squeeze`, `views.expand`, `views.reshape`.

Arrays and `Factored`, which may itself be a base, are registered where each function is
defined. Another kind of base registers what it can do. Products and convolutions need
nothing more than `dense`: see `primitives.unpack`. The others then raise `NotFactored`,
and `lora(fn)` goes on with the dense array.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from .._shared import (
    accumulation_dtype,
    AnyArray,
    axes_from_end,
    is_abstract,
    is_array,
    promote,
    relabel,
    sharding,
)
from .form import Base, Factored
from .products import Label, Labels, multiply_arrays, NotFactored, scale_along


_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_arrays(operation: Any) -> Callable[[_Function], _Function]:
    """Registers a function with an operation, for arrays: JAX's, NumPy's, and
    `jax.ShapeDtypeStruct`."""

    def register(function: _Function) -> _Function:
        # A tracer is an instance of `jax.Array`, but its class is no subclass.
        for kind in (jax.Array, jax.core.Tracer, np.ndarray, jax.ShapeDtypeStruct):
            operation.register(kind)(function)
        return function

    return register


def refuse(base: Base, operation: str) -> NotFactored:
    """The error for a base that is not registered with an operation."""
    return NotFactored(f"a {type(base).__name__} has no `{operation}`")


@functools.singledispatch
def dense(base: Base) -> Array:
    """The array that `base` stands for, in the accumulation dtype. What is frozen has
    no derivative."""
    raise TypeError(f"A {type(base).__name__} cannot be the base of an adapter.")


def stands_for_array(x: Any) -> bool:
    """Whether `x` is no array, but of a kind that is registered as one: an adapted
    weight, or a base such as a quantised array."""
    kind = type(x)
    return dense.dispatch(kind) is not dense.dispatch(object) and not is_array(x)


def register_base(
    kind: type,
) -> Callable[[Callable[[Any], Array]], Callable[[Any], Array]]:
    """A decorator for the function that turns a `kind` of quantised array into an
    array. Models may then hold such arrays as weights, with adapters on top or without.

    !!! example

        ```python
        @lorax.register_base(qwix.QArray)
        def dequantise(x):
            return qwix.dequantize(x)
        ```

    **Arguments:**

    - `kind`: A type. Its instances are pytrees of arrays and have `shape`, `dtype` (of
        what they stand for) and `ndim`. If they are stacked along a leading axis, for
        `jax.lax.scan`, slicing all of their arrays along it has to give valid ones.

    **Returns:**

    The decorator, which returns the function as it is. Products call the function on
    the way in, and again in the backward pass, so that what it returns is not kept in
    between. It is never differentiated.
    """

    def register(dequantise: Callable[[Any], Array]) -> Callable[[Any], Array]:
        @dense.register(kind)
        def _(base: Any) -> Array:
            array = dequantise(base).astype(base.dtype)
            return array.astype(accumulation_dtype(array.dtype))

        return dequantise

    return register


@functools.singledispatch
def as_form(x: Any) -> Factored:
    """What stands for an array, in normal form. A base alone has rank zero, and neither
    rows nor columns."""
    shape = tuple(x.shape)
    if is_abstract(x):
        empty: Any = jax.ShapeDtypeStruct((*shape, 0), x.dtype)
    else:
        empty = jnp.zeros((*shape, 0), x.dtype)
    return Factored(x, empty, empty, rows=(), columns=())


@as_form.register
def _(x: Factored) -> Factored:
    return x


@register_arrays(dense)
def _(base: AnyArray) -> Array:
    return jnp.asarray(base, accumulation_dtype(base.dtype))


@dense.register
def _(form: Factored) -> Array:
    form = form.without_gate()
    stored = axes_from_end(form.ndim)
    whole = dense(form.differentiable_base())
    if form.rank:
        b, a = (form.b, form.b_labels(stored)), (form.a, form.a_labels(stored))
        whole = add(whole, form.scale * multiply_factors(*b, *a, stored, whole))
    if form.gain is not None:
        whole = scale_along(whole, stored, form.gain, stored)
    return lax.transpose(whole, [axis % form.ndim for axis in form.logical_axes()])


def materialise(base: Base) -> Array:
    """The array that `base` stands for, rounded once to its dtype."""
    return dense(base).astype(base.dtype)


def multiply_factors(
    b: Array, b_labels: Labels, a: Array, a_labels: Labels, labels: Labels, base: Array
) -> Array:
    """`b · a`, with the sharding of the base to which it is added."""
    return multiply_arrays(
        b,
        b_labels,
        a,
        a_labels,
        labels,
        promote(b.dtype, a.dtype),
        out_sharding=find_explicit_sharding(base),
    )


def add(x: Array, y: Array) -> Array:
    """The sum, in the common dtype."""
    dtype = promote(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


@functools.singledispatch
def find_explicit_sharding(base: Base) -> NamedSharding | None:
    """The sharding in the type of the array that `base` stands for, on a mesh with
    explicit axes."""
    return None


@register_arrays(find_explicit_sharding)
def _(base: AnyArray) -> NamedSharding | None:
    return sharding.explicit_sharding(base)


@find_explicit_sharding.register
def _(form: Factored) -> NamedSharding | None:
    stored = axes_from_end(form.ndim)
    return relabel(find_explicit_sharding(form.base), stored, form.logical_axes())


@functools.singledispatch
def map_arrays(
    base: Base,
    fn: Callable[[Any, Labels], Any],
    labels: Labels,
    moved: Collection[Label] = (),
) -> Base:
    """`base` with `fn(array, labels)` in the place of each array in it.

    **Arguments:**

    - `fn`: Is applied to base, factors, gain and gate separately. That has to be the
        same as applying it to the array they stand for: it may move and pick entries,
        but not add them up.
    - `labels`: One for each axis of `base`. `fn` gets those of the array's own axes,
        with `RANK` for the rank and `None` for an axis of size one along which the
        array is broadcast.
    - `moved`: The labels along which `fn` moves or picks entries, rather than treating
        all alike. A base of several entries in one raises `NotFactored` for some.
    """
    raise refuse(base, "map_arrays")


@register_arrays(map_arrays)
def _(
    base: AnyArray,
    fn: Callable[[Any, Labels], Any],
    labels: Labels,
    moved: Collection[Label] = (),
) -> Any:
    return fn(base, labels)


@map_arrays.register
def _(
    form: Factored,
    fn: Callable[[Any, Labels], Any],
    labels: Labels,
    moved: Collection[Label] = (),
) -> Factored:
    stored = form.stored_labels(labels)
    new = form.map_factors(fn, stored)
    return new.replace(base=map_arrays(form.base, fn, stored, moved))

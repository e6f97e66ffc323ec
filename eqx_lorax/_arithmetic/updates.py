"""What a weight adds to the array beneath it: as factors where it has them, and else as
a dense matrix for each layer."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._factored import (
    Base,
    dense,
    Factored,
    is_factored,
    multiply_arrays,
    scale_along,
    views,
)
from .._shared import axes_from_end, multiply, promote, unshard


def store_in_order(form: Factored) -> Factored:
    """The same form, all bases in it stored in the order in which they are shown."""
    form = views.store_in_order(form)
    if is_factored(form.base):
        form = form.replace(base=store_in_order(form.base))
    return form


def fold(form: Factored) -> Factored | None:
    """`form` without gate, permutation and forms beneath it, whose factors are put
    beside its own: the ranks add up. `None` if that is not so, because there is a gain,
    or because a form beneath it has other rows and columns."""
    form = store_in_order(form)
    parts: list[Factored] = []
    base: Base = form
    while is_factored(base):
        if _is_scaled(base) or _axes(base) != _axes(form):
            return None
        parts.append(base.replace(gain=None).without_gate())
        base = base.base
    if len(parts) == 1:
        return parts[0]
    b_dtype, a_dtype = (
        promote(*(array.dtype for array in arrays))
        for arrays in ([part.b for part in parts], [part.a for part in parts])
    )
    b = [multiply(part.b, part.scale).astype(b_dtype) for part in parts]
    a = [part.a.astype(a_dtype) for part in parts]
    axis = form.a.ndim - 1 - len(form.columns)
    return parts[0].replace(
        base=base,
        b=jnp.concatenate(b, axis=-1),
        a=jnp.concatenate(a, axis=axis),
        scale=1.0,
    )


def bare(form: Factored) -> Factored:
    """`form` on the array beneath all adapters, as `store_in_order` has it and without
    gain, gate and scale: for other factors to be put in."""
    form = store_in_order(form)
    return form.replace(base=find_bottom(form), gain=None, gate=None, scale=1.0)


def _is_scaled(form: Factored) -> bool:
    gain = form.gain
    is_known = gain is not None and not isinstance(gain, Tracer)
    return gain is not None and not (is_known and bool(jnp.all(gain == 1)))


def _axes(form: Factored) -> Any:
    return form.rows, form.columns


def split_layers(form: Factored, path: str) -> Iterator[tuple[Any, Factored]]:
    """For each layer of a stack its index and its own form, of no batch axes, whose
    base has the rows first and then the columns.

    **Raises:**

    `ValueError` if the weight at `path` has adapters on top of each other, along other
    axes.
    """
    form = store_in_order(form)
    order = [*form.batch_axes(), *form.rows, *form.columns]
    form = store_in_order(form.transpose([axis % form.ndim for axis in order]))
    batch = form.base.shape[: len(form.batch_axes())]
    below = form.base
    while is_factored(below):
        if _axes(below) != _axes(form):
            raise ValueError(
                f"{path} has adapters on top of each other whose rows and columns are "
                "different axes, and so no one matrix is its update. Merge the inner "
                "one before the outer one is put on: `lorax.unloraify(model)`."
            )
        below = below.base
    for index in np.ndindex(*batch):
        # An empty index would copy the base.
        layer = jax.tree.map(lambda x, i=index: x[i], form) if index else form
        yield index, jax.tree.map(unshard, layer)


def dense_update(form: Factored) -> Array:
    """What a form of `split_layers` adds to the array beneath all adapters, as a matrix
    `(rows, columns)`. It is not the difference of the two, which would round it."""
    rows = [form.base.shape[axis] for axis in form.rows]
    with jax.default_matmul_precision("highest"):
        return _update(form).reshape(int(np.prod(rows)), -1)


def dense_base(form: Factored) -> Array:
    """The array beneath all adapters of a form of `split_layers`, as a matrix."""
    rows = [form.base.shape[axis] for axis in form.rows]
    return dense(find_bottom(form)).reshape(int(np.prod(rows)), -1)


def find_bottom(form: Factored) -> Base:
    """What is beneath all forms."""
    base: Base = form
    while is_factored(base):
        base = base.base
    return base


def _update(form: Factored) -> Array:
    form = form.without_gate()
    stored = axes_from_end(form.ndim)
    b, a = form.b, form.a
    update = form.scale * multiply_arrays(
        b,
        form.b_labels(stored),
        a,
        form.a_labels(stored),
        stored,
        promote(b.dtype, a.dtype),
    )
    if is_factored(form.base):
        below = _update(form.base)
        dtype = promote(below.dtype, update.dtype)
        update = below.astype(dtype) + update.astype(dtype)
    if form.gain is None:
        return update
    gain = form.gain.astype(update.dtype)
    base = dense(find_bottom(form)).astype(update.dtype)
    scaled = scale_along(update, stored, gain, stored)
    return scaled + scale_along(base, stored, gain - 1, stored)

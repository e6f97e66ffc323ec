"""A base that measures what is multiplied with it.

It computes what the array beneath it does. Beside that it forms `q = Σ xᵀ C x` over all
its inputs `x`, where `C` is zero, and the result goes through `inject(y, q)`, whose
backward pass gives `q` the cotangent 1. So the gradient in `C`, of any function of the
results, is exactly `Σ x xᵀ`. This needs no hooks, and goes through `jit`, `vmap`,
`scan` and `checkpoint`, in which `q` is made of ordinary products. As `q` itself is
never used, only its transpose is computed: one product of the inputs with themselves.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from .._factored import (
    Base,
    contract_base,
    convolve_base,
    dense,
    gather,
    Label,
    Labels,
    map_arrays,
    NotFactored,
    RANK,
    views,
)
from .._shared import axes_from_end, explicit_sharding


Side: TypeAlias = Literal["rows", "columns"]


PARTLY_SUMMED = "summed over a part of its rows or columns"


class Watch:
    """How a weight is used: filled while a function is traced."""

    def __init__(self):
        self.inputs: set[Side] = set()
        """The sides of the weight that products sum over."""
        self.others: dict[str, None] = {}
        """Whatever else is done to it."""


class Sums(eqx.Module):
    """Zeros whose gradients are sums over the inputs `x` of a weight. The batch axes of
    the weight come first in all of them."""

    totals: Array
    """Of shape `(*batch, 2)`: how many there are, and `Σ |x|²`."""

    mean: Array
    """Of shape `(*batch, *inputs)`: `Σ x`."""

    product: Array
    """`Σ x xᵀ`, of shape `(*batch, *inputs, *inputs)`, or `Σ x xᵀ Ω` if there is a
    random matrix, of shape `(*batch, *inputs, sketch)`."""


class Probe(eqx.Module):
    """Stands for `w`, which is frozen."""

    w: Base
    sums: Sums | None
    sketch: Array | None
    """The random matrix `Ω`, of shape `(*batch, *inputs, sketch)`."""

    rows: tuple[int, ...] = eqx.field(static=True)
    columns: tuple[int, ...] = eqx.field(static=True)
    inputs: Side = eqx.field(static=True, default="columns")
    """Which of these axes are those of the inputs."""
    watch: Watch | None = eqx.field(static=True, default=None)
    """Is told how the weight is used."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.w.shape)

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.w.dtype

    @property
    def input_axes(self) -> tuple[int, ...]:
        return self.columns if self.inputs == "columns" else self.rows

    @property
    def batch_axes(self) -> tuple[int, ...]:
        owned = {*self.rows, *self.columns}
        return tuple(axis for axis in axes_from_end(self.ndim) if axis not in owned)

    def list_labels(self, labels: Labels) -> tuple[list[Label], list[Label]]:
        """The labels of the batch axes and those of the inputs."""
        batch = [labels[axis] for axis in self.batch_axes]
        return batch, [labels[axis] for axis in self.input_axes]

    def note_product(self, summed: set[Label], labels: Labels) -> None:
        """Tells the watch which side is summed over."""
        if self.watch is None:
            return
        sides: tuple[tuple[Side, tuple[int, ...]], ...] = (
            ("rows", self.rows),
            ("columns", self.columns),
        )
        for side, axes in sides:
            if summed == {labels[axis] for axis in axes}:
                self.watch.inputs.add(side)
                return
        self.watch.others[PARTLY_SUMMED] = None

    def note(self, use: str) -> None:
        """Tells the watch of another use."""
        if self.watch is not None:
            self.watch.others[use] = None

    def measure(self, y: Array, x: Array, x_labels: Labels, labels: Labels) -> Array:
        """`y`, whose backward pass adds up what the inputs `x` say. The labels are
        those of the axes of `x` and of this base."""
        if self.sums is None:
            return y
        batch, inputs = self.list_labels(labels)
        # The values of narrow inputs are exact in any precision of products.
        is_exact = x.dtype.itemsize <= 2 and self.sketch is None
        precision = None if is_exact else lax.Precision.HIGHEST
        x = lax.stop_gradient(x).astype(self.sums.product.dtype)

        def form_sum(probe: Probe, x: Array) -> Array:
            return _form_sum(probe, x, x_labels, batch, inputs, precision)

        if (sharding := explicit_sharding(x)) is not None:
            # The compiler finds out how sums over several devices are formed.
            whole = NamedSharding(sharding.mesh, PartitionSpec())
            run: Any = jax.sharding.auto_axes(form_sum, out_sharding=whole)
        else:
            run = form_sum
        return inject(y, run(_replace(self, None, self.sums, self.sketch), x))


@jax.custom_vjp
def inject(y: Array, q: Array) -> Array:
    """`y`, in whose backward pass `q` has the cotangent 1, whatever that of `y` is."""
    return y


def _forward(y: Array, q: Array) -> tuple[Array, Any]:
    return y, jnp.ones_like(q)


def _backward(one: Any, cotangent: Any) -> tuple[Any, Any]:
    return cotangent, one


inject.defvjp(_forward, _backward)


def _form_sum(
    probe: Probe,
    x: Array,
    x_labels: Sequence[Label],
    batch: Sequence[Label],
    inputs: Sequence[Label],
    precision: lax.Precision | None,
) -> Array:
    sums = probe.sums
    assert sums is not None
    number: dict[Label, int] = {}

    def ids(labels: Sequence[Label]) -> list[int]:
        return [number.setdefault(label, len(number)) for label in labels]

    def multiply(
        x: Array,
        x_of: Labels,
        y: Array,
        y_of: Labels,
        out: Labels,
        precision: lax.Precision | None = lax.Precision.HIGHEST,
    ) -> Array:
        operands = (x, ids([*x_of]), y, ids([*y_of]), ids([*out]))
        return jnp.einsum(*operands, precision=precision)

    own = [label for label in x_labels if label in batch]
    free = [label for label in x_labels if label not in {*batch, *inputs}]
    count = math.prod(x.shape[x_labels.index(label)] for label in free)
    squares = multiply(x, x_labels, x, x_labels, own)
    energy = multiply(squares, own, sums.totals[..., 1], batch, [])
    q = count * jnp.sum(sums.totals[..., 0]) + energy
    q += jnp.sum(multiply(x, x_labels, sums.mean, [*batch, *inputs], own))
    # Of the other operand, which is `x` or `Ωᵀ x`.
    others: list[Label] = [("other", label) for label in inputs]
    if probe.sketch is None:
        renamed = dict(zip(inputs, others))
        y, y_labels = x, [renamed.get(label, label) for label in x_labels]
    else:
        others = ["sketch"]
        y_labels = [*dict.fromkeys([*free, *batch]), *others]
        y = multiply(x, x_labels, probe.sketch, [*batch, *inputs, *others], y_labels)
    hidden_labels = [*dict.fromkeys([*free, *batch]), *others]
    labels = [*batch, *inputs, *others]
    hidden = multiply(x, x_labels, sums.product, labels, hidden_labels, precision)
    return q + multiply(hidden, hidden_labels, y, y_labels, [])


@dense.register
def _(base: Probe) -> Array:
    base.note("used as a whole, not in a product")
    return dense(base.w)


@contract_base.register
def _(
    base: Probe,
    x: Array,
    *,
    x_labels: Labels,
    labels: Labels,
    out_labels: Labels,
    is_frozen: bool = True,
    **arguments: Any,
) -> Array:
    batch, inputs = base.list_labels(labels)
    summed = {x for x in x_labels if x in labels and x not in out_labels}
    base.note_product(summed - {*batch}, labels)
    y = contract_base(
        base.w,
        x,
        x_labels=x_labels,
        labels=labels,
        out_labels=out_labels,
        is_frozen=True,
        **arguments,
    )
    is_input = summed - {*batch} == {*inputs}
    return base.measure(y, x, x_labels, labels) if is_input else y


@convolve_base.register
def _(
    base: Probe,
    x: Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    is_frozen: bool = True,
    precision: Any = None,
    **conv: Any,
) -> Array:
    y = convolve_base(
        base.w,
        x,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        is_frozen=True,
        precision=precision,
        **conv,
    )
    _, inputs, *window = (axis - base.ndim for axis in dimension_numbers.rhs_spec)
    labels = axes_from_end(base.ndim)
    base.note_product({inputs, *window}, labels)
    if {inputs, *window} != {*base.input_axes}:
        return y
    x = lax.transpose(lax.stop_gradient(x), dimension_numbers.lhs_spec)
    # The groups share the factor of the inputs: they are as good as further images.
    x = x.reshape(-1, x.shape[1] // feature_group_count, *x.shape[2:])
    sizes = [base.shape[axis] for axis in window]
    patches = lax.conv_general_dilated_patches(
        x, sizes, precision=lax.Precision.HIGHEST, **conv
    )
    patches = patches.reshape(len(x), x.shape[1], *sizes, -1)
    return base.measure(y, patches, ["image", inputs, *window, "pixel"], labels)


@gather.register
def _(
    base: Probe,
    indices: Array,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **options: Any,
) -> Base:
    numbers = dimension_numbers
    picked = {*numbers.start_index_map, *numbers.operand_batching_dims}
    if picked <= {axis % base.ndim for axis in base.batch_axes}:
        raise NotFactored("its statistics would have to be picked too")
    base.note("looked up in")
    return gather(base.w, indices, dimension_numbers, slice_sizes, **options)


@map_arrays.register
def _(
    base: Probe,
    fn: Callable[[Any, Labels], Any],
    labels: Labels,
    moved: Collection[Label] = (),
) -> Probe:
    batch, inputs = base.list_labels(labels)
    others = inputs if base.sketch is None else [RANK]
    sums = base.sums
    if sums is not None:
        sums = Sums(
            fn(sums.totals, [*batch, RANK]),
            fn(sums.mean, [*batch, *inputs]),
            fn(sums.product, [*batch, *inputs, *others]),
        )
    sketch = base.sketch
    if sketch is not None:
        sketch = fn(sketch, [*batch, *inputs, RANK])
    return _replace(base, map_arrays(base.w, fn, labels, moved), sums, sketch)


@views.convert.register
def _(x: Probe, dtype: DTypeLike) -> Probe:
    return _replace(x, views.convert(x.w, dtype), x.sums, x.sketch)


@views.squeeze.register
def _(x: Probe, dimensions: Sequence[int]) -> Probe:
    gone = {dimension % x.ndim - x.ndim for dimension in dimensions}
    if not gone <= {*x.batch_axes}:
        raise NotFactored("its rows and columns are measured with all of their axes")
    places = [x.batch_axes.index(axis) for axis in gone]
    sums, sketch = jax.tree.map(
        lambda array: lax.squeeze(array, places), (x.sums, x.sketch)
    )
    left = [axis for axis in axes_from_end(x.ndim) if axis not in gone]
    new = {axis: i - len(left) for i, axis in enumerate(left)}
    return Probe(
        views.squeeze(x.w, dimensions),
        sums,
        sketch,
        tuple(new[axis] for axis in x.rows),
        tuple(new[axis] for axis in x.columns),
        x.inputs,
        x.watch,
    )


def _replace(x: Probe, w: Base, sums: Sums | None, sketch: Array | None) -> Probe:
    return Probe(w, sums, sketch, x.rows, x.columns, x.inputs, x.watch)

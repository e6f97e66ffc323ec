"""The arrays that are measured, and models with probes in their place."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._factored import factor_shapes, Factored
from .._methods import FactoredWeight, is_weight
from .._modules import find_targets, resolve_forms
from .._shared import accumulation_dtype, axes_from_end, list_some
from .._trees import LoraSpec, map_spec, Place, Places, rebuild
from .probe import PARTLY_SUMMED, Probe, Side, Sums, Watch
from .sketches import count_columns, draw_orthonormal


@dataclasses.dataclass(frozen=True)
class Measured:
    """An array that is measured."""

    name: str
    """Its path, as the start of its adapter will know it."""
    place: Place
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rank: int
    """That of the adapter to come."""
    inputs: Side = "columns"
    """The side that the model sums over. Until that is known, the usual one."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.place.node.shape)

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def batch(self) -> tuple[int, ...]:
        owned = {*self.rows, *self.columns}
        return self.sizes([x for x in axes_from_end(len(self.shape)) if x not in owned])

    @property
    def input_sizes(self) -> tuple[int, ...]:
        return self.sizes(self.columns if self.inputs == "columns" else self.rows)

    @property
    def dtype(self) -> jnp.dtype:
        return accumulation_dtype(self.place.node.dtype)

    def put(self, probe: Probe, b: Array, a: Array) -> FactoredWeight:
        """The weight that takes the place of the array."""
        form = Factored(
            probe, b, a, 1.0, self.rows, self.columns, has_frozen_base=False
        )
        return FactoredWeight(form)

    def watch(self, watch: Watch) -> FactoredWeight:
        """A weight that tells how it is used."""
        probe = Probe(self.place.node, None, None, self.rows, self.columns, watch=watch)
        return self.put(probe, *self.no_update())

    def no_update(self) -> tuple[Array, Array]:
        """Factors of zeros."""
        shapes = factor_shapes(self.shape, self.rows, self.columns, 1)
        b, a = (jnp.zeros(shape, self.dtype) for shape in shapes)
        return b, a


class Fixed(eqx.Module):
    """The random matrices for one array."""

    sketch: Array | None
    """For its inputs, of shape `(*batch, *inputs, k)`."""
    b: Array | None
    """`Ψ`, of shape `(*batch, *rows, l)`."""
    a: Array | None
    """`Ωᵀ`, of shape `(*batch, k, *columns)`."""


class Zeros(eqx.Module):
    """Zeros for one array, whose gradients are what is gathered."""

    sums: Sums | None
    b: Array | None
    """Of shape `(*batch, *rows, k)`. Its gradient is `G Ω`."""
    a: Array | None
    """Of shape `(*batch, l, *columns)`. Its gradient is `Ψᵀ G`."""


def list_measured(
    model: Any, filter: Any, exclude: Any, spec: Any, rank: Any
) -> list[Measured]:
    """The arrays that `lorax.loraify`, or with a spec `lorax.init_lora`, would adapt.

    **Raises:**

    `ValueError` as they do, and if one has an adapter or is complex.
    """
    places = Places(model)
    if spec is None:
        targets, _ = find_targets(model, places, filter, exclude)
        forms = resolve_forms(
            targets,
            rank=rank,
            alpha=None,
            rank_stabilised=False,
            sharding=None,
            method="lora",
        )
        found = [
            Measured(x.dotted, x, f.rows, f.columns, f.rank) for x, f in forms.items()
        ]
    else:
        found = _list_specified(model, places, filter, exclude, spec, rank)
    for one in found:
        node = one.place.node
        if is_weight(node):
            raise ValueError(
                f"{one.name} has an adapter. Calibrate the model without adapters, "
                "`lorax.unloraify(model)`, or leave it out, with `exclude`."
            )
        if jnp.issubdtype(node.dtype, jnp.complexfloating):
            raise ValueError(
                f"{one.name} is complex, and only real weights are calibrated. Leave "
                "it out, with `exclude`."
            )
    return found


def _list_specified(
    model: Any, places: Places, filter: Any, exclude: Any, spec: Any, rank: Any
) -> list[Measured]:
    if not (filter is None and exclude is None and rank is None):
        raise ValueError(
            "`spec` says by itself what is adapted, and with which rank: leave out "
            "`filter`, `exclude` and `rank`."
        )
    specs: dict[str, LoraSpec] = {}

    def note(path: str, x: Any, value: Any) -> Any:
        value = value if isinstance(value, LoraSpec) else LoraSpec(int(value))
        if value.rank > 0:
            specs[path] = value
        return x

    map_spec(note, model, spec, None)
    by_name = {place.dotted: place for place in places.all if place.path}
    found = []
    for name, value in specs.items():
        # An array that is the whole tree has no path.
        place = by_name.get(name, places.root)
        rows, columns = value.axes(place.node.ndim)
        found.append(Measured(name, place, rows, columns, value.rank, "rows"))
    if not found:
        raise ValueError("`spec` gives no rank to any parameter. Give one to some.")
    return found


def resolve_uses(
    measured: Sequence[Measured],
    watches: Mapping[str, Watch],
    needs_inputs: bool,
) -> list[Measured]:
    """Finds out which side of each array the model sums over.

    **Raises:**

    `ValueError`, naming the arrays, if there are some of which the inputs are not seen.
    """
    found, problems = [], []
    for one in measured:
        watch = watches[one.name]
        sides = sorted(watch.inputs)
        if len(sides) == 1:
            found.append(dataclasses.replace(one, inputs=sides[0]))
            continue
        if sides:
            reason = "multiplied from both sides, as a tied weight is"
        else:
            reason = ", ".join(watch.others) or "not used"
        is_lookup = not sides and "looked up in" in watch.others
        if needs_inputs or sides or not watch.others:
            problems.append(f"{one.name} is {reason}")
        found.append(dataclasses.replace(one, inputs="rows") if is_lookup else one)
    if problems:
        listed = list_some(problems, 5, separator="; ")
        hint = ""
        if PARTLY_SUMMED in listed:
            hint = ", or say by a `lorax.LoraSpec` which axes are rows and columns"
        raise ValueError(
            f"What `fn` does has no inputs to measure there: {listed}. Leave these "
            f"out, with `exclude`{hint}."
        )
    return found


def make_fixed(
    one: Measured, *, inputs: bool, gradients: bool, sketch: int | None, key: Any
) -> Fixed:
    """Draws the random matrices for an array."""

    def draw(name: str, sizes: tuple[int, ...], count: int) -> Any:
        shape = (*one.batch, math.prod(sizes), count)
        return draw_orthonormal(key, f"{one.name} {name}", shape, one.dtype)

    of_inputs = b = a = None
    if inputs and sketch is not None and sketch < math.prod(one.input_sizes):
        of_inputs = draw("inputs", one.input_sizes, sketch)
        of_inputs = of_inputs.reshape(*one.batch, *one.input_sizes, sketch)
    if gradients:
        rows, columns = one.sizes(one.rows), one.sizes(one.columns)
        right, left = count_columns(2 * one.rank, math.prod(rows), math.prod(columns))
        b = draw("b", rows, left).reshape(*one.batch, *rows, left)
        a = np.swapaxes(draw("a", columns, right), -1, -2)
        a = a.reshape(*one.batch, right, *columns)
    return Fixed(*jax.device_put((of_inputs, b, a)))


def make_zeros(one: Measured, fixed: Fixed, inputs: bool) -> Zeros:
    """The zeros whose gradients are taken."""
    sums = b = a = None
    batch, sizes, dtype = one.batch, one.input_sizes, one.dtype
    if inputs:
        others = sizes if fixed.sketch is None else fixed.sketch.shape[-1:]
        sums = Sums(
            jnp.zeros((*batch, 2), dtype),
            jnp.zeros((*batch, *sizes), dtype),
            jnp.zeros((*batch, *sizes, *others), dtype),
        )
    if fixed.a is not None and fixed.b is not None:
        right, left = fixed.a.shape[len(batch)], fixed.b.shape[-1]
        b, _ = factor_shapes(one.shape, one.rows, one.columns, right)
        _, a = factor_shapes(one.shape, one.rows, one.columns, left)
        b, a = jnp.zeros(b, dtype), jnp.zeros(a, dtype)
    return Zeros(sums, b, a)


def put_probes(
    model: Any,
    measured: Sequence[Measured],
    zeros: Mapping[str, Zeros],
    fixed: Mapping[str, Fixed],
) -> Any:
    """The model with probes, which computes what it did."""

    def probed(one: Measured) -> Callable[[Any], Any]:
        zero, random = zeros[one.name], fixed[one.name]

        def replace(w: Any) -> FactoredWeight:
            probe = Probe(
                w, zero.sums, random.sketch, one.rows, one.columns, one.inputs
            )
            if zero.b is None or zero.a is None:
                shapes = factor_shapes(one.shape, one.rows, one.columns, 1)
                return one.put(
                    probe, *(jnp.zeros(shape, one.dtype) for shape in shapes)
                )
            assert random.b is not None and random.a is not None
            # [0, Ψ] and [Ωᵀ; 0]: their product is zero.
            b = jnp.concatenate([zero.b, random.b], -1)
            a = jnp.concatenate([random.a, zero.a], len(one.batch))
            return one.put(probe, b, a)

        return replace

    return rebuild(model, {one.place.indices: probed(one) for one in measured})


def put_watches(
    model: Any, measured: Sequence[Measured]
) -> tuple[Any, dict[str, Watch]]:
    """The model with probes that are told how it uses its weights."""
    watches = {one.name: Watch() for one in measured}
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        one.place.indices: lambda _, one=one: one.watch(watches[one.name])
        for one in measured
    }
    return rebuild(model, edits), watches


def as_jax(tree: Any) -> Any:
    """`tree` with the arrays of NumPy as arrays of JAX."""
    return jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree
    )

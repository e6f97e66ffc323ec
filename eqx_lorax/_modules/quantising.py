"""Quantising the weights of a model, and going back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._bases import Axes, is_quantised, quantise_array, QuantisedArray
from .._factored import materialise, stands_for_array
from .._layers import is_layer
from .._methods import base_of, is_weight, LoraWeight
from .._shared import is_abstract, is_array, is_traced, list_some, to_shape
from .._trees import (
    exclude_places,
    Filter,
    list_available,
    match_filter,
    Place,
    Places,
    rebuild,
)
from .form import infer_axes
from .loftq import check_can_fit, fit_to_rounding
from .targets import find_targets, Target


_Model = TypeVar("_Model")


def quantise(
    model: _Model,
    filter: Filter = None,
    format: str = "nf4",
    *,
    block: int = 64,
    nested: bool = False,
    exclude: Filter = None,
    loftq: int = 0,
) -> _Model:
    """Stores weights of a model in few bits. They become `lorax.QuantisedArray`s, which
    are frozen. The model runs as before, on what these stand for, and `lorax.loraify`
    adapts it.

    !!! example

        ```python
        model = lorax.quantise(model, exclude="head")
        model = lorax.loraify(model, rank=8, key=key)
        ```

    **Arguments:**

    - `model`: Any pytree: a model with Equinox modules in it, or the parameters of a
        model of Flax or Haiku, which `lorax.lora(fn)` then runs.
    - `filter`: What is quantised, as in `lorax.loraify`. `None` is for every
        `equinox.nn.Linear` and convolution. In a tree without any module it is for
        every array of two axes or more.
    - `format`: How a weight is stored. `m` is the largest one in its block, or channel:
        - `"nf4"`: sixteen quantiles of the normal distribution times `m`, 0.5625 bytes
            a weight. Relative error 0.09 for normal weights.
        - `"fp4"`: floats of four bits times `m`; error 0.12.
        - `"int4"`: sixteen even steps from the smallest to the largest; 0.625 bytes,
            error 0.09.
        - `"int8"`: 255 even steps of `m / 127`, with one `m` for each output channel;
            one byte, error 0.008.
        - `"int8-block"`: the same with one `m` for each block; 1.0625 bytes, error
            0.006.

        In a tree without modules the outputs are the last axis, and axes before the
        last two number matrices.
    - `block`: The number of weights that share a scale, which is float32. Blocks go
        along the last axis, or, where it does not divide that, along the last axes
        together.
    - `nested`: Whether the scales are quantised too, to 8 bits in blocks of 256, as
        QLoRA's double quantisation: 0.516 bytes a weight with `"nf4"`.
    - `exclude`: A filter for what is not quantised.
    - `loftq`: For weights with plain LoRA the number of steps by which base and
        factors, together, come near to the weight. Each quantises what the factors
        leave, and then finds the factors that are nearest to what that has rounded
        away. So the base is one of this adapter's own. Of factors that do not start at
        zero, as those of `init="pissa"`, the last step quantises what they leave, which
        is QPiSSA. By default adapters stay as they are.

    **Returns:**

    The model. Linear layers and embeddings are of the same type as before and hold a
    `QuantisedArray` as their weight; other modules are run by a `lorax.LoraConv` or
    `lorax.LoraModule`, which passes for them. The base of an adapter that is there
    already is quantised beneath it. A weight has the sharding that it had. `model` is
    not changed, so its arrays are freed when it is.

    **Raises:**

    `ValueError` or `TypeError`, before anything is done, if any part of a filter names
    nothing, if there is no such format, if the block does not divide a weight, or a row
    of a table, or would lie across shards, or if a weight is quantised already or of
    another dtype than float64, float32, bfloat16 or float16. `ValueError` if a weight
    is not finite.

    ??? cite

        [QLoRA: Efficient Finetuning of Quantized LLMs](https://arxiv.org/abs/2305.14314),
        section 3, for `"nf4"` and `nested`;
        [LLM.int8()](https://arxiv.org/abs/2208.07339), section 2, for `"int8"`;
        [LoftQ](https://arxiv.org/abs/2310.08659), algorithm 1, and
        [PiSSA](https://arxiv.org/abs/2404.02948), section 4, for `loftq`.
    """
    places = Places(model)
    targets: list[Target] = []
    nodes = [place.node for place in places.all if not place.is_array]
    if any(isinstance(node, eqx.Module) for node in nodes):
        targets, _ = find_targets(model, places, filter, exclude, verb="quantise")
        arrays = [array for target in targets for array in target.arrays]
        axes = {array: _find_axes(array, target) for target, array in _pair(targets)}
    else:
        arrays = _find_bare(model, places, filter, exclude)
        # As elsewhere, the last two axes of an unknown array are a matrix.
        axes = {
            array: Axes((-1,), tuple(range(-len(array.node.shape), -2)))
            for array in arrays
        }
    _check_plain(arrays)

    def make(array: Place, like: Any) -> Any:
        return quantise_array(
            like,
            format,
            block=block,
            nested=nested,
            axes=axes[array],
            name=array.dotted,
        )

    bases = {array: base_of(array.node) for array in arrays}
    # All errors come before anything is done, and together.
    planned, wrong = {}, []
    lookups = {array for target, array in _pair(targets) if target.layer.is_lookup}
    for array in arrays:
        try:
            planned[array] = make(array, to_shape(bases[array]))
            if array in lookups:
                _check_rows(array, planned[array], block)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        # Some are the same for all weights, such as an unknown format.
        raise ValueError(list_some(dict.fromkeys(wrong), separator=" "))
    fitted = _fit(arrays, make, loftq)
    # One array in several places is quantised once.
    made: dict[Any, Any] = {}
    new = {array: weight.w for array, weight in fitted.items()}
    for array in arrays:
        if array in fitted:
            continue
        key = (id(bases[array]), axes[array])
        if key not in made:
            made[key] = make(array, bases[array])
        new[array] = made[key]
    _check_finite(new)
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        array.indices: lambda node, base=base: _with_base(node, base)
        for array, base in new.items()
    }
    edits |= {
        array.indices: lambda _, weight=weight: weight
        for array, weight in fitted.items()
    }
    for target in targets:
        if not (is_layer(target.place.node) or target.layer.takes_quantised):
            edits[target.place.indices] = target.layer
    return rebuild(model, edits)


def _fit(
    arrays: Sequence[Place], make: Callable[[Place, Any], QuantisedArray], steps: Any
) -> dict[Place, LoraWeight]:
    """The weights whose factors are fitted to what is rounded away."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"`loftq={steps!r}` must be a number of steps, such as 5.")
    adapted = [array for array in arrays if is_weight(array.node)]
    if not steps:
        return {}
    if not adapted:
        raise ValueError(
            f"`loftq={steps}` fits adapters, and no array that is named has one. Call "
            "`lorax.loraify` first."
        )
    for array in adapted:
        check_can_fit(array)
    return {
        array: fit_to_rounding(array, functools.partial(make, array), int(steps))
        for array in adapted
    }


def dequantise(model: _Model) -> _Model:
    """Replaces quantised arrays by plain ones, also beneath adapters.

    !!! example

        ```python
        model = lorax.dequantise(quantised)
        ```

    **Arguments:**

    - `model`: What `lorax.quantise` returned, or any pytree with quantised arrays.

    **Returns:**

    The model with the types and dtypes from before `lorax.quantise`. The arrays are
    those that the quantised ones stand for: what was rounded stays rounded.

    **Raises:**

    `ValueError` if nothing is quantised.
    """
    places = Places(model)
    arrays = [
        place
        for place in places.all
        if place.is_array and stands_for_array(base_of(place.node))
    ]
    if not arrays:
        raise ValueError("`model` has no quantised arrays. Was it dequantised before?")
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: lambda node: _with_base(node, _form_array(base_of(node)))
        for place in arrays
    }
    for place in places.all:
        if is_layer(place.node):
            edits[place.indices] = settle_layer
    return rebuild(model, edits)


def settle_layer(layer: Any) -> Any:
    """The module in a layer, without the layer if it runs by itself: if there is
    neither an adapter in it nor a quantised array that its code cannot take."""
    held = jax.tree.leaves(layer.wrapped, is_leaf=stands_for_array)
    if any(map(is_weight, held)):
        return layer
    kind = type(layer)
    if any(map(stands_for_array, held)) and not kind.takes_quantised:
        # Without dropout, which is for the low-rank branch.
        return kind(layer.wrapped) if kind.has_dropout and layer.dropout else layer
    return layer.wrapped


def _pair(targets: Sequence[Target]) -> list[tuple[Target, Place]]:
    return [(target, array) for target in targets for array in target.arrays]


def _find_axes(array: Place, target: Target) -> Axes:
    rows, columns = infer_axes(array)
    every = range(-len(array.node.shape), 0)
    batch = tuple(axis for axis in every if axis not in (*rows, *columns))
    return Axes(rows, batch)


def _find_bare(
    model: Any, places: Places, filter: Filter, exclude: Filter
) -> list[Place]:
    """The arrays that are named in a tree of parameters."""
    if filter is None:
        found = [place for place in places.all if _could_be_quantised(place)]
    else:
        parts = match_filter(model, places, filter, "filter", _could_be_quantised)
        covered = [list(part.find_covered(places)) for part in parts]
        for part, inside in zip(parts, covered):
            if not any(map(_could_be_quantised, inside)):
                raise ValueError(
                    f"{part.label} names nothing of two axes or more. Available: "
                    f"{list_available(places, _could_be_quantised)}."
                )
        named = {place for inside in covered for place in inside}
        found = [x for x in places.all if x in named and _could_be_quantised(x)]
    if not found:
        raise ValueError(
            "There is nothing to quantise: no array of real floats of two axes or more."
        )
    return exclude_places(model, places, exclude, found, _could_be_quantised)


def _could_be_quantised(place: Place) -> bool:
    if not place.is_array or len(place.node.shape) < 2 or 0 in place.node.shape:
        return False
    return jnp.issubdtype(place.node.dtype, jnp.floating)


def _check_plain(arrays: Sequence[Place]) -> None:
    done = [x.dotted for x in arrays if stands_for_array(base_of(x.node))]
    if done:
        raise ValueError(
            f"{list_some(done)} is quantised already. Leave it out with `exclude`, or "
            "go back first, with `lorax.dequantise(model)`."
        )
    missing = [x.dotted for x in arrays if not is_array(base_of(x.node))]
    if missing:
        raise ValueError(
            f"{list_some(missing)} has no base: this is an adapter alone. Pass "
            "`lorax.combine(params, frozen)`."
        )


def _check_rows(table: Place, planned: QuantisedArray, block: int) -> None:
    """Checks that no block goes over the end of a row, as rows are looked up."""
    if len(planned.inner) == 1:
        return
    row = table.node.shape[-1]
    fits = next((x for x in range(block - block % 2, 0, -2) if row % x == 0), None)
    fix = f"`block={fits}` or " if fits else ""
    raise ValueError(
        f"`block={block}` does not divide the {row} entries of a row of "
        f"{table.dotted}, of shape {tuple(table.node.shape)}, and rows are looked up "
        f'in it. Pass {fix}`format="int8"`, or leave it out with `exclude`.'
    )


def _check_finite(arrays: dict[Place, Any]) -> None:
    bad = []
    for place, array in arrays.items():
        scales = array.scales.scales if is_quantised(array.scales) else array.scales
        if isinstance(scales, jax.Array) and not is_traced(scales):
            if not np.asarray(jax.device_get(jnp.isfinite(scales).all())):
                bad.append(place.dotted)
    if bad:
        raise ValueError(
            f"{list_some(bad)} has values that are not finite, and nothing was "
            "quantised. Look for NaN or overflow in the model as it was loaded."
        )


def _with_base(node: Any, base: Any) -> Any:
    if not is_weight(node):
        return base
    return node.with_base(_with_base(node.w, base))


def _form_array(base: Any) -> Any:
    return jax.eval_shape(_form, base) if is_abstract(base) else _form(base)


_form = jax.jit(materialise)

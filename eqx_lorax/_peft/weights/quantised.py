"""Quantised arrays in the places of arrays: filled layer by layer, so that no stack of
all layers is ever there in full."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapters import AdapterFileError
from ..._bases import (
    Axes,
    Format,
    FORMATS,
    is_quantised,
    quantise_array,
    QuantisedArray,
)
from ..._factored import stands_for_array
from ..._modules import quantise
from ..._shared import committed_sharding, is_array, place_array, to_shape
from ..._trees import Places, rebuild
from .files import Checkpoint
from .pairing import Slot


_Model = TypeVar("_Model")

ReadPart = Callable[[Checkpoint, Slot, tuple[int, ...] | None], np.ndarray]
"""Reads one layer of a stack, at the given position in it, or all."""


def with_quantised_places(model: _Model, options: str | Mapping[str, Any]) -> _Model:
    """The model with abstract quantised arrays in the places of those that
    `lorax.quantise` would choose. Other arrays are the same objects."""
    if isinstance(options, str):
        options = {"format": options}
    before = {x.path: x.node for x in Places(model).all if is_array(x.node)}
    abstract = jax.tree.map(
        lambda x: to_shape(x) if is_array(x) else x, model, is_leaf=stands_for_array
    )
    chosen = quantise(abstract, **options)
    edits = {
        place.indices: lambda _, x=before[place.path]: x
        for place in Places(chosen).all
        if is_array(place.node)
    }
    return rebuild(chosen, edits)


def read_quantised(checkpoint: Checkpoint, slot: Slot, read_part: ReadPart) -> Any:
    """The quantised array of a slot, of the format of the one that is there."""
    like: QuantisedArray = slot.place.node
    if like.format not in FORMATS.values():
        raise ValueError(
            f"{slot.place.dotted} is of the format {like.format.name!r}, to which "
            "nothing is quantised. Load into the model from before, or pass "
            f"`quantise=` with one of {', '.join(map(repr, FORMATS))}."
        )
    axes, is_divided = _find_axes(like, slot.depth)
    encode = _make_encoder(
        like.format, like.block, is_quantised(like.scales), axes, slot.place.dotted
    )
    leaves, structure = jax.tree.flatten(like)
    made = [np.empty(x.shape, x.dtype) for x in leaves]
    parts = slot.tensors if is_divided else (((), slot.tensors[0][1]),)
    for position, name in parts:
        part = read_part(checkpoint, slot, position if is_divided else None)
        encoded = jax.device_get(jax.tree.leaves(encode(jax.device_put(part))))
        if not all(np.isfinite(x).all() for x in encoded if x.dtype != np.uint8):
            raise AdapterFileError(
                f"{checkpoint.path}: {name} has values that are not finite, and cannot "
                "be quantised. Leave it out by `exclude`."
            )
        for whole, x in zip(made, encoded):
            whole[position] = x
    placed = [place_array(x, committed_sharding(y)) for x, y in zip(made, leaves)]
    return structure.unflatten(placed)


def _find_axes(like: QuantisedArray, depth: int) -> tuple[Axes, bool]:
    """What the axes of the array were when it was quantised, and whether the layers of
    a stack of `depth` axes can be quantised one by one."""
    stored, leading = like.stored_axes, like.ndim - len(like.inner)
    batch = leading
    if is_quantised(like.scales):
        batch = like.scales.ndim - len(like.scales.inner)
    logical = [stored.index(i - like.ndim) - like.ndim for i in range(leading)]
    if not is_quantised(like.scales):
        # All that lead have scales of their own, whatever they are.
        return Axes(tuple(logical)), _is_first(stored, depth) and depth <= leading
    axes = Axes(tuple(logical[batch:]), tuple(logical[:batch]))
    return axes, _is_first(stored, depth) and depth <= batch


def _is_first(stored: tuple[int, ...], depth: int) -> bool:
    ndim = len(stored)
    return stored[:depth] == tuple(range(-ndim, depth - ndim))


@functools.lru_cache(maxsize=256)
def _make_encoder(
    format: Format, block: int, nested: bool, axes: Axes, name: str
) -> Callable[[np.ndarray], QuantisedArray]:
    def encode(w: jax.Array) -> QuantisedArray:
        kept = tuple(x for x in axes.batch if x >= -w.ndim)
        outputs = tuple(x for x in axes.outputs if x >= -w.ndim)
        return quantise_array(
            w,
            format,
            block=block,
            nested=nested,
            axes=Axes(outputs, kept),
            name=name,
        )

    return jax.jit(encode)


def is_number(node: Any) -> bool:
    """Whether this is an array of floats, or stands for one."""
    is_one = is_array(node) or stands_for_array(node)
    return is_one and jnp.issubdtype(node.dtype, jnp.inexact)

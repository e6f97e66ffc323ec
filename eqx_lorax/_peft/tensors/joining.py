"""Factors read from a file, and the layers of a stack joined to one weight."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._adapters import DetachedWeight
from ..._modules import infer_axes
from ..._shared import accumulation_dtype, promote
from ..._trees import Place
from ..config import find_alpha, find_rank
from ..pytorch import Index
from .counterparts import Counterpart
from .layout import Factors, Layout, MAGNITUDE, warn_of_convolution
from .versions import resolve_layout


OTHER_MODEL = (
    "The file is for a model with other sizes, or `names` leads to another layer."
)


def list_names(config: Mapping[str, Any], layout: Layout) -> tuple[str, ...]:
    """The names of the tensors of one layer: two factors and, of DoRA, the
    magnitude."""
    return (*layout.names, MAGNITUDE) if config.get("use_dora") else layout.names


def read_factors(
    config: Mapping[str, Any],
    path: str,
    counterpart: Counterpart,
    first: np.ndarray,
    second: np.ndarray,
    magnitude: np.ndarray | None = None,
) -> Factors:
    """The factors here of the tensors at `path`.

    **Raises:**

    `ValueError` if they do not fit the array here, or have another rank than the
    configuration says.
    """
    warn_of_convolution(counterpart.place)
    layout = resolve_layout(config, path, counterpart, first, second)
    try:
        b, a = layout.from_torch(first, second)
    except ValueError as error:
        raise ValueError(
            f"{path}, of shapes {first.shape} and {second.shape}: {error}."
        ) from error
    rank = layout.torch_rank(b.shape[-1])
    if (b.shape, a.shape) != counterpart.factor_shapes(b.shape[-1]):
        raise ValueError(
            f"{path} has factors {first.shape} and {second.shape}, which do not fit "
            f"the weight {counterpart.shape} at {counterpart.dotted}. {OTHER_MODEL}"
        )
    if rank != find_rank(config, path):
        raise ValueError(
            f"{path} has rank {rank}, but {find_rank(config, path)} in the "
            "configuration."
        )
    if magnitude is not None:
        magnitude = _read_magnitude(path, counterpart, magnitude)
    return Factors(
        b,
        a,
        find_alpha(config, path),
        bool(config.get("use_rslora")),
        rank,
        magnitude,
        layout.outputs,
    )


def _read_magnitude(
    path: str, counterpart: Counterpart, magnitude: np.ndarray
) -> np.ndarray:
    layout = counterpart.layout
    if problem := layout.refuse_dora():
        raise ValueError(f"{path}: {problem}.")
    rows, columns = infer_axes(counterpart.place)
    (axis,) = rows if layout.outputs == "rows" else columns
    flat = magnitude.reshape(-1)
    wanted = (counterpart.shape[axis],)
    if flat.shape != wanted or magnitude.shape != layout.magnitude_to_torch(flat).shape:
        raise ValueError(
            f"{path}.{MAGNITUDE} has shape {magnitude.shape}, and the weight "
            f"{counterpart.shape} at {counterpart.dotted} has {wanted[0]} outputs. "
            f"{OTHER_MODEL}"
        )
    return flat


def join_layers(
    place: Place, parts: Mapping[Index, Factors], dropout: float
) -> DetachedWeight:
    """One weight here from the layers that it stacks. Layers without an adapter get
    factors of zeros, smaller ranks are padded with zeros, and other scales are
    multiplied into `b`."""
    depth = len(next(iter(parts)))
    stack = place.node.shape[:depth]
    rows, columns = infer_axes(place)
    like = max(parts.values(), key=lambda part: part.rank)
    dtypes = [
        promote(*(getattr(x, name).dtype for x in parts.values())) for name in "ba"
    ]
    zeros = np.zeros_like(like.b, dtypes[0]), np.zeros_like(like.a, dtypes[1])
    of_stack = [
        _match_scale(like, parts[index], columns) if index in parts else zeros
        for index in np.ndindex(*stack)
    ]
    b, a = (
        np.stack([x.astype(dtype) for x in arrays]).reshape(*stack, *arrays[0].shape)
        for arrays, dtype in zip(zip(*of_stack), dtypes)
    )
    weight = DetachedWeight(
        path=place.path,
        method="lora",
        shape=tuple(place.node.shape),
        dtype=jnp.dtype(place.node.dtype).name,
        settings={
            "alpha": like.alpha_for(like.rank, like.rank_stabilised),
            "rows": rows,
            "columns": columns,
            "rank_stabilised": like.rank_stabilised,
        },
        dropout=dropout,
        arrays={"b": b, "a": a},
    )
    if like.magnitude is None:
        return weight
    return dataclasses.replace(
        weight,
        method="dora",
        settings=weight.settings
        | dict(outputs=like.outputs, is_relative=False, b_start=None, a_start=None),
        arrays=weight.arrays | {"magnitude": _join_magnitudes(place, parts, stack)},
    )


def _join_magnitudes(
    place: Place, parts: Mapping[Index, Factors], stack: Sequence[int]
) -> np.ndarray:
    """The magnitudes of all layers; that of a layer without an adapter is the norm of
    its base."""
    outputs = next(iter(parts.values())).outputs
    rows, columns = infer_axes(place)
    inputs = columns if outputs == "rows" else rows

    def of_layer(index: Index) -> np.ndarray:
        if index in parts:
            magnitude = parts[index].magnitude
            assert magnitude is not None
            return magnitude
        base = np.asarray(jax.device_get(place.node[index]))
        return np.sqrt(np.square(base.astype(np.float64)).sum(inputs))

    magnitudes = [of_layer(index) for index in np.ndindex(*stack)]
    dtype = promote(*(of_layer(index).dtype for index in parts))
    return np.stack(magnitudes).astype(dtype).reshape(*stack, -1)


def _match_scale(
    like: Factors, part: Factors, columns: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """`(b, a)` of `part`, changed to have the rank and the scale of `like`."""
    b, a = part.b, part.a
    if part.scale != like.scale:
        b = (b.astype(accumulation_dtype(b.dtype)) * (part.scale / like.scale)).astype(
            b.dtype
        )
    more, axis = like.rank - part.rank, a.ndim - 1 - len(columns)
    b = np.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, more)])
    return b, np.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)])

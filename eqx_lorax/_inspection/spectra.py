"""The singular values of what adapters have learned."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._arithmetic import (
    as_matrices,
    decompose,
    dense_base,
    dense_update,
    fold,
    split_layers,
)
from .._factored import Factored, is_factored
from .._methods import check_whole, is_weight, unfuse
from .._shared import follow, PyTree
from .._trees import Place, Places
from .spectrum import Spectra, TargetSpectrum


_LEADING = 10


def spectra(
    model: PyTree,
    *,
    intruders: bool | int = False,
    threshold: float = 0.5,
    progress: bool | None = None,
) -> Spectra:
    """The singular values of the update of each adapted weight, its size relative to
    the base, and where it has turned the leading directions of the weight elsewhere.

    They tell whether the rank was too small (the values are flat to the end), too large
    (the last ones are close to zero), and where it was wasted.

    The singular values come from QR decompositions of the factors, and take
    milliseconds for a weight. Nothing dense is formed, and of the base only its norm is
    computed. Where a method scales its base, as DoRA and IA³ do, the update has no
    factors, and takes the decomposition of a dense matrix, for one layer at a time.

    Intruders take the full decompositions of the base and of the merged weight, one
    layer at a time: minutes for each matrix of `4096 × 4096` on a CPU, and the memory
    of about six of it in float32. Look at a few layers, by a part of the model.

    !!! example

        ```python
        print(lorax.spectra(model))
        lorax.spectra(model).plot("spectra.png")
        ```

    **Arguments:**

    - `model`: A model with adapters of any method, or a tree of parameters of
        `lorax.init_lora`. Each layer of a stack has a spectrum of its own. Adapters on
        top of adapters are one update.
    - `intruders`: Whether to count intruder dimensions among the 10 leading left
        singular vectors of the merged weight, or among how many. One is an intruder if
        its cosine similarity with each left singular vector of the base is below the
        `threshold`; those of singular values that are zero do not count. *Left* is the
        side of the rows: for a linear layer that of its outputs.
    - `threshold`: The similarity below which a direction is an intruder.
    - `progress`: Whether to show a progress bar, which needs `tqdm`. By default there
        is one on terminals where `tqdm` is installed, if intruders are counted.

    **Returns:**

    A `lorax.Spectra`. As a string it is a table, and it has a `plot`.

    **Raises:**

    `ValueError` if there is no adapter, if `model` is a part of `lorax.partition` or
    has no numbers (inside `jax.jit`, or abstract), or if an argument is out of range.

    ??? cite

        Shuttleworth et al., [LoRA vs Full Fine-tuning: An Illusion of
        Equivalence](https://arxiv.org/abs/2410.21228), 2024, for intruder dimensions;
        Roy and Vetterli, *The effective rank: a measure of effective dimensionality*,
        2007.
    """
    check_whole(model, "lorax.spectra({})")
    leading = _LEADING if intruders is True else int(intruders)
    if leading < 0:
        raise ValueError(
            f"`intruders={intruders}` must be `True`, or the number of leading "
            "directions that are looked at."
        )
    if not 0 < threshold <= 1:
        raise ValueError(
            f"`threshold={threshold}` must be a cosine similarity, above 0 and at most "
            "1, such as 0.5."
        )
    places = [place for place in Places(model).all if is_weight(place.node)]
    _check_numbers(places)
    progress = False if progress is None and not leading else progress
    bar = follow(places, progress, title="Decomposing", unit="weight")
    found = [x for place in bar for x in _measure_target(place, leading, threshold)]
    return Spectra(tuple(found))


def _check_numbers(places: list[Place]) -> None:
    if not places:
        raise ValueError(
            "`model` has no adapters to look into. Pass a model that went through "
            "`lorax.loraify`, or parameters of `lorax.init_lora`."
        )
    leaves = jax.tree.leaves([place.node for place in places])
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves):
        raise ValueError(
            "`model` has shapes in the place of numbers. Call `lorax.spectra(model)` "
            "on a model with arrays, outside of `jax.jit`."
        )


def _measure_target(
    place: Place, leading: int, threshold: float
) -> Iterator[TargetSpectrum]:
    form = unfuse(place.node).factored()
    folded = fold(form)
    form = form if folded is None else folded
    for index, layer in split_layers(form, place.dotted):
        found = jax.device_get(_measure(layer, leading))
        values, base_norm, base_values, similarities = found
        rows, columns = jax.eval_shape(dense_base, layer).shape
        norm = float(np.linalg.norm(values))
        yield TargetSpectrum(
            path=place.dotted,
            layer=index,
            shape=(rows, columns),
            rank=len(values),
            values=tuple(map(float, values)),
            size=_ratio(norm, float(base_norm)),
            spectral_size=_ratio(float(values[0]), float(base_values[0]))
            if leading
            else None,
            similarities=tuple(map(float, similarities)) if leading else None,
            intruders=int(np.sum(similarities < threshold)) if leading else None,
        )


def _ratio(x: float, y: float) -> float:
    return x / y if y else float("inf") if x else 0.0


@functools.partial(jax.jit, static_argnums=1)
def _measure(layer: Factored, leading: int) -> Any:
    """The singular values of the update, the norm of the base and, if directions are
    looked at, its singular values and the similarities."""
    with jax.default_matmul_precision("highest"):
        base = dense_base(layer)
        values = _singular_values(layer)
        found = values, jnp.linalg.norm(base)
        if not leading:
            return *found, None, None
        left, base_values, _ = jnp.linalg.svd(base, full_matrices=False)
        update = dense_update(layer)
        merged, _, _ = jnp.linalg.svd(base + update.astype(base.dtype), False)
        cosines = jnp.abs(jnp.conj(left.T) @ merged[:, :leading])
        # Where the base has no full rank, its last directions are arbitrary.
        noise = max(base.shape) * jnp.finfo(base.dtype).eps * base_values[0]
        known = jnp.where((base_values > noise)[:, None], cosines, 0)
        return *found, base_values, jnp.max(known, axis=0)


def _singular_values(layer: Factored) -> Array:
    if layer.gain is not None or is_factored(layer.base):
        return jnp.linalg.svd(dense_update(layer), compute_uv=False)
    if layer.rank == 0:
        return jnp.zeros(1)
    _, core, _ = decompose(*as_matrices(layer.without_gate()))
    return jnp.abs(layer.scale) * jnp.linalg.svd(core, compute_uv=False)

"""Starts of adapters from data."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._methods import AbstractStart
from .probe import Side
from .records import GradientRecord, InputRecord


Direction: TypeAlias = Literal["ArB2r", "A2rBr", "ArBr"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Eva(AbstractStart):
    """See `lorax.Calibration.eva`."""

    inputs: Mapping[str, InputRecord]
    centred: bool

    changes_base = False

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        record = find_record(self.inputs, fresh, "inputs")
        fresh = orient(fresh, record.side)
        _, vectors, _ = record.spectrum(self.centred)
        check_rank(fresh, vectors.shape[-2], "`sketch`")
        right = vectors[..., : fresh.rank, :]
        *batch, outputs, _ = fresh.matrix_shape
        return fresh.to_factors(jnp.zeros((*batch, outputs, fresh.rank)), right)

    def __repr__(self) -> str:
        return "calibration.eva()"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corda(AbstractStart):
    """See `lorax.Calibration.corda`."""

    inputs: Mapping[str, InputRecord]
    mode: Literal["ipm", "kpm"]

    changes_base = True

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        record = find_record(self.inputs, fresh, "inputs")
        fresh = orient(fresh, record.side)
        count = min(fresh.matrix_shape[-2:])
        first = 0 if self.mode == "ipm" else count - fresh.rank
        left, right = _find_corda(
            fresh.matrices(), record.covariance(), first, fresh.rank, fresh.scale
        )
        return fresh.to_factors(left, right)

    def __repr__(self) -> str:
        return f"calibration.corda({self.mode!r})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoraGa(AbstractStart):
    """See `lorax.Calibration.lora_ga`."""

    gradients: Mapping[str, GradientRecord]
    gamma: float
    direction: Direction

    changes_base = True

    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        record = find_record(self.gradients, fresh, "gradients")
        fresh = orient(fresh, record.side)
        u, _, v = record.decompose()
        rank = fresh.rank
        if v.shape[-2] < 2 * rank:
            *_, outputs, inputs = fresh.matrix_shape
            if 2 * rank > min(outputs, inputs):
                fix = f"Give it a rank of {min(outputs, inputs) // 2} or less"
            else:
                fix = f"Calibrate with `rank={rank}`"
            raise ValueError(
                f"LoRA-GA needs {2 * rank} directions of the gradient for the rank "
                f"{rank} of {fresh.name}, and there are {v.shape[-2]}. {fix}."
            )
        of_a, of_b = {
            "ArB2r": (slice(0, rank), slice(rank, 2 * rank)),
            "A2rBr": (slice(rank, 2 * rank), slice(0, rank)),
            "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        }[self.direction]
        outputs = fresh.matrix_shape[-2]
        size = outputs**0.25 / self.gamma**0.5
        return fresh.to_factors(size * u[..., of_b], size * v[..., of_a, :])

    def __repr__(self) -> str:
        return "calibration.lora_ga()"


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _find_corda(
    w: Array, covariance: Array, first: int, rank: int, scale: float
) -> tuple[Array, Array]:
    """Two factors whose product, times `scale`, is the part of `w` with the singular
    values of `w C` from the one numbered `first` on."""
    values, vectors = jnp.linalg.eigh(covariance.astype(w.dtype))
    values = jnp.maximum(values, 0)
    # As in PEFT a hundredth of the mean is added. The unit of the inputs, which would
    # be that of the factors, is taken out.
    mean = jnp.mean(values, -1, keepdims=True)
    values = values / jnp.where(mean == 0, 1, mean) + 0.01
    with jax.default_matmul_precision("highest"):
        # A rotation after it leaves singular values and left vectors as they are.
        u, s, v = jnp.linalg.svd(
            (w @ vectors) * values[..., None, :], full_matrices=False
        )
        v = (v / values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
    chosen = slice(first, first + rank)
    root = jnp.sqrt(s[..., chosen] / scale)
    return u[..., chosen] * root[..., None, :], root[..., :, None] * v[..., chosen, :]


def find_record(records: Mapping[str, Any], fresh: Any, kind: str) -> Any:
    """What is known of the array.

    **Raises:**

    `ValueError`, with the fix, if nothing is, or if it has other axes now.
    """
    if fresh.name not in records:
        known = f"; of {', '.join([*records][:5])} there are" if records else ""
        raise ValueError(
            f"There are no {kind} of {fresh.name} in this calibration{known}. Pass "
            "the filter of `lorax.loraify` to `lorax.calibrate` too, with "
            f"`gather={kind!r}` or both; or leave it out, with `exclude`."
        )
    record = records[fresh.name]
    rows, columns = orient(fresh, "columns").matrix_shape[-2:]
    batch = fresh.matrix_shape[:-2]
    if kind == "inputs":
        side = columns if record.side == "columns" else rows
        now, then = (*batch, side), record.total.shape
    else:
        now = (*batch, rows, columns)
        then = (*record.right.shape[:-1], record.left.shape[-1])
    if now != then:
        raise ValueError(
            f"{fresh.name} was calibrated with other axes: {then} then, {now} now. "
            "Pass the `rank` or `spec` that says which axes are rows and columns to "
            "`lorax.calibrate` too."
        )
    return record


def orient(fresh: Any, side: Side) -> Any:
    """`fresh` with the side that the model sums over as its inputs."""
    return dataclasses.replace(
        fresh, outputs="rows" if side == "columns" else "columns"
    )


def check_rank(fresh: Any, count: int, argument: str) -> None:
    """**Raises:**

    `ValueError` if the rank is larger than the number of directions.
    """
    if fresh.rank > count:
        raise ValueError(
            f"The rank {fresh.rank} of {fresh.name} is above the {count} directions "
            f"that were kept. Calibrate with a larger {argument}, or without one."
        )

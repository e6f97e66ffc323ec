"""Ranks from the spectra of trained adapters."""

import math

import numpy as np

from .._calibration import share_out
from .spectrum import Spectra, TargetSpectrum


def allocate_ranks(
    spectra: Spectra,
    *,
    threshold: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    min_rank: int = 1,
) -> dict[str, int]:
    """Ranks for the next run, from what adapters have learned in this one: by a
    threshold on the singular values of each update, or for a budget.

    !!! example

        ```python
        ranks = lorax.allocate_ranks(lorax.spectra(trained), threshold=0.05)
        model = lorax.loraify(model, list(ranks), rank=ranks, key=key)
        ```

    No rank is above the present one. For ranks before any training see
    `lorax.Calibration.allocate_ranks`.

    **Arguments:**

    - `spectra`: The spectra of the updates, from `lorax.spectra`.
    - `threshold`: A weight keeps the directions whose singular value is at least so
        much of its largest, above 0 and at most 1. Of the layers of a stack, the one
        that keeps most counts.
    - `budget`: In the place of a threshold: the sum of all ranks. The directions with
        the largest singular values, relative to the norm of the base, come first. A
        stack counts once for each of its layers, which have the same rank.
    - `max_rank`: The largest rank of any weight. By default there is no limit but the
        present rank.
    - `min_rank`: The smallest rank. With 0, weights may get none; they are then not in
        the result.

    **Returns:**

    The rank for each weight, by its path: what `rank=` of `lorax.loraify` takes. The
    keys are a filter for just these weights.

    **Raises:**

    `ValueError` if not just one of `threshold` and `budget` is given, or if an argument
    is out of range.
    """
    if (threshold is None) == (budget is None):
        raise ValueError(
            f"`threshold={threshold}` and `budget={budget}`: give one of the two, such "
            "as `threshold=0.05`."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(
            f"`threshold={threshold}` must be above 0 and at most 1: a part of the "
            "largest singular value of each weight."
        )
    layers: dict[str, list[TargetSpectrum]] = {}
    for target in spectra.targets:
        layers.setdefault(target.path, []).append(target)
    most = max_rank
    if most is None:
        most = max(target.rank for target in spectra.targets)
    if budget is not None:
        values = {
            path: np.stack([_relate(target) ** 2 for target in targets])
            for path, targets in layers.items()
        }
        return share_out(values, budget, most, min_rank)
    assert threshold is not None
    ranks = {}
    for path, targets in layers.items():
        kept = max(_count(target, threshold) for target in targets)
        ranks[path] = min(max(kept, min_rank), most, targets[0].rank)
    return {path: rank for path, rank in ranks.items() if rank}


def _count(target: TargetSpectrum, threshold: float) -> int:
    """How many singular values are at least so much of the largest."""
    largest = max(target.values, default=0.0)
    return sum(value >= threshold * largest > 0 for value in target.values)


def _relate(target: TargetSpectrum) -> np.ndarray:
    """The singular values, relative to the norm of the base."""
    values = np.array(target.values)
    norm = np.linalg.norm(values)
    # A base of zeros counts as any other.
    size = target.size if math.isfinite(target.size) else 1.0
    return values / norm * size if norm else values

"""The allocation of ranks to weights."""

import math
from collections.abc import Mapping

import numpy as np


def share_out(
    values: Mapping[str, np.ndarray], budget: int, max_rank: int | None, min_rank: int
) -> dict[str, int]:
    """Ranks whose sum is at most `budget`, the largest values first.

    **Arguments:**

    - `values`: For each path the value of each component, of shape
        `(*batch, components)`, the largest first. Layers of a stack have the same rank,
        which counts once for each.
    """
    costs = {name: math.prod(x.shape[:-1]) for name, x in values.items()}
    if max_rank is None:
        max_rank = max(min_rank, round(2 * budget / sum(costs.values())))
    _check_limits(budget, max_rank, min_rank, sum(costs.values()))
    left, ranks, waiting = budget, {}, []
    for name, of_layers in values.items():
        each = np.asarray(of_layers, np.float64)
        each = each.reshape(-1, each.shape[-1]).mean(0)[:max_rank]
        ranks[name] = min(min_rank, len(each))
        left -= ranks[name] * costs[name]
        waiting += [(-x, len(waiting), name) for x in each[ranks[name] :]]
    closed: set[str] = set()
    for _, _, name in sorted(waiting):
        # Components of one weight come in their order, so none is left out before
        # another of the same weight.
        if name in closed or costs[name] > left:
            closed.add(name)
            continue
        ranks[name] += 1
        left -= costs[name]
    return {name: rank for name, rank in ranks.items() if rank}


def _check_limits(budget: int, max_rank: int, min_rank: int, layers: int) -> None:
    if not 0 <= min_rank <= max_rank or max_rank < 1:
        raise ValueError(
            f"`min_rank={min_rank}` and `max_rank={max_rank}` must be in this order, "
            "and the second from 1."
        )
    if budget < max(1, min_rank * layers):
        raise ValueError(
            f"`budget={budget}` is the sum of all ranks, and {layers} layers of at "
            f"least rank {min_rank} need {max(1, min_rank * layers)}. Raise it, or "
            "pass a smaller `min_rank`."
        )

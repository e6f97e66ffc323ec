"""When a product forms the sum of base and update."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._shared import accumulation_dtype
from .form import Factored


def choose_fusing(
    weight: Factored, x: Array, summed: Sequence[int], least_size: int = 0
) -> float | None:
    """From how many tokens on a product with `x` over these axes of the base forms the
    sum once, on a CPU; 0 for always, everywhere, and `None` for never. A base of fewer
    entries than `least_size` never does by itself.

    Cast to a narrow dtype the sum would lose small updates. That also keeps it from
    devices that multiply float32 in a narrower dtype, unless it is asked for.
    """
    if weight.fuses is False or x.dtype != accumulation_dtype(x.dtype):
        return None
    if weight.fuses:
        return 0.0
    arrays = [y for y in (weight.b, weight.a, weight.gate) if y is not None]
    is_simple = (
        jax.default_backend() == "cpu"
        and weight.gain is None
        and weight.rank > 0
        and math.prod(weight.base.shape) >= least_size
        and not weight.batch_axes()
        and sorted(summed) in (sorted(weight.rows), sorted(weight.columns))
        and jnp.issubdtype(x.dtype, jnp.floating)
        and all(y.dtype == x.dtype for y in (weight, *arrays))
    )
    return _count_worthwhile_tokens(weight) if is_simple else None


def _count_worthwhile_tokens(weight: Factored) -> float:
    """From here on the sum takes fewer operations than the product with the second
    factor, in the forward pass, and with the first, in the gradient of `x`."""
    rows, columns = (
        math.prod(weight.base.shape[axis] for axis in axes)
        for axes in (weight.rows, weight.columns)
    )
    return rows * columns / (rows + columns) if rows + columns else math.inf

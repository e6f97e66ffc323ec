"""What PEFT saves of a base beside its adapter.

With an adapter on `embed_tokens` or `lm_head` of a model of `transformers` it writes
the frozen weight too, as `base_layer.weight`, and puts it into the model when it loads.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._shared import replicate
from .tensors import Counterpart, Linear


def find_other_bases(
    path: str, counterpart: Counterpart, remaining: dict[str, Any]
) -> Iterator[str]:
    """Takes the base of the module at `path` out of the `remaining` tensors, and yields
    a line for each of its arrays that differs from the model."""
    place = counterpart.place
    module: Any = place.owner.module if place.owner is not None else None
    for name in ("weight", "bias"):
        key = f"{path}.base_layer.{name}"
        if key not in remaining:
            continue
        saved = np.asarray(remaining.pop(key))
        array = place.node if name == "weight" else getattr(module, name, None)
        if array is None:
            yield f"{key} is in the file, and {place.dotted} has none beside it"
            continue
        here = np.asarray(jax.device_get(replicate(array[counterpart.index])))
        if name == "bias":
            saved, here = saved.reshape(-1), here.reshape(-1)
        elif isinstance(counterpart.layout, Linear) and counterpart.layout.a_has_rows:
            here = here.T
        if not _are_equal(saved, here):
            yield (
                f"{key} {saved.shape} is not what `model` has there, {here.shape}: it "
                "was trained on another base. PEFT would put its own in the place of "
                f"yours; do so, at {place.dotted}, or pass "
                "`allow_other_base=True` to keep that of `model`"
            )


def _are_equal(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two arrays are equal, rounded to the narrower of their dtypes."""
    if x.shape != y.shape:
        return False
    return np.array_equal(x.astype(y.dtype), y) or np.array_equal(x, y.astype(x.dtype))

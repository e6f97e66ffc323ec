"""What PEFT saves of the base beside an adapter of it.

With an adapter on `embed_tokens` or `lm_head` of a model of `transformers` it writes
the frozen weight too, as `base_layer.weight`, and puts it into the model when it loads.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .._shared import replicate
from .tensors import Home, Linear


def other_bases(path: str, home: Home, left: dict[str, Any]) -> Iterator[str]:
    """Takes the base of the module at `path` out of `left`; what of it is not in the
    model, a line each."""
    module: Any = home.place.owner.module if home.place.owner is not None else None
    for name in ("weight", "bias"):
        key = f"{path}.base_layer.{name}"
        if key not in left:
            continue
        saved = np.asarray(left.pop(key))
        array = home.place.node if name == "weight" else getattr(module, name, None)
        if array is None:
            yield f"{key} is in the file, and {home.place.dotted} has none beside it"
            continue
        here = np.asarray(replicate(array[home.index]))
        if name == "bias":
            saved, here = saved.reshape(-1), here.reshape(-1)
        elif isinstance(home.layout, Linear) and home.layout.exchanged:
            here = here.T
        if not _are_equal(saved, here):
            yield (
                f"{key} {saved.shape} is not what `model` has there, {here.shape}: it "
                "was trained on another base. PEFT would put its own in the place of "
                f"yours; do so, at {home.place.dotted}, or pass "
                "`allow_other_base=True` to keep that of `model`"
            )


def _are_equal(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether they are, as far as the narrower of their dtypes tells."""
    if x.shape != y.shape:
        return False
    return np.array_equal(x.astype(y.dtype), y) or np.array_equal(x, y.astype(x.dtype))

"""The choice to form whole weights in the forward pass."""

from typing import Any, TypeVar

from .._methods import check_whole, FusedWeight, is_weight, unfuse
from .._shared import accumulation_dtype
from .._trees import (
    exclude_places,
    Filter,
    list_available,
    match_filter,
    Place,
    Places,
    rebuild,
)


_Model = TypeVar("_Model")


def merged_forward(
    model: _Model,
    filter: Filter = None,
    *,
    exclude: Filter = None,
    enabled: bool | None = True,
) -> _Model:
    """Makes adapted weights form `w + scale * (b · a)` for each product with them, or
    never.

    Results are the same up to rounding. So are gradients: those of the factors are
    still computed in low-rank order. The cost differs: the forward pass and the
    gradient of the inputs each form one array of the shape of `w`, which is not kept,
    and the low-rank branch no longer reads and writes all activations. That is faster
    where a step has more tokens than `m n / (m + n)`, for a base of `m × n`, and slower
    where it has few. On a CPU linear layers choose by that number, so there is nothing
    to call. Elsewhere nothing is merged unless this asks for it, since devices may
    multiply in a precision that would lose small updates of the sum. Lookups and
    branches with dropout are never affected.

    This only wraps the weights, so it may also be called inside a step, for that step
    alone.

    !!! example

        ```python
        model = lorax.merged_forward(lorax.loraify(model, rank=8, key=key))
        ```

    **Arguments:**

    - `model`: A model with adapters, or any pytree with weights in it.
    - `filter`: Which of the weights, see `lorax.loraify`; `None` for all.
    - `exclude`: A filter for those that are left out.
    - `enabled`: `False` for base and branch apart, `None` for the choice by the number
        of tokens, which is the default of a model.

    **Returns:**

    The model with the same arrays. `model` itself is not changed.

    **Raises:**

    `ValueError` if any part of `filter` or `exclude` names no adapter, or if a weight's
    dtype is narrower than float32: rounded to it, the sum would lose a small update.
    """
    check_whole(model, "lorax.merged_forward({})")
    places = Places(model)
    weights = [place for place in places.all if _is_adapter(place)]
    if not weights:
        raise ValueError("`model` has no adapters. Call `lorax.loraify` first.")
    if filter is not None:
        weights = []
        for part in match_filter(model, places, filter, "filter", _is_adapter):
            of_part = [
                place for place in part.find_covered(places) if _is_adapter(place)
            ]
            if not of_part:
                raise ValueError(
                    f"{part.label} names no adapter. Available: "
                    f"{list_available(places, _is_adapter)}."
                )
            weights += of_part
    weights = exclude_places(model, places, exclude, weights, _is_adapter)
    narrow = [place for place in weights if _is_narrow(place.node)]
    if narrow and enabled:
        raise ValueError(
            f"{narrow[0].dotted} is of dtype {narrow[0].node.dtype.name}: `w + scale * "
            "(b · a)` rounded to that loses small updates. Leave it out with "
            "`exclude`, or keep base weights in float32."
        )

    def choose(weight: Any) -> Any:
        weight = unfuse(weight)
        return weight if enabled is None else FusedWeight(weight, enabled)

    return rebuild(
        model,
        {place.indices: choose for place in weights},
    )


def _is_adapter(place: Place) -> bool:
    return is_weight(place.node)


def _is_narrow(weight: Any) -> bool:
    return accumulation_dtype(weight.dtype) != weight.dtype

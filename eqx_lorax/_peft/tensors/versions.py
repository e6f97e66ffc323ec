"""Which of two tensors belongs to the rows, which depends on the version of PEFT that
wrote them."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import find_rank
from .counterparts import Counterpart
from .layout import Layout


def resolve_layout(
    config: Mapping[str, Any],
    path: str,
    counterpart: Counterpart,
    first: np.ndarray,
    second: np.ndarray,
) -> Layout:
    """The layout of the two tensors at `path` in a file with this configuration.

    **Raises:**

    `ValueError` if the layout is not known, or if the tensors do not fit the array here
    in this layout but in the other one.
    """
    layout = counterpart.layout
    on_rows, on_columns = (layout.with_a_on_rows(x) for x in (True, False))
    if on_rows is None or on_columns is None:
        return layout
    fitting = [x for x in (on_rows, on_columns) if counterpart.fits(x, first, second)]
    if not fitting:
        return layout  # whose error says more
    is_new = not layout.is_parameter or _has_inputs_first(config)
    if not is_new:
        if len(fitting) == 2:
            _check_square_experts(config, path, counterpart, is_old=is_new is False)
        return fitting[0]
    if layout not in fitting:
        raise ValueError(
            f"{path} has factors {first.shape} and {second.shape}, which fit the "
            f"weight {counterpart.shape} at {counterpart.dotted} the other way "
            "round only. "
            + (
                "Name it in `transposed` if it is stored `(..., in, out)` here."
                if layout == on_columns
                else "It is named in `transposed`, but seems to be `(..., out, in)`."
            )
        )
    if len(fitting) == 2 and counterpart.is_order_open and config.get("fan_in_fan_out"):
        raise ValueError(
            f"{path} is stored `(in, out)` in PyTorch (`fan_in_fan_out`), and whether "
            f"{counterpart.dotted} {counterpart.shape} is so too cannot be seen. "
            "Name in `transposed` what is; `transposed=[]` says that nothing is."
        )
    return layout


def is_possible(
    config: Mapping[str, Any],
    path: str,
    counterpart: Counterpart,
    first: np.ndarray,
    second: np.ndarray,
) -> bool:
    """Whether two tensors can be the factors of the experts at `path`."""
    layouts: list[Layout | None] = [counterpart.layout]
    if not _has_inputs_first(config):
        layouts = [
            counterpart.layout.with_a_on_rows(a_has_rows)
            for a_has_rows in (True, False)
        ]
    rank = find_rank(config, path)
    return any(
        layout is not None
        and counterpart.fits(layout, first, second)
        and layout.from_torch(first, second)[0].shape[-1] == rank
        for layout in layouts
    )


def _has_inputs_first(config: Mapping[str, Any]) -> bool | None:
    """Whether `A` of experts is on their inputs, as since PEFT 0.19. Before, it was on
    the first axis of the stored array. `None` if the version does not tell."""
    # The first version with experts did not write its version.
    version = str(config.get("peft_version") or "0.17")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    if (int(numbers[1]), int(numbers[2])) >= (0, 19):
        return True
    # Versions on the way to 0.19 called themselves 0.18.1.dev0 and the like.
    return None if "dev" in version else False


def _check_square_experts(
    config: Mapping[str, Any], path: str, counterpart: Counterpart, *, is_old: bool
) -> None:
    if not is_old:
        raise ValueError(
            f"{path} has square experts, and which side of their factors is which "
            "depends on the version of PEFT, which "
            f"`peft_version={config['peft_version']!r}` does not tell. Write '0.18.0' "
            "or '0.19.0' into the configuration."
        )
    warnings.warn(
        f"{path} has square experts from before PEFT 0.19, where the sides of factors "
        "follow from how PyTorch stored them. They are taken to have been stored as "
        f"{counterpart.dotted} is here; if `in` and `out` were exchanged on the "
        "way, the update is transposed.",
        stacklevel=6,
    )

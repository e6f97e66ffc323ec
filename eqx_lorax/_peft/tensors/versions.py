"""In which order of its sides a pair of tensors was written."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import rank_of
from .homes import Home
from .layout import Layout


def layout_in_file(
    config: Mapping[str, Any],
    path: str,
    home: Home,
    first: np.ndarray,
    second: np.ndarray,
) -> Layout:
    """The layout of what is at `path` in a file with this configuration.

    **Raises:**

    `ValueError` if that is not known, or is not the one in which it fits.
    """
    with_rows, with_columns = (home.layout.with_sides(x) for x in (True, False))
    if with_rows is None or with_columns is None:
        return home.layout
    fitting = [x for x in (with_rows, with_columns) if home.fits(x, first, second)]
    if not fitting:
        return home.layout  # whose error says more
    is_new = not home.layout.is_parameter or _has_inputs_first(config)
    if not is_new:
        if len(fitting) == 2:
            _check_square_experts(config, path, home, is_old=is_new is False)
        return fitting[0]
    if home.layout not in fitting:
        raise ValueError(
            f"{path} has factors {first.shape} and {second.shape}, which fit the "
            f"weight {home.shape} at {home.place.dotted} the other way round only. "
            + (
                "Name it in `transposed` if it is stored `(..., in, out)` here."
                if home.layout == with_columns
                else "It is named in `transposed`, but seems to be `(..., out, in)`."
            )
        )
    if len(fitting) == 2 and home.is_order_open and config.get("fan_in_fan_out"):
        raise ValueError(
            f"{path} is stored `(in, out)` in PyTorch (`fan_in_fan_out`), and whether "
            f"{home.place.dotted} {home.shape} is so too cannot be seen. Name in "
            "`transposed` what is; `transposed=[]` says that nothing is."
        )
    return home.layout


def can_be(
    config: Mapping[str, Any],
    path: str,
    home: Home,
    first: np.ndarray,
    second: np.ndarray,
) -> bool:
    """Whether two tensors can be those of the experts at `path`."""
    if _has_inputs_first(config):
        layouts = [home.layout]
    else:
        layouts = [home.layout.with_sides(exchanged) for exchanged in (True, False)]
    rank = rank_of(config, path)
    return any(
        layout is not None
        and home.fits(layout, first, second)
        and layout.from_torch(first, second)[0].shape[-1] == rank
        for layout in layouts
    )


def _has_inputs_first(config: Mapping[str, Any]) -> bool | None:
    """Whether `A` of experts has their inputs, as since PEFT 0.19. Before, it had the
    first axis that they are stored with. `None` if that is not known."""
    # The first version with experts did not say yet which it is.
    version = str(config.get("peft_version") or "0.17")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    if (int(numbers[1]), int(numbers[2])) >= (0, 19):
        return True
    # What was to become 0.19 called itself 0.18.1.dev0 and the like.
    return None if "dev" in version else False


def _check_square_experts(
    config: Mapping[str, Any], path: str, home: Home, *, is_old: bool
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
        f"{home.place.dotted} is here; if `in` and `out` were exchanged on the way, "
        "the update is transposed.",
        stacklevel=6,
    )

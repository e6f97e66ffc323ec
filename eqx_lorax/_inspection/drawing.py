"""Pictures of spectra, by Matplotlib."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def draw_spectra(
    heat: np.ndarray,
    *,
    names: Sequence[str],
    sizes: Sequence[float],
    kinds: Sequence[str],
) -> Any:
    """A heat map with a panel of sizes at its right.

    **Arguments:**

    - `heat`: `(targets, values)`, from 0 to 1, NaN where there is nothing.
    - `names`, `sizes`, `kinds`: Of each row. There is a line between two kinds.

    **Returns:**

    The `matplotlib.figure.Figure`, of no window and no global state.

    **Raises:**

    `ImportError` if Matplotlib is not there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            '`plot` needs Matplotlib. Install it: `pip install "eqx-lorax[plots]"`.'
        ) from error

    count, width = heat.shape
    each = 0.22 if count <= _MOST_NAMES else 0.08
    height = min(max(2.2, 1.1 + each * count), 16)
    figure = Figure(figsize=(9, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left.set_facecolor("#f2f2f2")
    image = left.imshow(
        heat, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=left, pad=0.01, fraction=0.05)
    bar.set_label("relative to the largest")
    bar.outline.set_visible(False)
    # Not every row has its name where there are many.
    step = -(-count // _MOST_NAMES) or 1
    left.set_yticks(range(0, count, step), [names[i] for i in range(0, count, step)])
    left.tick_params(axis="y", length=0, labelsize=8)
    ticks = sorted({0, *range(-1, width, max(1, width // 8))} - {-1})
    left.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    left.set(xlabel="Singular value of the update", ylim=(count - 0.5, -0.5))
    right.barh(range(count), 100 * np.asarray(sizes), height=0.7, color="tab:blue")
    right.set_xlabel("Update / base, %")
    right.tick_params(axis="y", length=0)
    right.grid(axis="x", alpha=0.25)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        for i, (before, after) in enumerate(itertools.pairwise(kinds)):
            if before != after:
                axes.axhline(i + 0.5, color="white" if axes is left else "0.85", lw=1.5)
    return figure


_MOST_NAMES = 60

"""How time and memory grow with the layers, the width and the rank.

    python benchmarks/growth.py [--small] [--unrolled 48] [--output out]

This compares a transformer with adapters on all linear layers with the same model
frozen: adapting it and merging it back, tracing and lowering a step, compiling it,
running it, and its temporary memory. By default there are 1 to 96 blocks of width 64,
unrolled and scanned. Most of the time goes to compiling unrolled blocks. For 96
unrolled blocks XLA needs more than 24 GB on a CPU, so they only run
with `--unrolled 96`.

Writes `growth.json` and `growth.png`.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.random as jr
from contests import adapted_by
from harness import (
    compare,
    draw_line,
    pyplot,
    save_figure,
    save_points,
    study_parser,
    timed,
)
from steps import adapted_and_frozen
from transformer import FORMS, make_transformer

import eqx_lorax as lorax


HEAD, LENGTH, SEQUENCES = 64, 32, 4
MEASURES = {
    "adapt": "loraify, s",
    "merge": "unloraify, s",
    "lower": "trace and lower, s",
    "compile": "compile, s",
    "step": "step, ms",
    "temporary": "temporary memory, MB",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One model, frozen or adapted, with its time and memory."""

    against: str
    """What grows in this series: layers, width or rank."""
    value: int
    form: str
    """Unrolled or scanned."""
    program: str
    adapt: float | None
    merge: float | None
    lower: float | None
    compile: float | None
    step: float
    temporary: float | None


def seconds(fn: Callable[[], Any], repeats: int = 5) -> float:
    timed(fn)  # compiles
    return statistics.median(timed(fn)[0] for _ in range(repeats))


def points(
    against: str, value: int, form: str, layers: int, width: int, rank: int
) -> list[Point]:
    model = make_transformer(form, layers, width, width // HEAD)
    adapted = adapted_by(model, rank)
    x = jr.normal(jr.key(1), (SEQUENCES, LENGTH, width))
    floor, program = adapted_and_frozen(model, adapted, x)
    rows = compare(form, floor, [program], 5)
    adapt = seconds(lambda: adapted_by(model, rank))
    merge = seconds(lambda: lorax.unloraify(adapted))
    return [
        Point(
            against,
            value,
            form,
            each.name,
            adapt if each is program else None,
            merge if each is program else None,
            each.lowering,
            each.compiling,
            row.milliseconds,
            row.temporary_megabytes,
        )
        for each, row in zip((floor, program), rows)
    ]


def study(small: bool, unrolled: int) -> list[Point]:
    layers = (1, 2) if small else (1, 3, 6, 12, 24, 48, 96)
    widths = (64, 128) if small else (64, 128, 256, 512)
    ranks = (1, 4) if small else (1, 4, 16, 64)
    few, wide = (1, 64) if small else (4, 256)
    series = [
        *[
            ("layers", n, form, n, 64, 8)
            for form in FORMS
            for n in layers
            if form == "scanned" or n <= unrolled
        ],
        *[("width", n, form, few, n, 8) for form in FORMS for n in widths],
        *[("rank", n, form, few, wide, n) for form in FORMS for n in ranks],
    ]
    points("", 0, "unrolled", 1, 64, 8)  # the first one imports and compiles
    found: list[Point] = []
    print(f"{'':<42}" + "".join(f"{label:>22}" for label in MEASURES.values()))
    for arguments in series:
        for point in points(*arguments):
            against, value = point.against, point.value
            name = f"{against} {value}, {point.form}, {point.program}"
            figures = [getattr(point, measure) for measure in MEASURES]
            shown = ["" if x is None else f"{x:.3f}" for x in figures]
            print(f"{name:<42}" + "".join(f"{x:>22}" for x in shown), flush=True)
            found.append(point)
    return found


def save_charts(found: Sequence[Point], path: Path) -> None:
    """Plots a row of panels for each measure, with a column for each varied size."""
    columns = list(dict.fromkeys(point.against for point in found))
    figure, axes = pyplot().subplots(
        len(MEASURES),
        len(columns),
        figsize=(11, 16),
        sharex="col",
        sharey="row",
        layout="constrained",
    )
    for row, (measure, label) in zip(axes, MEASURES.items()):
        for axis, against in zip(row, columns):
            for form in FORMS:
                for program in ("frozen", "adapted"):
                    line = [
                        point
                        for point in found
                        if (point.against, point.form, point.program)
                        == (against, form, program)
                    ]
                    style = "-" if form == "unrolled" else ":"
                    label = f"{program}, {form}"
                    draw_line(axis, line, "value", measure, style, label)
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.minorticks_off()
            ticks = sorted({p.value for p in found if p.against == against})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
        row[0].set_ylabel(label)
    for axis, against in zip(axes[-1], columns):
        axis.set_xlabel(against)
    handles, labels = axes[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    save_figure(figure, path, dpi=110)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument(
        "--unrolled", type=int, default=48, help="the most unrolled blocks"
    )
    flags = parser.parse_args()
    found = study(flags.small, flags.unrolled)
    save_points("growth", found, save_charts, flags.output)


if __name__ == "__main__":
    main()

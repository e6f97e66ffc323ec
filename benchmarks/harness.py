"""Times programs and a floor in turns, and takes medians of the ratios of each
round."""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax


ROUND = 0.03
"""Seconds that a program runs for in each round, if once is not longer."""


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to be timed."""

    name: str
    start: Callable[[], Any]
    """Starts it once. On an accelerator several runs may wait in a queue."""
    finish: Callable[[Any], Any] = jax.block_until_ready
    """Waits for what `start` has given last, and for all before it."""
    flops: float | None = None
    bytes: float | None = None
    """What the compiled program reads and writes."""
    temporary: int | None = None
    """The bytes that it needs besides its arguments and results."""
    arguments: int | None = None
    """The bytes of its arguments."""
    lowering: float | None = None
    """Seconds to trace and lower it."""
    compiling: float | None = None
    """Seconds to compile it."""


def compiled(name: str, fn: Callable[..., Any], *args: Any) -> Program:
    """`fn(*args)`, compiled by `jax.jit`, with XLA's analysis."""
    begin = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    middle = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()

    def start_and_wait() -> Any:
        return jax.block_until_ready(executable(*args))

    # An accelerator is busy only if the next run is ready when one ends. A CPU could
    # run two at once.
    is_on_cpu = jax.default_backend() == "cpu"
    # Not every backend has these.
    cost: Any = executable.cost_analysis() or {}
    memory: Any = executable.memory_analysis()
    return Program(
        name,
        start_and_wait if is_on_cpu else lambda: executable(*args),
        flops=cost.get("flops"),
        bytes=cost.get("bytes accessed"),
        temporary=memory and memory.temp_size_in_bytes,
        arguments=memory and memory.argument_size_in_bytes,
        lowering=middle - begin,
        compiling=end - middle,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """Results of a program. Ratios are to the floor in the same round."""

    case: str
    name: str
    floor: str
    milliseconds: float
    ratio: float
    ratio_low: float
    """The lower quartile over the rounds."""
    ratio_high: float
    flops: float | None
    bytes: float | None
    temporary: float | None
    """Over those of the floor."""
    temporary_megabytes: float | None


def compare(
    case: str, floor: Program, programs: Sequence[Program], rounds: int
) -> list[Row]:
    """Runs the floor and all programs once in each round."""
    everyone = [floor, *programs]
    # The first runs are slow: they warm up caches, and record what a GPU replays.
    once = [min(_seconds(program, 1) for _ in range(3)) for program in everyone]
    # Short programs run several times in a row, so that the clock is precise enough.
    repeats = [max(1, math.ceil(ROUND / seconds)) for seconds in once]
    seconds: list[list[float]] = [[] for _ in everyone]
    for number in range(rounds):
        # Each round starts with another program, so that none always follows the same.
        order = [(i + number) % len(everyone) for i in range(len(everyone))]
        for i in order:
            seconds[i].append(_seconds(everyone[i], repeats[i]))
    return [
        _row(case, floor, program, seconds[0], of_program)
        for program, of_program in zip(everyone, seconds)
    ]


def _seconds(program: Program, repeats: int) -> float:
    begin = time.perf_counter()
    last = None
    for _ in range(repeats):
        last = program.start()
    program.finish(last)
    return (time.perf_counter() - begin) / repeats


def _row(
    case: str,
    floor: Program,
    program: Program,
    of_floor: Sequence[float],
    of_program: Sequence[float],
) -> Row:
    ratios = [after / before for before, after in zip(of_floor, of_program)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    temporary = program.temporary
    return Row(
        case,
        program.name,
        floor.name,
        1000 * statistics.median(of_program),
        middle,
        low,
        high,
        _over(program.flops, floor.flops),
        _over(program.bytes, floor.bytes),
        _over(temporary, floor.temporary),
        None if temporary is None else temporary / 1e6,
    )


def _over(x: float | None, floor: float | None) -> float | None:
    return x / floor if x is not None and floor else None


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a table of the rows of one case."""
    print(f"\n{rows[0].case}")
    head = f"{'':<30}{'ms':>9}{'over floor':>12}{'quartiles':>15}"
    print(head + f"{'FLOPs':>8}{'bytes':>8}{'temporary':>11}{'MB':>9}")
    for row in rows:
        spread = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
        line = f"{row.name:<30}{row.milliseconds:>9.2f}{row.ratio:>12.3f}{spread:>15}"
        line += f"{_figure(row.flops, 3):>8}{_figure(row.bytes, 2):>8}"
        line += f"{_figure(row.temporary, 2):>11}"
        print(line + f"{_figure(row.temporary_megabytes, 1):>9}", flush=True)


def _figure(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def machine() -> dict[str, Any]:
    """The machine and the versions for the results."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = [name for name in ("amx_tile", "avx512f", "avx2") if name in flags]
    return ", ".join(names[:1] + widest[:1])


def save_json(rows: Sequence[Row], path: Path) -> None:
    """Writes the rows, with the machine and the versions."""
    _write_json(path, "rows", rows)


def _write_json(path: Path, name: str, figures: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), name: [dataclasses.asdict(x) for x in figures]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def save_chart(rows: Sequence[Row], path: Path) -> None:
    """Plots a panel for each case and a line for each program, with quartiles."""
    plt = pyplot()
    cases = list(dict.fromkeys(row.case for row in rows))
    shown = {case: [row for row in rows if row.case == case][::-1] for case in cases}
    heights = [len(of_case) for of_case in shown.values()]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(8, 0.6 * len(cases) + 0.26 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (case, of_case) in zip(axes[:, 0], shown.items()):
        for y, row in enumerate(of_case):
            color = "tab:red" if row.name.startswith("lorax") else "0.4"
            axis.plot([row.ratio_low, row.ratio_high], [y, y], color=color, lw=3)
            axis.plot(row.ratio, y, "o", color=color)
        axis.axvline(1, color="0.8", zorder=0)
        axis.set_yticks(range(len(of_case)), [row.name for row in of_case])
        axis.set_ylim(-0.6, len(of_case) - 0.4)
        axis.set_title(case, fontsize="medium", loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("time over the floor: median and quartiles")
    save_figure(figure, path, dpi=150)


def pyplot() -> Any:
    """Matplotlib's `pyplot`, which draws only to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure to a file, and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)


def draw_line(
    axis: Any, points: Sequence[Any], x: str, y: str, style: str, label: str
) -> None:
    """Draws a line through the points of one program, in red if it is adapted. Points
    without a value are left out."""
    values = [(getattr(point, x), getattr(point, y)) for point in points]
    if any(value is None for _, value in values):
        return
    color = "tab:red" if points[0].program == "adapted" else "0.4"
    axis.plot(*zip(*values), marker="o", color=color, ls=style, label=label)


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that `fn()` takes until all arrays in its result are ready, and the
    result."""
    start = time.perf_counter()
    result = fn()
    jax.block_until_ready(
        [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)]
    )
    return time.perf_counter() - start, result


def use_virtual_devices(count: int) -> None:
    """Makes JAX treat the CPU as several devices. Call it before JAX makes the first
    array. It has no effect on accelerators."""
    flag = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def flag_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a program unchanged."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def study_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that studies share."""
    parser = flag_parser(description)
    parser.add_argument("--small", action="store_true", help="to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("out"))
    return parser


def save_points(
    name: str,
    points: Sequence[Any],
    draw: Callable[[Sequence[Any], Path], None],
    folder: Path,
) -> None:
    """Writes the points of a study, which are dataclasses, and their chart."""
    file, chart = folder / f"{name}.json", folder / f"{name}.png"
    _write_json(file, "points", points)
    draw(points, chart)
    print(f"\nWritten: {file}, {chart}")

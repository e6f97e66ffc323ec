"""How the time of a step grows with the number of devices.

    python benchmarks/devices.py [--small] [--output out]

This times a scanned transformer with adapters on all linear layers, on 1 to 8 devices,
with fixed work (the same total batch) and with proportional work (the same batch for
each device), data-parallel and tensor-parallel, beside the same model frozen on the
same mesh. Without accelerators the devices are virtual ones that share the cores of one
CPU. Then the time with fixed work can at best be constant, and with proportional work
it grows. The figures then only show what adapters add on each mesh.

Writes `devices.json` and `devices.png`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from contests import adapted_by
from harness import (
    compare,
    draw_line,
    pyplot,
    save_figure,
    save_points,
    study_parser,
    use_virtual_devices,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from steps import adapted_and_frozen
from transformer import make_transformer


COUNTS = (1, 2, 4, 8)
HEAD, LENGTH = 32, 64


@dataclasses.dataclass(frozen=True)
class Point:
    """One program on one mesh."""

    work: str
    """Fixed or proportional."""
    way: str
    """What the devices share: data or tensors."""
    devices: int
    program: str
    milliseconds: float
    ratio: float
    """Over the frozen model on the same mesh, in the same round."""


def spec_of(way: str, path: str, ndim: int) -> P:
    """As in Megatron: the first matrices of a block are sharded by rows, the last ones
    by columns."""
    if way == "data" or ndim < 3:
        return P()
    narrows = any(name in path for name in ("output_proj", "down"))
    return P(None, None, "model") if narrows else P(None, "model", None)


def points(
    work: str, way: str, devices: int, sequences: int, width: int, rounds: int
) -> list[Point]:
    shape = (devices, 1) if way == "data" else (1, devices)
    mesh = jax.make_mesh(
        shape,
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    model = make_transformer("scanned", 4, width, width // HEAD)

    def put(path: Any, x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        spec = spec_of(way, jax.tree_util.keystr(path), x.ndim)
        return jax.device_put(x, NamedSharding(mesh, spec))

    model = jax.tree_util.tree_map_with_path(put, model)
    adapted = adapted_by(model, 8)
    x = jr.normal(jr.key(1), (sequences, LENGTH, width))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    floor, program = adapted_and_frozen(model, adapted, x)
    rows = compare(f"{work}, {way}, {devices}", floor, [program], rounds)
    return [
        Point(work, way, devices, row.name, row.milliseconds, row.ratio) for row in rows
    ]


def study(small: bool) -> list[Point]:
    width, sequences, rounds = (64, 8, 3) if small else (256, 16, 9)
    found: list[Point] = []
    print(f"{'':<42}{'step, ms':>10}{'over frozen':>13}")
    for work in ("fixed", "proportional"):
        for way in ("data", "tensor"):
            # One in the middle would only run the same lines with another number.
            for devices in (COUNTS[0], COUNTS[-1]) if small else COUNTS:
                grows = work == "proportional"
                count = sequences * devices // 4 if grows else sequences
                for point in points(work, way, devices, count, width, rounds):
                    name = f"{work} work, {way}, {devices} devices, {point.program}"
                    print(
                        f"{name:<42}{point.milliseconds:>10.1f}{point.ratio:>13.2f}",
                        flush=True,
                    )
                    found.append(point)
    return found


def save_chart(found: Sequence[Point], path: Path) -> None:
    """Plots time by devices, with a panel each for fixed and proportional work."""
    from matplotlib import ticker

    figure, axes = pyplot().subplots(
        1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for axis, work in zip(axes, ("fixed", "proportional")):
        for way, style in (("data", "-"), ("tensor", ":")):
            for program in ("frozen", "adapted"):
                line = [
                    point
                    for point in found
                    if (point.work, point.way, point.program) == (work, way, program)
                ]
                label = f"{program}, {way}-parallel"
                draw_line(axis, line, "devices", "milliseconds", style, label)
        axis.set(xscale="log", yscale="log", xlabel="devices", title=f"{work} work")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.yaxis.set_major_locator(ticker.LogLocator(base=2))
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("step, ms")
    axes[1].legend(frameon=False)
    save_figure(figure, path, dpi=120)


def main() -> None:
    flags = study_parser(__doc__).parse_args()
    use_virtual_devices(max(COUNTS))
    found = study(flags.small)
    save_points("devices", found, save_chart, flags.output)


if __name__ == "__main__":
    main()

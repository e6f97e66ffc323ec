"""How the time of a step grows with the number of devices.

    python benchmarks/devices.py [--small] [--output out]

A scanned transformer, all of whose linear layers are adapted, on 1 to 8 devices, at
fixed work (the same batch for all of them) and at proportional work (as many sequences
for each). Data-parallel and tensor-parallel, beside the same model frozen on the same
mesh. Without accelerators the devices are virtual ones of one processor, which share
its cores: then time at fixed work can be constant at best, at proportional work it
grows with the work, and what the figures say is what adapters add on each mesh.

Writes `devices.json` and `devices.png`.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


COUNTS = (1, 2, 4, 8)
# Before JAX is imported. Says nothing where there are accelerators.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={max(COUNTS)}"
)

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.random as jr  # noqa: E402
from contests import adapted_by, on_batch  # noqa: E402
from harness import compare, save_points, study_parser  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P  # noqa: E402
from steps import frozen, step  # noqa: E402
from transformer import Block, Scanned  # noqa: E402

import eqx_lorax as lorax  # noqa: E402


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
    """As Megatron does: what a block widens is sharded by its rows, what it narrows by
    its columns."""
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
    make = functools.partial(Block, width, width // HEAD)
    model = Scanned(eqx.filter_vmap(make)(jr.split(jr.key(0), 4)))

    def put(path: Any, x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        spec = spec_of(way, jax.tree_util.keystr(path), x.ndim)
        return jax.device_put(x, NamedSharding(mesh, spec))

    model = jax.tree_util.tree_map_with_path(put, model)
    adapted = adapted_by(model, 8)
    x = jr.normal(jr.key(1), (sequences, LENGTH, width))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    floor = frozen("frozen", on_batch, model, x)
    program = step("adapted", on_batch, adapted, lorax.trainable(adapted), x)
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
            for devices in COUNTS:
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
    """Time by devices, a panel for fixed and one for proportional work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for axis, work in zip(axes, ("fixed", "proportional")):
        for way, style in (("data", "-"), ("tensor", ":")):
            for program, color in (("frozen", "0.4"), ("adapted", "tab:red")):
                line = [
                    (point.devices, point.milliseconds)
                    for point in found
                    if (point.work, point.way, point.program) == (work, way, program)
                ]
                axis.plot(
                    *zip(*line),
                    marker="o",
                    ls=style,
                    color=color,
                    label=f"{program}, {way}-parallel",
                )
        axis.set(xscale="log", yscale="log", xlabel="devices", title=f"{work} work")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.yaxis.set_major_locator(ticker.LogLocator(base=2))
        axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("step, ms")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    flags = study_parser(__doc__).parse_args()
    found = study(flags.small)
    save_points("devices", found, save_chart, flags.output)


if __name__ == "__main__":
    main()

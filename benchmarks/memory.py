"""What a training step holds, and what makes it less.

    python benchmarks/memory.py [--small] [--rounds 5] [--output out]

The model is the transformer of `run.py`, with adapters on all linear layers, and the
same model frozen.

- Temporary memory of the compiled step of scanned blocks, under policies for
  `jax.checkpoint`.
- The bytes that unrolled blocks keep between forward and backward pass, under the same
  policies. XLA undoes checkpoints of unrolled blocks on a CPU, so these are what
  `jax.vjp` returns.
- Four levers, each by itself and all together: which layers have adapters, the policy,
  the method, and the format of the base. Here the blocks are wider. The time is that of
  a step, over the first row in the same round.

Writes `memory.json` and `memory.png`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from contests import adapted_by, on_batch
from harness import (
    compare,
    machine,
    Program,
    pyplot,
    save_figure,
    save_points,
    study_parser,
)
from steps import frozen, step
from transformer import make_transformer

import eqx_lorax as lorax


HEAD, LENGTH, RANK = 64, 128, 8
# By their names in `transformer.POLICIES`.
ROWS = {
    "": "no checkpoint",
    "checkpoint": "everything computed again",
    "dots_saveable": "dots_saveable",
    "policy": "lorax.checkpoint_policy()",
    "policy without attention": "the same without attention",
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """Megabytes of a model under a policy, frozen and adapted."""

    policy: str
    temporary_frozen: float
    temporary_adapted: float
    saved_frozen: float
    saved_adapted: float


@dataclasses.dataclass(frozen=True)
class Setting:
    """Megabytes of an adapted model, and the time of a step."""

    name: str
    base: float
    adapters: float
    adam: float
    temporary: float
    """With the gradients."""
    time: float
    """Over that of the first setting."""

    @property
    def total(self) -> float:
        return self.base + self.adapters + self.adam + self.temporary


def saved_megabytes(model: Any, trained: Any, x: Any) -> float:
    """What is kept between forward and backward pass, besides the model and `x`."""
    params, rest = eqx.partition(model, trained)
    run = lambda params, x: on_batch(eqx.combine(params, rest), x)  # noqa: E731
    _, pull = jax.vjp(run, params, x)

    def list_arrays(tree: Any) -> dict[int, int]:
        arrays = [y for y in jax.tree.leaves(tree) if isinstance(y, jax.Array)]
        return {y.unsafe_buffer_pointer(): y.nbytes for y in arrays}

    given = list_arrays((model, x))
    kept = list_arrays(pull)
    return sum(size for where, size in kept.items() if where not in given) / 1e6


def megabytes(program: Program) -> float:
    assert program.temporary is not None, "this backend does not say"
    return program.temporary / 1e6


def study_policy(policy: str, layers: int, width: int, x: Any) -> Kept:
    figures = []
    for form in ("scanned", "unrolled"):
        model = make_transformer(form, layers, width, width // HEAD, policy)
        adapted = adapted_by(model, RANK)
        nothing = jax.tree.map(lambda _: False, model)
        trained = lorax.trainable(adapted)
        if form == "scanned":
            floor = frozen("frozen", on_batch, model, x)
            program = step("adapted", on_batch, adapted, trained, x)
            figures += [megabytes(floor), megabytes(program)]
        else:
            figures += [saved_megabytes(model, nothing, x)]
            figures += [saved_megabytes(adapted, trained, x)]
    return Kept(ROWS[policy], *figures)


FEW = ["query_proj", "value_proj"]
# The policy, the format of the base, and the options of `loraify`.
SETTINGS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "LoRA, all linear layers": ("", None, {}),
    "targets: query and value": ("", None, dict(filter=FEW)),
    "policy: lorax.checkpoint_policy()": ("policy", None, {}),
    "policy: without attention": ("policy without attention", None, {}),
    "policy: everything computed again": ("checkpoint", None, {}),
    "method: lora_fa": ("", None, dict(method="lora_fa")),
    "method: vera, rank 64": ("", None, dict(method="vera", rank=64)),
    "method: ia3": ("", None, dict(method="ia3", scale_inputs=True)),
    "base: nf4": ("", "nf4", {}),
    "policy and base": ("policy", "nf4", {}),
    "policy, base and targets": ("policy", "nf4", dict(filter=FEW)),
    "policy, base, targets and lora_fa": (
        *("policy", "nf4"),
        dict(filter=FEW, method="lora_fa"),
    ),
}


def study_settings(
    names: Sequence[str], layers: int, width: int, x: Any, rounds: int
) -> list[Setting]:
    programs, plans = [], []
    for name in names:
        policy, format, options = SETTINGS[name]
        model = make_transformer("scanned", layers, width, width // HEAD, policy)
        model = model if format is None else lorax.quantise(model, format=format)
        adapted = adapted_by(model, **{"rank": RANK, **options})
        plans.append(lorax.summary(adapted))
        trained = lorax.trainable(adapted)
        programs.append(step(name, on_batch, adapted, trained, x))
    rows = compare("settings", programs[0], programs[1:], rounds)
    return [
        Setting(
            program.name,
            plan.frozen_bytes / 1e6,
            plan.trained_bytes / 1e6,
            plan.adam_bytes / 1e6,
            megabytes(program),
            row.ratio,
        )
        for program, plan, row in zip(programs, plans, rows)
    ]


def print_policies(kept: Sequence[Kept]) -> None:
    head = f"{'frozen':>9}{'adapted':>9}{'ratio':>7}"
    print(f"\n{'':<28}{'scanned, temporary':^25}{'unrolled, saved':^25}")
    print(f"{'MB':<28}{head}{head}")
    for x in kept:
        line = f"{x.policy:<28}"
        for floor, adapted in (
            (x.temporary_frozen, x.temporary_adapted),
            (x.saved_frozen, x.saved_adapted),
        ):
            line += f"{floor:>9.1f}{adapted:>9.1f}{adapted / floor:>7.2f}"
        print(line)


def print_settings(settings: Sequence[Setting]) -> None:
    columns = ("base", "adapters", "adam", "temporary", "total")
    print(f"\n{'MB':<36}" + "".join(f"{x:>10}" for x in columns) + f"{'time':>7}")
    for x in settings:
        figures = "".join(f"{getattr(x, name):>10.2f}" for name in columns)
        print(f"{x.name:<36}{figures}{x.time:>7.2f}")


def save_chart(found: Sequence[Any], path: Path) -> None:
    """Plots a bar for each policy, frozen and adapted, and one for each setting."""
    kept = [x for x in found if isinstance(x, Kept)][::-1]
    settings = [x for x in found if isinstance(x, Setting)][::-1]
    figure, (above, below) = pyplot().subplots(
        2,
        1,
        figsize=(9, 1.5 + 0.45 * len(kept) + 0.32 * len(settings)),
        height_ratios=[1.4 * len(kept), len(settings)],
        layout="constrained",
    )
    for y, x in enumerate(kept):
        for shift, size, color in (
            (0.2, x.temporary_frozen, "0.4"),
            (-0.2, x.temporary_adapted, "tab:red"),
        ):
            bar = above.barh(y + shift, size, 0.36, color=color)
            above.bar_label(bar, fmt="%.0f", padding=3, fontsize="small")
    above.set_yticks(range(len(kept)), [x.policy for x in kept])
    above.legend(above.containers[-2:], ["frozen", "adapted"], loc="lower right")
    above.set_title(
        "temporary memory of a step, scanned blocks, by policy",
        fontsize="medium",
        loc="left",
    )
    parts = {"base": "0.4", "adapters": "tab:blue", "adam": "tab:orange"}
    parts["temporary"] = "tab:red"
    ends = [0.0] * len(settings)
    bar = None
    for part, color in parts.items():
        sizes = [getattr(x, part) for x in settings]
        label = "Adam" if part == "adam" else part
        bar = below.barh(
            range(len(settings)), sizes, 0.7, ends, color=color, label=label
        )
        ends = [x + size for x, size in zip(ends, sizes)]
    below.bar_label(bar, [f"{x:.0f}" for x in ends], padding=3, fontsize="small")
    below.set_yticks(range(len(settings)), [x.name for x in settings])
    below.legend(loc="lower right")
    below.set_title("all that a step needs, by lever", fontsize="medium", loc="left")
    for axis in (above, below):
        axis.set_xlabel("MB")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(x=0.08)
    save_figure(figure, path, dpi=110)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    layers, sequences = (2, 1) if flags.small else (6, 8)
    width = 64 if flags.small else 256
    x = jr.normal(jr.key(2), (sequences, LENGTH, width))
    kept = [study_policy(policy, layers, width, x) for policy in ROWS]
    print_policies(kept)
    names = list(SETTINGS)[:: 4 if flags.small else 1]
    x = jr.normal(jr.key(2), (max(sequences // 2, 1), LENGTH, 2 * width))
    settings = study_settings(names, layers, 2 * width, x, flags.rounds)
    print_settings(settings)
    save_points("memory", [*kept, *settings], save_chart, flags.output)


if __name__ == "__main__":
    main()

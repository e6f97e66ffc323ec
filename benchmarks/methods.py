"""Time and memory of a training step with each method, compared with plain LoRA.

    python benchmarks/methods.py [--tokens 256 2048] [--rounds 9] [--only dora vera]

The model is the stack of linear layers of `run.py`. A step is forward, backward to the
inputs and to what is trained, and an update by Adam. All take turns, and each ratio is
to plain LoRA in the same round. If PEFT is installed, its DoRA is compared with its own
LoRA on PyTorch.

Writes `methods.json`.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import peers
from contests import adapted_by, installed, LAYERS, make_stack, on_batch
from harness import compare, machine, print_rows, Program, Row, save_json
from steps import frozen, step

import eqx_lorax as lorax


METHODS: dict[str, dict[str, Any]] = {
    "dora": dict(method="dora", rank=8),
    "pissa": dict(init=lorax.Pissa(iterations=1), rank=8),
    "lora_fa": dict(method="lora_fa", rank=8),
    "adalora": dict(method="adalora", rank=8),
    "lora_xs": dict(method="lora_xs", rank=8, iterations=1),
    "vera, rank 8": dict(method="vera", rank=8),
    "vera, rank 256": dict(method="vera", rank=256),
    "loha": dict(method="loha", rank=8),
    "lokr, factor 8": dict(method="lokr", rank=8, decompose_factor=8),
    "lokr": dict(method="lokr", rank=8),
    "ia3": dict(method="ia3", scale_inputs=True),
    "full": dict(method="full"),
}


def cases(
    tokens: int, width: int, only: list[str]
) -> Iterator[tuple[str, Program, list[Program]]]:
    model = make_stack(jnp.float32, width)
    x = jr.normal(jr.key(2), (tokens, width))

    def program(name: str, rank: int = 8, **options: Any) -> Program:
        adapted = adapted_by(model, rank, **options)
        return step(name, on_batch, adapted, lorax.trainable(adapted), x)

    programs = [frozen("frozen", on_batch, model, x)]
    programs += [
        program(name, **options)
        for name, options in METHODS.items()
        if any(part in name for part in only)
    ]
    name = f"stack of {LAYERS} × {width}², {tokens} tokens"
    yield name, program("lora"), programs
    for _, lora in installed(lambda: peers.peft_lora(LAYERS, x, 8)):
        for _, dora in installed(lambda: peers.peft_lora(LAYERS, x, 8, use_dora=True)):
            named = dataclasses.replace(dora, name="dora, PEFT on PyTorch")
            yield f"{name}, PEFT", lora, [named]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of the names of methods"
    )
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows: list[Row] = []
    for tokens in args.tokens:
        for case, floor, programs in cases(tokens, args.width, args.only):
            of_case = compare(case, floor, programs, args.rounds)
            print_rows(of_case)
            rows += of_case
    save_json(rows, args.output / "methods.json")
    print(f"\nWritten: {args.output / 'methods.json'}")


if __name__ == "__main__":
    main()

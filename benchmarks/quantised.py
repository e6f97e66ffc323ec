"""Time and memory of training, and of decoding, on quantised bases.

    python benchmarks/quantised.py [--tokens 256 2048] [--rounds 9] [--only nf4 int8]

- Bytes a weight, and the error of rounding for normal and for heavy-tailed weights.
- What of that error is left with adapters that start from it, by LoftQ and QPiSSA.
- A step of LoRA on the stack of linear layers of `run.py`, over the same step on
  float32 weights, and, if qwix is installed, over its QLoRA.
- A step of a scanned stack, 24 × 1024²: the memory of arguments and temporary arrays.
- One token through that stack, over float32.

Writes `quantised.json`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import peers
from contests import adapted_by, Case, installed, LAYERS, make_stack, on_batch, WIDTH
from harness import compare, compiled, machine, print_rows, Program, Row, save_json
from steps import Forward, step

import eqx_lorax as lorax


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": dict(format="nf4"),
    "nf4, nested": dict(format="nf4", nested=True),
    "fp4": dict(format="fp4"),
    "int4": dict(format="int4"),
    "int8": dict(format="int8"),
    "int8-block": dict(format="int8-block"),
}
RANK = 8
DEPTH = 24


def steps_of(
    forward: Forward, model: Any, x: Any, formats: dict[str, Any]
) -> tuple[Program, list[Program]]:
    """Steps of LoRA on float32, and on the model in each format."""

    def program(name: str, model: Any) -> Program:
        adapted = adapted_by(model, RANK)
        return step(name, forward, adapted, lorax.trainable(adapted), x)

    return program("float32", model), [
        program(name, lorax.quantise(model, **options))
        for name, options in formats.items()
    ]


def stack_cases(tokens: int, formats: dict[str, Any]) -> Iterator[Case]:
    model = make_stack(jnp.float32)
    x = jr.normal(jr.key(2), (tokens, WIDTH))

    floor, programs = steps_of(on_batch, model, x, formats)
    programs += installed(
        lambda: peers.qwix_lora(LAYERS, x, RANK, weight_qtype="nf4", tile_size=64)
    )
    yield f"step of {LAYERS} × {WIDTH}², {tokens} tokens", floor, programs


def make_scanned() -> Any:
    make = eqx.filter_vmap(
        lambda key: eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
    )
    return make(jr.split(jr.key(0), DEPTH))


def run_scanned(modules: Any, x: Any) -> Any:
    arrays, rest = eqx.partition(modules, eqx.is_array)

    def body(x: Any, arrays: Any) -> Any:
        return jax.nn.relu(jax.vmap(eqx.combine(arrays, rest))(x)), None

    return lax.scan(body, x, arrays)[0]


def scanned_cases(tokens: int, formats: dict[str, Any]) -> Iterator[Case]:
    model = make_scanned()
    x = jr.normal(jr.key(2), (tokens, WIDTH))

    name = f"step of a scanned stack of {DEPTH} × {WIDTH}², {tokens} tokens"
    yield name, *steps_of(run_scanned, model, x, formats)


def decoding_cases(formats: dict[str, Any]) -> Iterator[Case]:
    model = make_scanned()
    x = jr.normal(jr.key(2), (1, WIDTH))

    def program(name: str, model: Any) -> Program:
        arrays, rest = eqx.partition(model, eqx.is_array)
        run = lambda arrays, x: run_scanned(eqx.combine(arrays, rest), x)  # noqa: E731
        return compiled(name, run, arrays, x)

    programs = [
        program(name, lorax.quantise(model, **options))
        for name, options in formats.items()
    ]
    name = f"decoding one token, scanned stack of {DEPTH} × {WIDTH}²"
    yield name, program("float32", model), programs


def print_errors(formats: dict[str, Any]) -> None:
    """Prints bytes a weight, and relative errors: the root of the mean square of the
    difference, over that of the weights."""
    shape = (WIDTH, WIDTH)
    weights = {
        "normal": jr.normal(jr.key(0), shape),
        "Student's t, 4": jr.t(jr.key(1), 4.0, shape),
        "with outliers": jr.normal(jr.key(0), shape)
        * jnp.where(jr.bernoulli(jr.key(1), 1e-3, shape), 20, 1),
    }
    print(f"\n{'relative error':<30}{'bytes':>9}{'':>3}{'   '.join(weights)}")
    for name, options in formats.items():
        line = f"{name:<30}"
        for kind, w in weights.items():
            array: Any = lorax.quantise({"w": w}, **options)["w"]
            error = jnp.std(array.dequantise() - w) / jnp.std(w)
            if kind == "normal":
                line += f"{array.nbytes / array.size:>9.4f}   "
            line += f"{float(error):<{len(kind) + 3}.4f}"
        print(line)


def print_starts(formats: dict[str, Any]) -> None:
    """The errors with adapters of rank 8 that start from what is rounded away."""
    key, width = jr.key(0), 256
    normal = eqx.nn.Linear(width, width, use_bias=False, key=key)
    normal = eqx.tree_at(lambda x: x.weight, normal, jr.normal(key, (width, width)))
    u, s, v = jnp.linalg.svd(normal.weight)
    falling = s / jnp.arange(1, width + 1) ** 0.5
    sloped = eqx.tree_at(lambda x: x.weight, normal, (u * falling) @ v)
    print(
        f"\nErrors of rounding {width} × {width} weights, with adapters of rank {RANK}"
    )
    for kind, model in {"normal": normal, "singular values / √i": sloped}.items():
        for name, options in formats.items():
            plain = lorax.quantise(model, **options)
            start = lorax.LoftQ(model)
            found = {
                "without": plain,
                "LoftQ(model)": lorax.loraify(plain, rank=RANK, init=start, key=key),
            }
            for init in ("uniform", "pissa"):
                adapted = lorax.loraify(model, rank=RANK, init=init, key=key)
                for steps in (1, 5):
                    fitted = lorax.quantise(adapted, **options, loftq=steps)
                    found[f"{init}, loftq={steps}"] = fitted
            errors = [
                f"{label} {lorax.quantisation_error(x, model).worst:.2%}"
                for label, x in found.items()
            ]
            print(f"{kind}, {name}: {'; '.join(errors)}")


def print_memory(programs: list[Program]) -> None:
    """Prints the memory of arguments and temporary arrays, over that of the first."""
    sizes = [(x.arguments or 0) + (x.temporary or 0) for x in programs]
    each = [f"{x.name} {size / sizes[0]:.3f}" for x, size in zip(programs, sizes)]
    print(f"arguments and temporary arrays, {sizes[0] / 1e6:.0f} MB: {', '.join(each)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of the names of formats"
    )
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    formats = {
        name: options
        for name, options in FORMATS.items()
        if any(part in name for part in args.only)
    }
    print_errors(formats)
    print_starts(formats)
    rows: list[Row] = []

    def measure(cases: Iterator[Case]) -> None:
        for case, floor, programs in cases:
            of_case = compare(case, floor, programs, args.rounds)
            print_rows(of_case)
            print_memory([floor, *programs])
            rows.extend(of_case)

    for tokens in args.tokens:
        measure(stack_cases(tokens, formats))
    for tokens in (64, 256):
        measure(scanned_cases(tokens, formats))
    measure(decoding_cases(formats))
    save_json(rows, args.output / "quantised.json")
    print(f"\nWritten: {args.output / 'quantised.json'}")


if __name__ == "__main__":
    main()

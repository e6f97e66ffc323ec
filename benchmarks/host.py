"""What adapters cost the host: Python between steps, compiling, and calls without jit.

    python benchmarks/host.py [--targets 96] [--unrolled 200] [--rounds 60]

The model is a chain of small linear layers, so that there is little else to do. Plain
and adapted programs run in turns. Prints the median of each in milliseconds, and the
median of the ratios of each round.

- A jitted step with Adam: of the whole plain model, and of the adapters, with the
  trees of `lorax.partition` and with lists of their leaves. The time is that of the
  thread that calls it.
- A call without `jax.jit`, of one vector and of a batch, likewise.
- Trace, lower and compile a gradient, for a batch and for one vector. The time is
  that of all threads. Apart is a model that never forms the sum of base and update.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from harness import flag_parser

import eqx_lorax as lorax


WIDTH, RANK, TOKENS = 8, 2, 16

Run = Callable[[], float]
"""Runs once and returns the seconds."""


def make_models(layers: int) -> tuple[Any, Any]:
    keys = jr.split(jr.key(0), layers)
    plain = eqx.nn.Sequential([eqx.nn.Linear(WIDTH, WIDTH, key=key) for key in keys])
    return plain, lorax.loraify(plain, rank=RANK, key=jr.key(1))


def loss(model: Any, x: Any) -> Any:
    return jnp.sum((model(x) if x.ndim == 1 else jax.vmap(model)(x)) ** 2)


def of_thread(fn: Callable[[], Any]) -> Run:
    def run() -> float:
        begin = time.thread_time()
        jax.block_until_ready(fn())
        return time.thread_time() - begin

    return run


def step_of_trees(params: Any, frozen: Any, x: Any) -> Run:
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state, frozen, x):
        def of_params(params):
            return loss(lorax.combine(params, frozen), x)

        value, gradient = jax.value_and_grad(of_params)(params)
        updates, state = optimizer.update(gradient, state, params)
        return eqx.apply_updates(params, updates), state, value

    held = [params, optimizer.init(params)]

    def run() -> Any:
        held[0], held[1], value = step(*held, frozen, x)
        return value

    return of_thread(run)


def step_of_leaves(params: Any, frozen: Any, x: Any) -> Run:
    optimizer = optax.adam(1e-3)
    leaves, treedef = jax.tree.flatten(params)
    frozen_leaves, frozen_treedef = jax.tree.flatten(frozen)

    @jax.jit
    def step(leaves, state, frozen_leaves, x):
        frozen = frozen_treedef.unflatten(frozen_leaves)

        def of_leaves(leaves):
            return loss(lorax.combine(treedef.unflatten(leaves), frozen), x)

        value, gradient = jax.value_and_grad(of_leaves)(leaves)
        updates, state = optimizer.update(gradient, state, leaves)
        return optax.apply_updates(leaves, updates), state, value

    held: list[Any] = [leaves, optimizer.init(leaves)]

    def run() -> Any:
        held[0], held[1], value = step(*held, frozen_leaves, x)
        return value

    return of_thread(run)


def gradient(parts: tuple[Any, Any], x: Any) -> Run:
    """Compiles it, each time anew."""
    params, frozen = parts
    frozen, rest = eqx.partition(frozen, eqx.is_array)

    def run() -> float:
        def of_params(params, frozen, x):
            return loss(eqx.combine(params, frozen, rest), x)

        begin = time.process_time()
        jax.jit(jax.grad(of_params)).lower(params, frozen, x).compile()
        return time.process_time() - begin

    return run


def report(rounds: int, *programs: tuple[str, Run]) -> None:
    """Times programs in turns. The first one is what the ratios are over."""
    for _, run in programs:
        run()  # compiles
    found = [[run() for _, run in programs] for _ in range(rounds)]
    for i, (name, _) in enumerate(programs):
        milliseconds = 1000 * statistics.median(row[i] for row in found)
        ratio = statistics.median(row[i] / row[0] for row in found)
        print(f"{name:<44}{milliseconds:>10.2f}{ratio:>8.2f}", flush=True)


def each(rounds: int, name: str, make: Callable[..., Run], *inputs: Any) -> None:
    """Reports `make(x)` for the inputs of the plain and the adapted program."""
    names = ("plain", "adapted")
    report(rounds, *[(f"{name}, {label}", make(x)) for label, x in zip(names, inputs)])


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--targets", type=int, default=96)
    parser.add_argument("--unrolled", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=60)
    flags = parser.parse_args()

    vector, batch = jnp.ones(WIDTH), jnp.ones((TOKENS, WIDTH))
    plain, adapted = make_models(flags.targets)
    whole = eqx.partition(plain, eqx.is_array)
    parts = lorax.partition(adapted)
    print(f"{'':<44}{'ms':>10}{'ratio':>8}")
    report(
        flags.rounds,
        ("step, full training of the plain model", step_of_trees(*whole, vector)),
        ("step, adapted", step_of_trees(*parts, vector)),
        ("step, adapted, lists of leaves", step_of_leaves(*parts, vector)),
    )

    def call(x: Any) -> Callable[[Any], Run]:
        run = lambda model: model(x) if x.ndim == 1 else jax.vmap(model)(x)  # noqa: E731
        return lambda model: of_thread(lambda: run(model))

    each(flags.rounds, "eager, a vector", call(vector), plain, adapted)
    each(flags.rounds // 4 + 1, "eager, a batch", call(batch), plain, adapted)

    plain, adapted = make_models(flags.unrolled)
    whole = eqx.partition(plain, eqx.is_array)
    programs = (whole, lorax.partition(adapted))
    for name, x, rounds in (
        ("compile, a batch", batch, flags.rounds // 8 + 1),
        ("compile, a vector", vector, 1 + flags.rounds // 30),
    ):
        each(rounds, name, lambda parts, x=x: gradient(parts, x), *programs)


if __name__ == "__main__":
    main()

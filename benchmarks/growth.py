"""How the time to adapt a model, and to take the adapters out, grows with its layers.

    python benchmarks/growth.py [--width 64] [--repeats 5]

Prints the median of the repeats, in milliseconds, and the time per layer, which is to
stay the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

import eqx_lorax as lorax


LAYERS = (10, 30, 100, 300, 1000)


def milliseconds(fn: Callable[[], Any], repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(eqx.filter(fn(), eqx.is_array))
        return 1000 * (time.perf_counter() - start)

    once()  # compiles
    return statistics.median(once() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()

    key = jax.random.key(0)
    keys = jax.random.split(key, max(LAYERS))
    layers = [eqx.nn.Linear(flags.width, flags.width, key=key) for key in keys]
    print(f"{'layers':>7}{'loraify':>12}{'each':>10}{'unloraify':>12}{'each':>10}")
    for count in LAYERS:
        model = layers[:count]
        adapted = lorax.loraify(model, rank=4, key=key)
        adapt = milliseconds(
            lambda model=model: lorax.loraify(model, rank=4, key=key), flags.repeats
        )
        merge = milliseconds(
            lambda adapted=adapted: lorax.unloraify(adapted), flags.repeats
        )
        print(
            f"{count:>7}{adapt:>12.1f}{adapt / count:>10.3f}"
            f"{merge:>12.1f}{merge / count:>10.3f}"
        )


if __name__ == "__main__":
    main()

"""How much of a small adapter survives in the output of a bfloat16 model.

    python benchmarks/precision.py

A 1024 × 1024 base in bfloat16 and adapters of relative size `|s B A| / |W|`. Prints the
share of their effect that is in the output: the regression of the difference between
the outputs with and without the adapter on what it is in float64. One is perfect.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqx_lorax as lorax


WIDTH, RANK, TOKENS = 1024, 8, 512


def naive(linear: eqx.nn.Linear, b: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
    """What one writes in a minute."""
    return x @ linear.weight.T + (x @ a.T) @ b.T


def merged(
    linear: eqx.nn.Linear, b: jax.Array, a: jax.Array, x: jax.Array
) -> jax.Array:
    return x @ (linear.weight + b @ a).T


def share(with_adapter: jax.Array, without: jax.Array, expected: np.ndarray) -> float:
    difference = np.asarray(with_adapter, float) - np.asarray(without, float)
    return float((difference * expected).sum() / (expected * expected).sum())


def main() -> None:
    keys = jr.split(jr.key(0), 4)
    linear = eqx.nn.Linear(
        WIDTH, WIDTH, use_bias=False, dtype=jnp.bfloat16, key=keys[0]
    )
    x = jr.normal(keys[1], (TOKENS, WIDTH), jnp.bfloat16)
    fresh: Any = lorax.loraify(linear, rank=RANK, key=keys[2])
    base = np.linalg.norm(np.asarray(linear.weight, float))
    print(f"{'relative size':<16}{'lorax':>9}{'naive':>9}{'merged':>9}")
    for size in (1e-4, 1e-3, 1e-2):
        b = jr.normal(keys[3], fresh.weight.b.shape)
        a = np.asarray(fresh.weight.a, float)
        b = jnp.asarray(b * size * base / np.linalg.norm(np.asarray(b) @ a))
        adapted = eqx.tree_at(lambda layer: layer.weight.b, fresh, b)
        expected = np.asarray(x, float) @ a.T @ np.asarray(b, float).T
        narrow = b.astype(jnp.bfloat16), fresh.weight.a.astype(jnp.bfloat16)
        nothing = jnp.zeros_like(narrow[0]), narrow[1]
        shares = [
            share(jax.vmap(adapted)(x), jax.vmap(linear)(x), expected),
            share(naive(linear, *narrow, x), naive(linear, *nothing, x), expected),
            share(merged(linear, *narrow, x), merged(linear, *nothing, x), expected),
        ]
        print(f"{size:<16.0e}" + "".join(f"{x:>9.3f}" for x in shares))


if __name__ == "__main__":
    main()

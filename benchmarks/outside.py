"""The cost of adapting outside a step: the README program of jax-lorax, at full size.

    python benchmarks/outside.py [--dim 5000] [--layers 30]

There are thirty matrices of 5000 × 5000, three gigabytes. Prints the seconds that
`loraify` takes for them, cold and warm, and the memory that it adds; the bytes of
Adam's state; and the ratio of a step, which takes one vector, to its floor: the same
forward and backward pass with all matrices frozen. The step does not return the frozen
matrices.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from harness import compare, flag_parser, print_rows, timed
from steps import frozen, step

import eqx_lorax as lorax


RANK = 64


def readme(params: Sequence[Any], x: Any) -> Any:
    for massive_w in params:
        x = jax.nn.relu(x @ massive_w)
    return jnp.sum(x)


def count_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--dim", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=30)
    flags = parser.parse_args()
    dim = flags.dim
    rank = min(RANK, dim)

    def make(key: Any) -> Any:
        # Drawn from a few rows, which is faster; the values do not matter.
        w = jnp.tile(jr.normal(key, (dim, 10)) / dim**0.5, (1, -(-dim // 10)))[:, :dim]
        linear = eqx.filter_eval_shape(
            lambda: eqx.nn.Linear(dim, dim, use_bias=False, key=key)
        )
        return eqx.tree_at(lambda layer: layer.weight, linear, w)

    model = [make(key) for key in jr.split(jr.key(0), flags.layers)]
    jax.block_until_ready([layer.weight for layer in model])
    adapt = lambda: lorax.loraify(model, rank=rank, key=jr.key(1))  # noqa: E731
    cold, adapted = timed(adapt)
    warm, adapted = timed(adapt)
    shared = all(
        new.weight.w is old.weight for new, old in zip(adapted, model, strict=True)
    )
    params, _ = lorax.partition(adapted)
    state = count_bytes(optax.adam(1e-3).init(params))
    print(
        f"{flags.layers} × ({dim} × {dim}), rank {rank}: "
        f"{count_bytes(model) / 1e9:.2f} GB"
    )
    print(f"loraify, cold           {cold:8.3f} s")
    print(f"loraify, warm           {warm:8.3f} s")
    print(f"bases shared            {str(shared):>8}")
    print(f"factors                 {count_bytes(params) / 1e9:8.3f} GB")
    print(f"state of Adam           {state / 1e9:8.3f} GB")
    print(f"  over the factors      {state / count_bytes(params):8.5f}")

    weights = [layer.weight for layer in model]
    lora_weights = [layer.weight for layer in adapted]
    is_trained = [weight.trainable() for weight in lora_weights]
    x = jr.normal(jr.key(2), (dim,))
    floor = frozen("plain JAX, frozen", readme, weights, x)
    function = lorax.lora(readme, on_materialise="error")
    program = step("lorax", function, lora_weights, is_trained, x)
    print_rows(compare("jax-lorax's README program, a step", floor, [program], 9))


if __name__ == "__main__":
    main()

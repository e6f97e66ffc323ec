"""The program in the README of the original jax-lorax, with only the import changed.

There are thirty matrices in a plain function, and Adam trains adapters of rank 64. By
default the matrices are small; `--dim 5000` is the size in the README, three gigabytes
of parameters.

The step returns the frozen matrices, and outputs of `jax.jit` are copies.
`donate_argnums` avoids these copies; `--no-donate` runs the step exactly as in the
README.
"""

import argparse
import functools
import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import eqx_lorax as lorax


def model(params: list[Array], x: Float[Array, " dim"]) -> Float[Array, ""]:
    """My model, written in the dark ages before LoRA, using gratuitous amounts of VRAM
    when trained"""
    for massive_w in params:
        x = jax.nn.relu(x @ massive_w)
    return jnp.sum(x)


class Result(NamedTuple):
    losses: list[float]
    difference: float
    seconds_a_step: float
    peak_over_parameters: float


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=1000, help="side of each matrix")
    parser.add_argument("--layers", type=int, default=30, help="number of matrices")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--donate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hand the frozen matrices through a step without a copy",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Result:
    args = parse(argv)
    dim, layers = args.dim, args.layers
    params = [
        jax.random.normal(jax.random.PRNGKey(i), (dim, dim)) / (dim**0.5)
        for i in range(layers)
    ]
    jax.block_until_ready(params)
    size = sum(w.nbytes for w in params)
    optimizer = optax.adam(learning_rate=3e-4)

    # Transform the model code
    lora_model = lorax.lora(model)

    # Tell LoRA what to use as the small dimension of B and A
    rank_constraint = args.rank
    lora_spec = [rank_constraint for param in params]

    # Initialize a set of LoRA factors for each parameter
    lora_params = lorax.init_lora(
        param_tree=params, spec=lora_spec, rng=jax.random.PRNGKey(0)
    )

    # The transformed model has the same call signature, but it can now handle
    # parameters of type lorax.LoraWeight
    lora_model(lora_params, jnp.ones((dim,)))

    # Wrap the optimizer so it will freeze parameters not marked as trainable by the
    # spec
    optimizer = lorax.wrap_optimizer(optimizer, lora_spec)

    # Now the optimizer can be used just like normal
    opt_state = optimizer.init(lora_params)
    del params

    # Normal update function:
    @functools.partial(jax.jit, donate_argnums=(0, 1) if args.donate else ())
    def update_fn(lora_params, opt_state, x):
        grad_fn = jax.value_and_grad(lora_model)
        loss, grad = grad_fn(lora_params, x)

        updates, new_opt_state = optimizer.update(grad, opt_state, params=lora_params)
        updated_params = optax.apply_updates(lora_params, updates)
        return loss, new_opt_state, updated_params

    x = jax.random.normal(jax.random.PRNGKey(0), (dim,))
    losses, seconds = [], []
    for i in range(args.steps):
        start = time.perf_counter()
        loss, opt_state, lora_params = jax.block_until_ready(
            update_fn(lora_params, opt_state, x)
        )
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        print(f"Step: {i} loss: {loss:.4e}")  # Number goes down!

    lora_output = lora_model(lora_params, x)

    # Now we merge the params to get params usable in the original model
    merged_params = lorax.merge_params(lora_params)
    orig_model_output = model(merged_params, x)

    # Verify that the model outputs are the same
    difference = float(orig_model_output - lora_output)
    print(f"Difference between split and merged outputs: {difference:.3e}")

    state = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    peak = _peak_memory()
    print(f"Parameters        {size / 1e9:8.3f} GB")
    print(f"Optimizer state   {state / 1e9:8.3f} GB")
    print(f"Peak of process   {peak / 1e9:8.3f} GB")
    print(f"A step            {sorted(seconds)[len(seconds) // 2]:8.3f} s")
    return Result(
        losses, difference, sorted(seconds)[len(seconds) // 2], (peak - size) / size
    )


def _peak_memory() -> int:
    """Of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()

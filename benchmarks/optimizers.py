"""Compares optimizers for adapters on a small regression: a network is adapted to
another one, all of whose weights differ from its own by noise of full rank.

    python benchmarks/optimizers.py

Every step has new inputs. Each optimizer gets the learning rate, out of the same ones,
with which its last loss on some inputs is smallest. Printed is the last loss on others:
the mean over seeds, the smallest and the largest. One is the loss of the base.
"""

import argparse
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eqx_lorax as lorax


RATES = 10.0 ** np.arange(-3.5, 1.1, 0.5)


def adalora(rate, frozen, steps):
    phases = dict(warmup_steps=steps // 10, final_steps=steps // 3, interval=10)
    optimizer = optax.adam(rate)
    return lorax.adalora(optimizer, target_rank=8, total_steps=steps, **phases)


CASES = {
    "LoRA, Adam": ("lora", lambda r, *_: optax.adam(r)),
    "LoRA, Adam, b2 = 0.95": ("lora", lambda r, *_: optax.adam(r, b2=0.95)),
    "LoRA+, Adam": ("lora", lambda r, *_: lorax.lora_plus(optax.adam(r))),
    "LoRA-Pro, Adam": ("lora", lambda r, *_: lorax.lora_pro(optax.adam(r))),
    "LoRA-Pro, Adam, b2 = 0.95": (
        "lora",
        lambda r, *_: lorax.lora_pro(optax.adam(r, b2=0.95)),
    ),
    "LoRA-FA, Adam": ("lora_fa", lambda r, *_: optax.adam(r)),
    "LoRA-FA corrected, Adam": (
        "lora_fa",
        lambda r, frozen, _: lorax.lora_fa(optax.adam(r), frozen),
    ),
    "AdaLoRA of rank 12, Adam": ("adalora", lambda r, *_: optax.adam(r)),
    "AdaLoRA of rank 12 to 8, Adam": ("adalora", adalora),
}


def loss(model, teacher, x):
    return jnp.mean((jax.vmap(model)(x) - jax.vmap(teacher)(x)) ** 2)


@functools.partial(jax.jit, static_argnames=("name", "steps", "width"))
def compare_rates(key, rates, *, name, steps, width):
    """For each learning rate the last loss on two sets of inputs."""
    method, make = CASES[name]
    keys = jax.random.split(key, 5)
    base = eqx.nn.MLP(64, 16, width, 2, key=keys[0])
    arrays, others = eqx.partition(base, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(arrays)
    leaves = [
        x + 0.5 * jnp.std(x) * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, jax.random.split(keys[1], len(leaves)))
    ]
    teacher = eqx.combine(structure.unflatten(leaves), others)
    sets = jax.random.normal(keys[2], (2, 512, 64))

    rank = 12 if method == "adalora" else 8
    adapted = lorax.loraify(base, rank=rank, method=method, key=keys[3])
    start, frozen = lorax.partition(adapted)

    def run(rate):
        optimizer = make(rate, frozen, steps)

        def step(carry, key):
            params, state = carry
            x = jax.random.normal(key, (128, 64))
            fn = lambda params: loss(eqx.combine(params, frozen), teacher, x)  # noqa: E731
            grads = jax.grad(fn)(params)
            updates, state = optimizer.update(grads, state, params)
            return (eqx.apply_updates(params, updates), state), None

        carry = start, optimizer.init(start)
        (params, _), _ = jax.lax.scan(step, carry, jax.random.split(keys[4], steps))
        model = lorax.combine(params, frozen)
        return [loss(model, teacher, x) / loss(base, teacher, x) for x in sets]

    return jax.lax.map(run, rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--only", default="", help="a part of the names of optimizers")
    settings = parser.parse_args()
    print("| optimizer | learning rate | loss |\n|---|---|---|")
    for name in [name for name in CASES if settings.only in name]:
        losses = [
            compare_rates(
                jax.random.key(seed),
                jnp.asarray(RATES, jnp.float32),
                name=name,
                steps=settings.steps,
                width=settings.width,
            )
            for seed in range(settings.seeds)
        ]
        chosen_by, shown = np.moveaxis(np.array(losses), 1, 0)
        best = np.argmin(np.nan_to_num(chosen_by.mean(0), nan=np.inf))
        found = shown[:, best]
        spread = f"{found.mean():.3f} ({found.min():.3f} to {found.max():.3f})"
        print(f"| {name} | {RATES[best]:.2g} | {spread} |", flush=True)


if __name__ == "__main__":
    main()

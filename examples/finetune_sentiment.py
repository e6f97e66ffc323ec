"""Fine-tune MiniLM, a BERT with 22.6 million parameters, to tell good reviews from bad.

Adapters on its attention and a new head are trained. Everything else stays frozen.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import eqx_lorax as lorax
import minilm
import toolbox
from sentiment import accuracy, Classifier, load_reviews, loss, Reviews


with toolbox.install_hint():
    from matplotlib.figure import Figure
    from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Result:
    accuracy_before: float
    accuracy_after: float
    losses: list[float]
    max_logit_difference: float
    """The largest between the adapted and the merged model."""
    picture: Path
    adapters: tuple[Path, Path]
    """The file of the library's own format, and the folder of PEFT's."""


def main(argv: Sequence[str] | None = None) -> Result | None:
    parser = _parser()
    args = parser.parse_args(argv)
    _check_flags(parser, args)
    train_reviews, test_reviews = load_reviews(args, parser)

    head_key, adapter_key = jr.split(jr.key(args.seed))
    plain = Classifier(minilm.load_minilm(), key=head_key)
    if args.evaluate:
        return evaluate(plain, args.evaluate, test_reviews)
    try:
        model = lorax.loraify(plain, args.targets, rank=args.rank, key=adapter_key)
    except ValueError as error:
        parser.error(str(error))
    print(lorax.summary(model, also="head"), end="\n\n")

    before = accuracy(predict(model, test_reviews), test_reviews)
    print(f"Held-out accuracy before  {before:.3f}  ({args.test_rows:,} reviews)")
    params, frozen = lorax.partition(model, also="head")
    params, optimizer_state, losses = train(params, frozen, train_reviews, args)
    model = lorax.combine(params, frozen)
    logits = predict(model, test_reviews)
    after = accuracy(logits, test_reviews)
    print(f"Held-out accuracy after   {after:.3f}", end="\n\n")

    print_sizes(plain, params, optimizer_state)
    difference = check_merging(model, plain, test_reviews, logits)
    picture = args.output / "sentiment.png"
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    figure.suptitle("LoRA fine-tuning of MiniLM on movie reviews", fontweight="bold")
    toolbox.draw_training(figure, losses, before, after)
    toolbox.save_figure(figure, picture)
    print(f"Loss curve                {picture}")
    adapters = save(model, args.output)
    evaluate_afresh(adapters, args)
    return Result(before, after, losses, difference, picture, adapters)


# Training


@eqx.filter_jit
def step(
    params: PyTree,
    frozen: PyTree,
    optimizer_state: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Reviews,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    """One step. The frozen weights are not returned, so they are never copied."""
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return eqx.apply_updates(params, updates), optimizer_state, value


def train(
    params: PyTree, frozen: PyTree, reviews: Reviews, args: argparse.Namespace
) -> tuple[PyTree, PyTree, list[float]]:
    """Returns the trained `params`, the optimizer's last state, and the loss of each
    step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = optax.adamw(schedule)
    optimizer_state = optimizer.init(params)
    losses: list[float] = []
    progress = tqdm(range(args.steps), desc="Training", unit="step")
    batches = toolbox.batches(reviews, args.batch_size, args.seed)
    for _, batch in zip(progress, batches):
        params, optimizer_state, value = step(
            params, frozen, optimizer_state, optimizer, batch
        )
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return params, optimizer_state, losses


# Evaluation


@eqx.filter_jit
def batch_logits(model: Classifier, batch: Reviews) -> Float[Array, "text 2"]:
    # By default GPUs round the operands of products, so a merged model would differ.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(model)(batch.tokens, batch.mask)


def predict(model: Classifier, reviews: Reviews) -> np.ndarray:
    """The logits of all reviews, computed in batches."""
    starts = range(0, len(reviews.labels), 64)
    parts = [toolbox.rows(reviews, slice(i, i + 64)) for i in starts]
    return np.concatenate([batch_logits(model, part) for part in parts])


def check_merging(
    model: Classifier, plain: Classifier, reviews: Reviews, logits: np.ndarray
) -> float:
    """Merges the adapters and compares with `logits`, which are from the adapted
    model."""
    merged = lorax.unloraify(model)
    if jax.tree.structure(merged) != jax.tree.structure(plain):
        raise RuntimeError("The merged model is not of the structure of the plain one.")
    return toolbox.check_same_answers(logits, predict(merged, reviews))


# Files


def torch_name(path: str) -> str | None:
    """The name of a module in a PyTorch model with parts `bert` and `head`."""
    return path if path == "head" else minilm.torch_name(path)


def save(model: Classifier, folder: Path) -> tuple[Path, Path]:
    """Saves the adapter and the head in both formats, without the base."""
    file, peft_folder = folder / "sentiment.safetensors", folder / "sentiment_peft"
    lorax.save_adapter(file, model, also="head")
    lorax.peft.save(
        peft_folder,
        model,
        names=torch_name,
        also="head",
        base_model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
    )
    size = file.stat().st_size / 1e6
    print(f"Adapter and head          {file} ({size:.2f} MB)")
    print(f"The same for PEFT         {peft_folder}", end="\n\n", flush=True)
    return file, peft_folder


def evaluate_afresh(adapters: Sequence[Path], args: argparse.Namespace) -> None:
    """Loads the saved files in another process."""
    flags = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("length", "train_rows", "test_rows", "batch_size", "seed")
    ]
    command = [sys.executable, __file__, *flags, "--evaluate", *map(str, adapters)]
    subprocess.run(command, check=True)


def evaluate(plain: Classifier, adapters: Sequence[Path], reviews: Reviews) -> None:
    """Prints the accuracy of saved adapters, without training."""
    for path in adapters:
        if path.is_dir():
            model = lorax.peft.load(path, plain, names=torch_name)
        else:
            model = lorax.load_adapter(path, plain)
        correct = accuracy(predict(model, reviews), reviews)
        print(f"Held-out accuracy of {path.name:22} {correct:.3f}")


# Output


def print_sizes(plain: Classifier, params: PyTree, optimizer_state: PyTree) -> None:
    """Prints the sizes of trained arrays and optimizer state, and those of full
    fine-tuning."""
    full = eqx.filter(plain, eqx.is_inexact_array)
    full_state = eqx.filter_eval_shape(optax.adamw(1e-3).init, full)
    ours = [toolbox.megabytes(x) for x in (params, optimizer_state)]
    theirs = [toolbox.megabytes(x) for x in (full, full_state)]
    print(f"{'':24}{'trained':>12}{'optimizer state':>20}")
    print(f"{'Adapters and head':24}{ours[0]:>12}{ours[1]:>20}")
    print(f"{'Full fine-tuning':24}{theirs[0]:>12}{theirs[1]:>20}", end="\n\n")


# Flags


def _parser() -> argparse.ArgumentParser:
    parser = toolbox.Parser(__doc__)
    # Chosen by the accuracy on 2,000 of the training rows, not on held-out ones.
    parser.add_training_flags(steps=350, rank=8, batch_size=12, learning_rate=3e-3)
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["query", "value"],
        metavar="PATTERN",
        help="what to adapt, such as 'feed_forward' or 'bert.encoder.layers.5.**.key'",
    )
    parser.add_argument(
        "--evaluate",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="adapters that this example has saved, to be evaluated and not trained",
    )
    for name, default, help in [
        ("--length", 40, "tokens to which reviews are cut and padded"),
        ("--train-rows", 7000, "reviews to train on"),
        ("--test-rows", 1024, "reviews to hold out"),
    ]:
        parser.add_argument(name, type=toolbox.positive_int, default=default, help=help)
    return parser


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 3 <= args.length <= 512:
        parser.error("--length must be from 3 to 512, the positions that MiniLM knows")
    if args.train_rows % 2 or args.test_rows % 2:
        parser.error("--train-rows and --test-rows must be even: half are positive")
    if args.batch_size > args.train_rows:
        parser.error("--batch-size must not exceed --train-rows")


if __name__ == "__main__":
    main()

"""Fine-tune SmolLM2, a language model with 135 million parameters, to judge film
reviews in words.

The base is the four-bit weights of its file, which stay as they are.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import eqx_lorax as lorax
import llama
import sentiment
import smollm2
import toolbox
from smollm2 import Batch, Row


with toolbox.install_hint():
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer
    from tqdm import tqdm


if TYPE_CHECKING:
    import pandas as pd


ANSWERS = ["negative", "positive"]


class Reviews(NamedTuple):
    questions: list[str]
    rows: list[Row]
    labels: np.ndarray
    """The index of the answer."""


@dataclasses.dataclass(frozen=True)
class Result:
    accuracy_before: float
    accuracy_after: float
    answers_before: list[str]
    answers_after: list[str]
    losses: list[float]
    picture: Path
    adapters: tuple[Path, Path]
    """The file of the library's own format, and the folder of PEFT's."""


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    file = smollm2.open_file()
    tokenizer = smollm2.load_tokenizer(file)
    train_reviews, test_reviews = load_reviews(tokenizer, args, parser)

    peaks = [toolbox.peak_memory()]
    model = smollm2.load_model(file, args.format)
    peaks.append(toolbox.peak_memory())
    del file  # So that its pages can go.
    toolbox.release_memory()
    model = adapt(model, args, parser)
    summary = lorax.summary(model)
    print(summary, end="\n\n")

    before = accuracy(model, tokenizer, test_reviews)
    print(f"Held-out accuracy before  {before:.3f}  ({args.test_rows:,} reviews)")
    questions = test_reviews.questions[:3]
    answers_before = smollm2.generate(model, tokenizer, questions)
    toolbox.release_memory()
    peaks.append(toolbox.peak_memory())
    params, frozen = lorax.partition(model)
    params, losses = train(params, frozen, train_reviews.rows, args)
    peaks.append(toolbox.peak_memory())
    model = lorax.combine(params, frozen)
    after = accuracy(model, tokenizer, test_reviews)
    print(f"Held-out accuracy after   {after:.3f}", end="\n\n")

    answers_after = smollm2.generate(model, tokenizer, questions)
    for each in zip(questions, answers_before, answers_after):
        print("{}\n  before  {!r}\n  after   {!r}".format(*each), end="\n\n")
    picture = args.output / "smollm2.png"
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    figure.suptitle("SmolLM2 learns to judge film reviews", fontweight="bold")
    toolbox.draw_training(figure, losses, before, after)
    toolbox.save_figure(figure, picture)
    print(f"Loss curve         {picture}")
    adapters = save(model, args.output)
    check_memory(summary, peaks, args)
    return Result(
        before, after, answers_before, answers_after, losses, picture, adapters
    )


# Data


def question(text: str) -> str:
    return f"{text}\nIs this film review positive or negative?"


def load_reviews(
    tokenizer: Tokenizer, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[Reviews, Reviews]:
    """The training reviews and the held-out ones."""
    frame = sentiment.read_snippets()
    if args.train_rows + args.test_rows > len(frame):
        parser.error(f"there are {len(frame):,} reviews to split, fewer than asked for")

    def encoded(part: "pd.DataFrame") -> Reviews:
        ids = [x.ids[: args.length] for x in tokenizer.encode_batch(list(part["text"]))]
        questions = [question(text) for text in tokenizer.decode_batch(ids)]
        labels = part["label"].to_numpy()
        rows = [
            smollm2.encode(tokenizer, text, ANSWERS[label])
            for text, label in zip(questions, labels)
        ]
        return Reviews(questions, rows, labels)

    train, test = sentiment.split(frame, args.train_rows, args.test_rows, args.seed)
    return encoded(train), encoded(test)


# Training


def loss(params: PyTree, frozen: PyTree, batch: Batch) -> Float[Array, ""]:
    """The cross-entropy of the tokens of the answers alone."""
    model = lorax.combine(params, frozen)
    return -smollm2.log_probabilities(model, batch).sum() / (batch.answers >= 0).sum()


@eqx.filter_jit
def step(
    params: PyTree,
    frozen: PyTree,
    optimizer_state: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Batch,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return eqx.apply_updates(params, updates), optimizer_state, value


def train(
    params: PyTree, frozen: PyTree, rows: Sequence[Row], args: argparse.Namespace
) -> tuple[PyTree, list[float]]:
    """Returns the trained `params`, and the loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, max(args.steps // 10, 1), args.steps
    )
    # Gradients of several batches, which need not be in memory together, make a step.
    optimizer = optax.MultiSteps(
        optax.adamw(schedule), args.accumulate
    ).gradient_transformation()
    optimizer_state = optimizer.init(params)
    losses, tokens, start = [], 0, time.perf_counter()
    lengths = [len(row.ids) for row in rows]
    batches = smollm2.batches(lengths, args.batch_size, args.seed)
    progress = tqdm(range(args.steps), desc="Training", unit="step")
    for _ in progress:
        values = []
        for chosen in itertools.islice(batches, args.accumulate):
            batch = smollm2.collate([rows[i] for i in chosen])
            params, optimizer_state, value = step(
                params, frozen, optimizer_state, optimizer, batch
            )
            values.append(float(value))
            tokens += int(batch.mask.sum())
        losses.append(float(np.mean(values)))
        speed = tokens / (time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{speed:.0f}")
    return params, losses


# Evaluation


@eqx.filter_jit
def answer_logits(
    model: llama.Llama, batch: Batch, answers: Int[np.ndarray, "2"]
) -> Float[Array, "row 2"]:
    """The logits of the two answers alone. Only their rows of the table are needed."""
    hidden = jax.vmap(lambda x, mask: model.hidden(x, mask=mask))
    found = hidden(batch.tokens, batch.mask)
    last = found[np.arange(len(found)), batch.positions[:, 0]]
    return last @ jax.vmap(model.embed_tokens)(answers).T


def accuracy(model: llama.Llama, tokenizer: Tokenizer, reviews: Reviews) -> float:
    """How often the right one of the two answers is the more likely one."""
    answers = np.array([tokenizer.token_to_id(answer) for answer in ANSWERS])
    order = np.argsort([len(row.ids) for row in reviews.rows])
    correct = 0
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        batch = smollm2.collate([reviews.rows[i] for i in chosen])
        logits = answer_logits(model, batch, answers)
        correct += int((logits.argmax(1) == reviews.labels[chosen]).sum())
    return correct / len(order)


# Output


def check_memory(
    summary: lorax.Summary, peaks: Sequence[int], args: argparse.Namespace
) -> None:
    """Prints by how much the peak of resident memory grew."""
    floats = 4 * summary.frozen
    loading, _, training = np.diff(peaks)
    for what, size in [
        ("Weights, as they are stored", summary.frozen_bytes),
        ("The same in float32", floats),
        ("Growth of the peak memory by loading", loading),
        ("Growth of the peak memory by training", training),
    ]:
        print(f"{what:38} {size / 1e6:5.0f} MB")
    # Loading takes the blocks twice, as pages of the file and as arrays. Training takes
    # activations, which grow with the batch, the floats of one layer or of the table of
    # words at a time, and what the compiler needs. The whole model in floats would by
    # itself be more than either.
    is_small = args.format == "q4_1" and args.batch_size <= 8
    if is_small and max(loading, training) >= floats:
        raise RuntimeError("Are there the weights in float32 somewhere?")


def adapt(
    model: llama.Llama, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> llama.Llama:
    """Every linear layer gets an adapter. The table of words is none of them."""
    try:
        return lorax.loraify(
            model,
            method=args.method,
            rank=args.rank,
            alpha=2 * args.rank,
            key=jr.key(args.seed),
        )
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def save(model: llama.Llama, folder: Path) -> tuple[Path, Path]:
    """Saves the adapter in both formats, without the base."""
    file, peft_folder = folder / "smollm2.safetensors", folder / "smollm2_peft"
    lorax.save_adapter(file, model)
    lorax.peft.save(
        peft_folder,
        model,
        names=llama.torch_name,
        task_type="CAUSAL_LM",
        base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    print(f"Adapter            {file} ({file.stat().st_size / 1e6:.2f} MB)")
    print(f"The same for PEFT  {peft_folder}")
    return file, peft_folder


# Flags


def _parser() -> argparse.ArgumentParser:
    parser = toolbox.Parser(__doc__)
    # Chosen by the accuracy on 512 of the rows to train on, not on held-out ones.
    parser.add_training_flags(steps=160, rank=8, batch_size=8, learning_rate=1e-3)
    parser.add_argument("--method", default="lora", help="as in `lorax.loraify`")
    parser.add_argument(
        "--format",
        choices=smollm2.FORMATS,
        default="q4_1",
        help="how the frozen weights are stored; 'q4_1' is as in the file",
    )
    parser.add_sizes(
        ("--accumulate", 1, "batches whose gradients are added up for a step"),
        ("--length", 40, "tokens to which reviews are cut"),
        ("--train-rows", 7000, "reviews to train on"),
        ("--test-rows", 512, "reviews to hold out"),
    )
    return parser


if __name__ == "__main__":
    main()

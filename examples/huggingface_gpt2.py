"""Adapt HuggingFace's own GPT-2 in JAX, unchanged, to English.

Its weights are random and its tokens are bytes, so that nothing has to be downloaded.
This shows how to adapt the model, not how good a pretrained one is.
`FlaxGPT2LMHeadModel.from_pretrained("gpt2")` gives a model of the same class, with the
same names for its parameters, and the rest of the program is the same for it.
"""

# They are optional: type checks must pass without them.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

import eqx_lorax as lorax
import toolbox


with toolbox.install_hint("interop"):
    # Without Flax, `transformers` has only a placeholder for the model.
    import flax as flax
    from transformers import FlaxGPT2LMHeadModel, GPT2Config
    from transformers.utils import logging

# Each Flax model warns that the next major version has none.
logging.set_verbosity_error()


class Result(NamedTuple):
    """Losses are for the next byte; the first three are on held-out text."""

    by_frequency: float
    """Of what knows how often each byte occurs, and nothing else."""
    before: float
    after: float
    losses: list[float]
    max_logit_difference: float
    """The largest between the adapted and the merged model."""
    costs: toolbox.Costs
    model: FlaxGPT2LMHeadModel
    spec: PyTree
    adapted: PyTree
    merged: PyTree


def decide(path: Any, args: argparse.Namespace) -> int:
    """Decides what happens to a parameter that is not a vector."""
    # Flax's name for the weights of the projections, in attention and MLP.
    if "kernel" in path:
        return args.rank
    # The embeddings of tokens, which are also the head, and of positions.
    return lorax.LORA_FULL if args.embeddings == "full" else lorax.LORA_FREEZE


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    if args.length < 2:
        parser.error("--length must be at least 2: the first byte is not predicted")
    train_rows, test_rows = toolbox.token_rows(
        toolbox.documentation(), args.length, held_out=64, seed=args.seed
    )
    parser.check_batch_size(args.batch_size, len(train_rows))
    model = make_model(args)

    def logits_of(params: PyTree, tokens: Int[Array, "row seq"]) -> Array:
        return model(tokens, params=params).logits

    spec = lorax.simple_spec(model.params, lambda path, x: decide(path, args))
    try:
        params = lorax.init_lora(model.params, spec, jr.key(args.seed), alpha=args.rank)
    except ValueError as error:
        parser.error(str(error))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = lorax.wrap_optimizer(optax.adamw(schedule), spec)

    adapted_logits_of = lorax.lora(logits_of, on_materialise="error")

    def loss(params: PyTree, tokens: Int[Array, "row seq"]) -> Float[Array, ""]:
        return toolbox.next_token_loss(adapted_logits_of(params, tokens), tokens)

    adapted, optimizer_state, losses = toolbox.fit(
        loss,
        params,
        optimizer,
        toolbox.batches(train_rows, args.batch_size, args.seed),
        steps=args.steps,
        title="Adapting",
    )

    trained = lorax.split_lora_params(adapted, spec)
    costs = toolbox.print_costs(model.params, adapted, trained, optimizer_state)

    # Not destructive, because the model still holds the plain parameters.
    merged = lorax.merge_params(adapted, destructive=False)
    # By default GPUs round the operands of products, so a merged model would differ.
    with jax.default_matmul_precision("highest"):
        plain_logits = jax.jit(logits_of)(model.params, test_rows)
        logits = jax.jit(adapted_logits_of)(adapted, test_rows)
        merged_logits = jax.jit(logits_of)(merged, test_rows)

    before = float(toolbox.next_token_loss(plain_logits, test_rows))
    after = float(toolbox.next_token_loss(logits, test_rows))
    by_frequency = frequency_loss(train_rows, test_rows)
    print("Held-out loss")
    print(f"- of the frequencies of bytes  {by_frequency:.3f}")
    print(f"- before                       {before:.3f}")
    print(f"- after                        {after:.3f}")
    difference = toolbox.print_difference(logits, merged_logits)
    return Result(
        by_frequency,
        before,
        after,
        losses,
        difference,
        costs,
        model,
        spec,
        adapted,
        merged,
    )


def make_model(args: argparse.Namespace) -> FlaxGPT2LMHeadModel:
    """A model with random weights."""
    config = GPT2Config(
        vocab_size=256,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        # The defaults are beyond this vocabulary.
        bos_token_id=0,
        eos_token_id=0,
    )
    return FlaxGPT2LMHeadModel(config, seed=args.seed)


def frequency_loss(
    train_rows: Int[Array, "row seq"], test_rows: Int[Array, "row seq"]
) -> float:
    """The loss of a model that only knows how often each byte occurs. A lower loss
    means that a model has learned from the previous bytes."""
    counts = jnp.bincount(train_rows.ravel(), length=256) + 1
    logits = jnp.broadcast_to(jnp.log(counts), (*test_rows.shape, 256))
    return float(toolbox.next_token_loss(logits, test_rows))


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    parser.add_training_flags(
        steps=250, rank=8, batch_size=16, learning_rate=3e-3, has_picture=False
    )
    parser.add_sizes(
        ("--layers", 2, "blocks of the model"),
        ("--width", 64, "size of a token's vector"),
        ("--heads", 4, "heads of its attention"),
        ("--length", 64, "bytes of text in an example"),
    )
    parser.add_argument(
        "--embeddings",
        choices=("full", "frozen"),
        default="full",
        help="whether they are trained whole; pretrained ones can stay frozen",
    )
    return parser


if __name__ == "__main__":
    main()

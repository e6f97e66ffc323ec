"""Adapt a Haiku transformer with stacked and scanned layers from prose to programs.

The model learns Python's documentation first, byte by byte. Then adapters learn
Python's own modules. In a stack, the kernels of all layers are one array with a leading
axis for the layers. The adapter has this axis too, so that each layer has its own.
"""

# Haiku is optional: type checks must pass without it.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

import eqx_lorax as lorax
import toolbox


with toolbox.install_hint("interop"):
    import haiku as hk


class HeldOut(NamedTuple):
    """The mean loss for the next byte, on held-out text."""

    prose: float
    programs: float


class Result(NamedTuple):
    before: HeldOut
    after: HeldOut
    losses: list[float]
    max_logit_difference: float
    """The largest between the adapted and the merged model."""
    costs: toolbox.Costs
    spec: PyTree
    plain: PyTree
    adapted: PyTree
    merged: PyTree


def language_model(
    tokens: Int[Array, "row seq"], args: argparse.Namespace
) -> Float[Array, "row seq 256"]:
    """An ordinary Haiku model, without anything for adapters."""
    width, length = args.width, tokens.shape[1]
    normal = hk.initializers.RandomNormal(0.02)
    positions = hk.get_parameter("positions", (args.length, width), init=normal)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))

    def block(x: Array) -> Array:
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        attention = hk.MultiHeadAttention(
            args.heads,
            width // args.heads,
            w_init=hk.initializers.VarianceScaling(1.0),
            model_size=width,
        )
        x = x + attention(y, y, y, mask=causal)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return x + hk.Linear(width)(jax.nn.gelu(hk.Linear(4 * width)(y)))

    x = hk.Embed(256, width)(tokens) + positions[:length]
    x = hk.experimental.layer_stack(args.layers, name="layers")(block)(x)
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    return hk.Linear(256, name="head")(x)


def decide(array: Array, rank: int) -> int | lorax.LoraSpec:
    """Decides what happens to a parameter that is not a vector."""
    if array.ndim == 3:
        # With just a number, all layers would share one of the factors, which `scan`
        # could not slice.
        return lorax.LoraSpec(rank, batch=(0,))
    # The embeddings and the head, and also the stacked biases and scales: these have
    # two axes, so `simple_spec` cannot tell them from matrices.
    return lorax.LORA_FREEZE


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    if args.length < 2:
        parser.error("--length must be at least 2: the first byte is not predicted")
    prose, prose_test = toolbox.token_rows(
        toolbox.documentation(), args.length, held_out=64, seed=args.seed
    )
    programs, programs_test = toolbox.token_rows(
        standard_library(), args.length, held_out=64, seed=args.seed
    )
    parser.check_batch_size(args.batch_size, min(len(prose), len(programs)))

    transformed = hk.without_apply_rng(hk.transform(lambda x: language_model(x, args)))
    model_key, adapter_key = jr.split(jr.key(args.seed))
    fresh = jax.jit(transformed.init)(model_key, prose_test)
    spec = lorax.simple_spec(fresh, lambda path, x: decide(x, args.rank))

    def adapt(params: PyTree) -> PyTree:
        try:
            return lorax.init_lora(params, spec, adapter_key, alpha=args.rank)
        except ValueError as error:
            parser.error(str(error))

    adapt(fresh)  # so that a bad flag is an error before the pretraining

    def loss(params: PyTree, tokens: Int[Array, "row seq"]) -> Float[Array, ""]:
        return toolbox.next_token_loss(transformed.apply(params, tokens), tokens)

    schedule = optax.cosine_decay_schedule(5e-3, args.pretrain_steps)
    plain, _, _ = toolbox.fit(
        loss,
        fresh,
        optax.adamw(schedule),
        toolbox.batches(prose, args.batch_size, args.seed),
        steps=args.pretrain_steps,
        title="Pretraining",
    )

    schedule = optax.cosine_decay_schedule(args.learning_rate, args.steps)
    adapted, optimizer_state, losses = toolbox.fit(
        lorax.lora(loss, on_materialise="error"),
        adapt(plain),
        lorax.wrap_optimizer(optax.adamw(schedule), spec),
        toolbox.batches(programs, args.batch_size, args.seed),
        steps=args.steps,
        title="Adapting",
    )
    trained = lorax.split_lora_params(adapted, spec)
    costs = toolbox.print_costs(plain, adapted, trained, optimizer_state)

    # Not destructive, because the plain parameters are needed for the comparison.
    merged = lorax.merge_params(adapted, destructive=False)
    plain_apply = jax.jit(transformed.apply)
    adapted_apply = jax.jit(lorax.lora(transformed.apply, on_materialise="error"))
    # By default GPUs round the operands of products, so a merged model would differ.
    with jax.default_matmul_precision("highest"):
        tests = prose_test, programs_test
        plain_logits = [plain_apply(plain, test) for test in tests]
        logits = [adapted_apply(adapted, test) for test in tests]
        merged_logits = plain_apply(merged, programs_test)

    before = HeldOut(*map(mean_loss, plain_logits, tests))
    after = HeldOut(*map(mean_loss, logits, tests))
    print(f"{'Held-out loss':20}{'prose':>10}{'programs':>10}")
    print(f"{'Without adapters':20}{before.prose:10.3f}{before.programs:10.3f}")
    print(f"{'With adapters':20}{after.prose:10.3f}{after.programs:10.3f}")
    difference = toolbox.print_difference(logits[1], merged_logits)
    return Result(
        before, after, losses, difference, costs, spec, plain, adapted, merged
    )


def mean_loss(
    logits: Float[Array, "row seq 256"], tokens: Int[Array, "row seq"]
) -> float:
    return float(toolbox.next_token_loss(logits, tokens))


def standard_library() -> bytes:
    """The source of the modules in Python's standard library, without its packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    return b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    parser.add_training_flags(
        steps=200, rank=8, batch_size=16, learning_rate=5e-3, has_picture=False
    )
    parser.add_sizes(
        ("--pretrain-steps", 200, "training steps of the model itself"),
        ("--layers", 3, "layers in the stack"),
        ("--width", 64, "size of a token's vector"),
        ("--heads", 4, "heads of its attention"),
        ("--length", 32, "bytes of text in an example"),
    )
    return parser


if __name__ == "__main__":
    main()

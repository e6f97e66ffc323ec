"""Adapt a transformer in Haiku, its layers stacked and scanned, from prose to programs.

It learns Python's documentation first, byte by byte, and then adapters learn Python's
own modules. In a stack the kernels of all layers are one array, with an axis for the
layers; its adapter has that axis too, so that each layer has one of its own.
"""

# Haiku is optional, and this file is checked also where it is not installed.
# pyright: reportMissingImports=false

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PyTree

import eqx_lorax as lorax
import toolbox


with toolbox.install_hint("interop"):
    import haiku as hk


class Result(NamedTuple):
    """Losses are those of the next byte; all but `losses` are on held-out text."""

    prose_before: float
    prose_after: float
    programs_before: float
    programs_after: float
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
    """Written for Haiku, with no thought of adapters."""
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


def decide(path: Any, array: Array, rank: int) -> int | lorax.LoraSpec:
    """What becomes of a parameter."""
    if array.ndim == 3:
        # Else the adapters of all layers would share a factor, which has no axis for
        # the layers and cannot go through their `scan`.
        return lorax.LoraSpec(rank, batch=(0,))
    # The embeddings and the head, and also the biases and scales of all layers: stacked
    # they have two axes, so that `simple_spec` cannot tell them from matrices.
    return lorax.LORA_FREEZE


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    prose, prose_test = toolbox.token_rows(
        toolbox.documentation(), args.length, held_out=64, seed=args.seed
    )
    programs, programs_test = toolbox.token_rows(
        standard_library(), args.length, held_out=64, seed=args.seed
    )

    transformed = hk.without_apply_rng(hk.transform(lambda x: language_model(x, args)))
    model_key, adapter_key = jr.split(jr.key(args.seed))
    fresh = jax.jit(transformed.init)(model_key, prose_test)
    spec = lorax.simple_spec(fresh, lambda path, x: decide(path, x, args.rank))

    def adapt(params: PyTree) -> PyTree:
        try:
            return lorax.init_lora(params, spec, adapter_key, alpha=args.rank)
        except ValueError as error:
            parser.error(str(error))

    adapt(fresh)  # so that a bad flag is found before the pretraining

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

    # Not destructive, because the plain parameters are still to be compared with.
    merged = lorax.merge_params(adapted, destructive=False)
    plain_apply = jax.jit(transformed.apply)
    adapted_apply = jax.jit(lorax.lora(transformed.apply, on_materialise="error"))
    # By default GPUs round the operands of products, so that a merged model differs.
    with jax.default_matmul_precision("highest"):
        before = [plain_apply(plain, rows) for rows in (prose_test, programs_test)]
        after = [adapted_apply(adapted, rows) for rows in (prose_test, programs_test)]
        merged_logits = plain_apply(merged, programs_test)

    def held_out(logits: Sequence[Array]) -> list[float]:
        pairs = zip(logits, (prose_test, programs_test))
        return [float(toolbox.next_token_loss(*pair)) for pair in pairs]

    table = {"Without adapters": held_out(before), "With adapters": held_out(after)}
    print(f"{'Held-out loss':20}{'prose':>10}{'programs':>10}")
    for name, (on_prose, on_programs) in table.items():
        print(f"{name:20}{on_prose:10.3f}{on_programs:10.3f}")
    difference = toolbox.print_difference(after[1], merged_logits)
    return Result(
        prose_before=table["Without adapters"][0],
        prose_after=table["With adapters"][0],
        programs_before=table["Without adapters"][1],
        programs_after=table["With adapters"][1],
        losses=losses,
        max_logit_difference=difference,
        costs=costs,
        spec=spec,
        plain=plain,
        adapted=adapted,
        merged=merged,
    )


def standard_library() -> bytes:
    """The source of the modules that come with Python, but for its packages."""
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

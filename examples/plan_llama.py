"""Plan the fine-tuning of Llamas with 1 to 405 billion parameters, from shapes alone.

No weights are allocated and no accelerator is needed, so this runs on a laptop.
Weights, and adapters with them, are sharded over a mesh of devices, `data × model`.
Each row of `data` has sequences of its own. The table shows the bytes on one device and
the least time that a step takes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

import eqx_lorax as lorax
import toolbox


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    layers: int
    heads: int
    key_heads: int
    hidden: int
    vocabulary: int = 128_256
    is_tied: bool = False
    """Whether the last layer is the embedding."""


# Llama 3.1 and, for the first two, 3.2.
MODELS = {
    "1B": Config(2048, 16, 32, 8, 8192, is_tied=True),
    "3B": Config(3072, 28, 24, 8, 8192, is_tied=True),
    "8B": Config(4096, 32, 32, 8, 14_336),
    "70B": Config(8192, 80, 64, 8, 28_672),
    "405B": Config(16_384, 126, 128, 8, 53_248),
}

# From datasheets: dense products in bfloat16, and links in one direction, which is half
# the printed figure. The links of GPUs connect the eight of one machine.
ACCELERATORS = {
    "H100": lorax.Accelerator("H100 SXM", 80e9, 989e12, 3.35e12, 450e9),
    "H200": lorax.Accelerator("H200 SXM", 141e9, 989e12, 4.8e12, 450e9),
    "A100": lorax.Accelerator("A100 SXM", 80e9, 312e12, 2.039e12, 300e9),
    "v5e": lorax.Accelerator("TPU v5e", 16e9, 197e12, 0.819e12, 200e9),
    "v5p": lorax.Accelerator("TPU v5p", 95e9, 459e12, 2.765e12, 600e9),
}
MESHES = ["1x1", "2x1", "4x1", "8x1", "8x2", "8x4", "8x8", "16x8", "32x8"]


# The model, without LoRA


class Block(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    attention_norm: eqx.nn.RMSNorm
    norm: eqx.nn.RMSNorm
    head_size: int = eqx.field(static=True)

    def __init__(self, config: Config, dtype: jnp.dtype, key: PRNGKeyArray):
        keys = iter(jr.split(key, 7))
        width, size = config.width, config.width // config.heads

        def linear(n_in: int, n_out: int) -> eqx.nn.Linear:
            return eqx.nn.Linear(
                n_in, n_out, use_bias=False, dtype=dtype, key=next(keys)
            )

        self.query = linear(width, width)
        self.key = linear(width, config.key_heads * size)
        self.value = linear(width, config.key_heads * size)
        self.output = linear(width, width)
        self.gate = linear(width, config.hidden)
        self.up = linear(width, config.hidden)
        self.down = linear(config.hidden, width)
        self.attention_norm = rms_norm(width, dtype)
        self.norm = rms_norm(width, dtype)
        self.head_size = size

    def __call__(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        x = x + self.attention(jax.vmap(self.attention_norm)(x))

        def feed_forward(x: Array) -> Array:
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

        return x + jax.vmap(feed_forward)(jax.vmap(self.norm)(x))

    def attention(self, x: Float[Array, "seq width"]) -> Float[Array, "seq width"]:
        def heads(linear: eqx.nn.Linear) -> Float[Array, "seq heads size"]:
            return jax.vmap(linear)(x).reshape(len(x), -1, self.head_size)

        y = jax.nn.dot_product_attention(
            rotated(heads(self.query)),
            rotated(heads(self.key)),
            heads(self.value),
            is_causal=True,
        )
        return jax.vmap(self.output)(y.reshape(x.shape))


class Llama(eqx.Module):
    words: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear | None

    def __init__(self, config: Config, dtype: jnp.dtype, *, key: PRNGKeyArray):
        word_key, block_key, head_key = jr.split(key, 3)
        width, words = config.width, config.vocabulary
        self.words = eqx.nn.Embedding(words, width, dtype=dtype, key=word_key)
        self.blocks = eqx.filter_vmap(lambda key: Block(config, dtype, key))(
            jr.split(block_key, config.layers)
        )
        self.norm = rms_norm(width, dtype)
        self.head = None
        if not config.is_tied:
            self.head = eqx.nn.Linear(
                width, words, use_bias=False, dtype=dtype, key=head_key
            )

    def __call__(self, tokens: Int[Array, " seq"]) -> Float[Array, "seq words"]:
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        # Only the input of each layer is kept; the rest is recomputed.
        @jax.checkpoint
        def body(x: Array, arrays: Block) -> tuple[Array, None]:
            return eqx.combine(arrays, rest)(x), None

        x, _ = jax.lax.scan(body, jax.vmap(self.words)(tokens), arrays)
        x = jax.vmap(self.norm)(x)
        return x @ self.words.weight.T if self.head is None else jax.vmap(self.head)(x)


def rms_norm(width: int, dtype: jnp.dtype) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(width, eps=1e-5, use_bias=False, dtype=dtype)


def rotated(x: Float[Array, "seq heads size"]) -> Float[Array, "seq heads size"]:
    """Applies rotary position embeddings."""
    size = x.shape[-1]
    frequency = 500_000.0 ** (-jnp.arange(0, size, 2) / size)
    angle = jnp.arange(len(x))[:, None, None] * frequency
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def loss(model: Llama, tokens: Int[Array, "row seq"]) -> Float[Array, ""]:
    logits = jax.vmap(model)(tokens).astype(jnp.float32)
    return toolbox.next_token_loss(logits, tokens)


# The plan


def divided(model: Llama, mesh: Mesh | AbstractMesh) -> Llama:
    """The abstract model, with each matrix sharded over both axes of the mesh."""
    model_first = NamedSharding(mesh, P(None, "model", "data"))
    data_first = NamedSharding(mesh, P(None, "data", "model"))
    table = NamedSharding(mesh, P("model", "data"))
    blocks = model.blocks
    shardings = [
        (blocks.query.weight, model_first),
        (blocks.key.weight, model_first),
        (blocks.value.weight, model_first),
        (blocks.output.weight, data_first),
        (blocks.gate.weight, model_first),
        (blocks.up.weight, model_first),
        (blocks.down.weight, data_first),
        (model.words.weight, table),
    ]
    if model.head is not None:
        shardings.append((model.head.weight, table))
    found = {id(x): sharding for x, sharding in shardings}
    replicated = NamedSharding(mesh, P())

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = found.get(id(x), replicated)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, model)


def make_plan(
    config: Config, shape: tuple[int, int], *, rank: int, tokens: int, batch: int
) -> lorax.Plan:
    """The plan for a mesh of `data × model` devices."""
    mesh = AbstractMesh(shape, ("data", "model"))
    key = jr.key(0)
    model = eqx.filter_eval_shape(lambda: Llama(config, jnp.dtype("bfloat16"), key=key))
    model = lorax.loraify(divided(model, mesh), "blocks", rank=rank, key=key)
    sharding = NamedSharding(mesh, P("data"))
    rows = jax.ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=sharding)
    return lorax.plan(loss, model, rows)


# The table


def main(argv: Sequence[str] | None = None) -> list[lorax.Plan]:
    parser = _parser()
    args = parser.parse_args(argv)
    print(
        f"rank {args.rank} on all layers of the blocks, {args.tokens:,} tokens in each "
        "sequence; GB on one device\n"
    )
    print(
        f"{'model':<6}{'device':<10}{'mesh':>6}{'base':>8}{'adapters':>9}{'Adam':>7}"
        f"{'activations':>12}{'total':>8}  {'fits':<5}{'step, s':>8}  bound by"
    )
    plans = []
    meshes = [args.mesh] if args.mesh else MESHES
    for name in args.model:
        made = functools.cache(functools.partial(_made, parser, args, name))
        for accelerator in (ACCELERATORS[kind] for kind in args.accelerator):
            fitting = (m for m in meshes if made(m).total <= accelerator.memory)
            mesh = next(fitting, meshes[-1])
            plans.append(made(mesh))
            bound = made(mesh).bound(accelerator)
            print(line(name, mesh, made(mesh), bound), flush=True)
    return plans


def line(name: str, mesh: str, plan: lorax.Plan, bound: lorax.StepBound) -> str:
    times = {
        "compute": bound.compute,
        "memory": bound.memory,
        "communication": bound.communication,
    }
    # The gradients are as large as the adapters.
    figures = [plan.base, plan.adapters, plan.optimizer, plan.activations, plan.total]
    widths = (8, 9, 7, 12, 8)
    sizes = "".join(f"{x / 1e9:>{width}.2f}" for x, width in zip(figures, widths))
    fits = "yes" if bound.fits else "no"
    head = f"{name:<6}{bound.accelerator.name:<10}{mesh:>6}{sizes}"
    return (
        f"{head}  {fits:<5}{bound.seconds:>8.3f}  {max(times, key=times.__getitem__)}"
    )


def _made(
    parser: toolbox.Parser, args: argparse.Namespace, name: str, mesh: str
) -> lorax.Plan:
    data, model = mesh_shape(mesh)
    batch = data if args.batch is None else args.batch
    if batch % data:
        parser.error(f"--batch {batch} cannot be divided over {data} rows of --mesh")
    try:
        return make_plan(
            MODELS[name], (data, model), rank=args.rank, tokens=args.tokens, batch=batch
        )
    except ValueError as error:
        parser.error(f"{name} on {mesh}: {error}")


def mesh_shape(text: str) -> tuple[int, int]:
    data, model = (toolbox.positive_int(part) for part in text.split("x"))
    return data, model


def mesh_text(text: str) -> str:
    try:
        mesh_shape(text)
    except ValueError:
        message = f"must be two numbers of devices such as 8x4, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return text


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    every = list(MODELS)
    parser.add_argument(
        "--model", nargs="+", choices=every, default=every, help="sizes of Llama"
    )
    kinds = list(ACCELERATORS)
    parser.add_argument(
        "--accelerator", nargs="+", choices=kinds, default=kinds, help="kinds of device"
    )
    parser.add_argument(
        "--mesh",
        type=mesh_text,
        help="devices, as data x model; if not given, the fewest that do",
    )
    parser.add_argument(
        "--batch",
        type=toolbox.positive_int,
        help="sequences for all devices; if not given, one for each row of the mesh",
    )
    parser.add_sizes(
        ("--rank", 16, "rank of the adapters"),
        ("--tokens", 2048, "tokens in a sequence"),
    )
    return parser


if __name__ == "__main__":
    main()

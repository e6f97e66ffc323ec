"""The cases to time: each returns a floor and the programs to compare with it."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import peers
from harness import compiled, Program
from steps import frozen, step
from transformer import FORMS, make_transformer

import eqx_lorax as lorax


LAYERS, WIDTH = 6, 1024
Case = tuple[str, Program, list[Program]]


class Stack(eqx.Module):
    """Linear layers with ReLUs, for one example."""

    layers: list[Any]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class NaiveLora(eqx.Module):
    """A straightforward implementation."""

    linear: eqx.nn.Linear
    b: Any
    a: Any

    def __call__(self, x: Any) -> Any:
        return self.linear(x) + self.b @ (self.a @ x)


def make_stack(dtype: Any, width: int = WIDTH) -> Stack:
    keys = jr.split(jr.key(0), LAYERS)
    layers = [
        eqx.nn.Linear(width, width, use_bias=False, dtype=dtype, key=key)
        for key in keys
    ]
    # The variance of the activations stays the same from layer to layer.
    return Stack(jax.tree.map(lambda w: w * jnp.asarray(6**0.5, w.dtype), layers))


def on_batch(model: Any, x: Any) -> Any:
    return jax.vmap(model)(x)


def raw_layer(w: Any, x: Any) -> Any:
    """A layer in plain JAX, for batches and a weight `(out, in)`."""
    return jax.nn.relu(lax.dot_general(x, w, (((1,), (1,)), ((), ()))))


def raw_stack(weights: list[Any], x: Any) -> Any:
    for w in weights:
        x = raw_layer(w, x)
    return x


def adapted_by(model: Any, rank: int, filter: Any = None, **options: Any) -> Any:
    return lorax.loraify(model, filter, rank=rank, key=jr.key(1), **options)


def the_other_way(adapted: Any) -> tuple[Any, str]:
    """A model in float32 that does not choose by the number of tokens: on a CPU, where
    layers form the sum of base and update if tokens are many, it never does, and
    elsewhere, where they do not, it always does."""
    if jax.default_backend() == "cpu":
        return lorax.merged_forward(adapted, enabled=False), "apart"
    return lorax.merged_forward(adapted), "merged forward"


def naive(model: Stack, rank: int) -> tuple[Stack, Any]:
    def adapt(linear: eqx.nn.Linear) -> NaiveLora:
        dtype, (_, width) = linear.weight.dtype, linear.weight.shape
        a = jr.normal(jr.key(1), (rank, width), dtype) / width**0.5
        return NaiveLora(linear, jnp.zeros((width, rank), dtype), a)

    adapted = Stack([adapt(layer) for layer in model.layers])
    spec = jax.tree.map(lambda _: False, adapted)
    factors = lambda m: [x for layer in m.layers for x in (layer.b, layer.a)]  # noqa: E731
    return adapted, eqx.tree_at(factors, spec, [True] * 2 * LAYERS)


def installed(make: Callable[[], Any]) -> Iterator[Any]:
    """Yields the result of `make`, or only prints a message without the library."""
    try:
        yield make()
    except ImportError as error:
        print(f"(left out: {error})", file=sys.stderr)


def stack_cases(
    tokens: int, rank: int, dtype: Any, width: int = WIDTH
) -> Iterator[Case]:
    name = (
        f"stack of {LAYERS} × {width}², {tokens} tokens, rank {rank}, {dtype.__name__}"
    )
    model = make_stack(dtype, width)
    x = jr.normal(jr.key(2), (tokens, width), dtype)
    weights = [layer.weight for layer in model.layers]
    adapted = adapted_by(model, rank)
    spec = [rank] * LAYERS
    lora_weights = lorax.init_lora(weights, spec, jr.key(1))
    is_trained = jax.tree.map(
        lambda w: w.trainable(), lora_weights, is_leaf=lambda w: hasattr(w, "trainable")
    )
    naive_model, naive_trained = naive(model, rank)
    function = lorax.lora(raw_stack, on_materialise="error")
    programs = [
        frozen("Equinox, frozen", on_batch, model, x),
        step("lorax, module door", on_batch, adapted, lorax.trainable(adapted), x),
        step("lorax, function door", function, lora_weights, is_trained, x),
        step("naive Equinox", on_batch, naive_model, naive_trained, x),
        step("full fine-tuning", raw_stack, weights, [True] * LAYERS, x),
        *installed(lambda: peers.nnx_lora(LAYERS, x, rank)),
        *installed(lambda: peers.qwix_lora(LAYERS, x, rank)),
        *installed(lambda: peers.quax_lora(model, x, rank)),
        *installed(lambda: peers.equimo_lora(model, x, rank)),
    ]
    if dtype == jnp.float32:
        other, how = the_other_way(adapted)
        trained = lorax.trainable(other)
        programs.append(step(f"lorax, {how}", on_batch, other, trained, x))
    else:
        narrow = adapted_by(model, rank, dtype=dtype)
        trained = lorax.trainable(narrow)
        programs.append(step("lorax, narrow factors", on_batch, narrow, trained, x))
    yield name, frozen("plain JAX, frozen", raw_stack, weights, x), programs
    for floor, program in installed(lambda: peers.peft_lora(LAYERS, x, rank)):
        yield f"{name}, PyTorch", floor, [program]


def transformer_cases(
    blocks: int,
    width: int,
    sequences: int,
    length: int = 128,
    dtype: Any = jnp.float32,
) -> Iterator[Case]:
    x = jr.normal(jr.key(2), (sequences, length, width), dtype)
    size = f"{blocks} blocks, d {width}, {sequences} × {length} tokens, {x.dtype.name}"
    for form in FORMS:
        for policy in ("", "checkpoint", "policy"):
            model = jax.tree.map(
                lambda y: y.astype(dtype) if eqx.is_inexact_array(y) else y,
                make_transformer(form, blocks, width, width // 64, policy),
            )
            every, few = (
                adapted_by(model, 8),
                adapted_by(model, 8, ["query_proj", "value_proj"]),
            )
            if dtype == jnp.float32:
                other, how = the_other_way(every)
            else:
                other, how = adapted_by(model, 8, dtype=dtype), "narrow factors"
            programs = [
                step("lorax, all linear", on_batch, every, lorax.trainable(every), x),
                step(
                    f"lorax, all linear, {how}",
                    on_batch,
                    other,
                    lorax.trainable(other),
                    x,
                ),
                step("lorax, query and value", on_batch, few, lorax.trainable(few), x),
                step(
                    "full fine-tuning",
                    on_batch,
                    model,
                    jax.tree.map(eqx.is_inexact_array, model),
                    x,
                ),
            ]
            name = ", ".join(["transformer", size, form, *[policy] * bool(policy)])
            name += ", rank 8"
            yield name, frozen("Equinox, frozen", on_batch, model, x), programs


class Sentences(eqx.Module):
    """MiniLM's layers with a new head, from token vectors to two logits."""

    encoder: Any
    head: eqx.nn.Linear

    def __call__(self, x: Any) -> Any:
        return self.head(self.encoder(x, jnp.ones(len(x), bool)).mean(0))


def minilm_cases(texts: int, length: int) -> Iterator[Case]:
    """Fine-tuning the pretrained model of the examples, with a head."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))
    import minilm

    bert = minilm.load_minilm()
    size = bert.embeddings.words.embedding_size
    model = Sentences(bert.encoder, eqx.nn.Linear(size, 2, key=jr.key(0)))
    x = jr.normal(jr.key(2), (texts, length, size))

    def program(name: str, filter: Any) -> Program:
        adapted = adapted_by(model, 8, filter)
        return step(name, on_batch, adapted, lorax.trainable(adapted, also="head"), x)

    programs = [
        program("lorax, all linear", "encoder"),
        program("lorax, query and value", ["query", "value"]),
        step(
            "full fine-tuning",
            on_batch,
            model,
            jax.tree.map(eqx.is_inexact_array, model),
            x,
        ),
    ]
    floor = frozen("Equinox, frozen", on_batch, model, x)
    yield f"MiniLM with a head, {texts} × {length} tokens, rank 8", floor, programs


class Convolutions(eqx.Module):
    layers: list[eqx.nn.Conv2d]

    def __init__(self, key: Any, depthwise: bool):
        sizes = [(3, 32, 1), (32, 64, 1), (64, 128, 1), (128, 128, 1)]
        if depthwise:
            sizes.insert(2, (64, 64, 64))
        self.layers = [
            eqx.nn.Conv2d(ins, outs, 3, padding=1, groups=groups, key=k)
            for (ins, outs, groups), k in zip(sizes, jr.split(key, len(sizes)))
        ]

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


def convolution_cases(images: int) -> Iterator[Case]:
    x = jr.normal(jr.key(2), (images, 3, 32, 32))
    for depthwise in (True, False):
        model = Convolutions(jr.key(0), depthwise)
        adapted = adapted_by(model, 8)
        every = jax.tree.map(eqx.is_inexact_array, model)
        programs = [
            step("lorax", on_batch, adapted, lorax.trainable(adapted), x),
            step("full fine-tuning", on_batch, model, every, x),
        ]
        count = "5 convolutions, one depthwise" if depthwise else "4 convolutions"
        floor = frozen("Equinox, frozen", on_batch, model, x)
        yield f"{count}, {images} × 32², rank 8", floor, programs


def inference_cases(dtype: Any) -> Iterator[Case]:
    """Single tokens, as in decoding, which takes the time to read the weights."""
    model = make_stack(dtype)
    x = jr.normal(jr.key(2), (WIDTH,), dtype)

    def program(name: str, model: Any) -> Program:
        arrays, rest = eqx.partition(model, eqx.is_array)
        return compiled(name, lambda a, x: eqx.combine(a, rest)(x), arrays, x)

    programs = [
        program(f"lorax, rank {rank}", adapted_by(model, rank)) for rank in (8, 64)
    ]
    name = f"decoding one token, stack of {LAYERS} × {WIDTH}², {dtype.__name__}"
    yield name, program("Equinox", model), programs


def vmapped_cases() -> Iterator[Case]:
    """A layer under `vmap`, compared with the same weight applied to the whole
    batch."""
    model = make_stack(jnp.float32)
    adapted = adapted_by(model, 8)
    x = jr.normal(jr.key(2), (2048, WIDTH))

    def on_whole(model: Any, x: Any) -> Any:
        for layer in model.layers:
            x = jax.nn.relu(x @ layer.weight.T)
        return x

    trained = lorax.trainable(adapted)
    floor = step("lorax, on a batch", on_whole, adapted, trained, x)
    programs = [step("lorax, vmapped", on_batch, adapted, trained, x)]
    yield f"vmapped and batched, stack of {LAYERS} × {WIDTH}², rank 8", floor, programs


def door_cases() -> Iterator[Case]:
    """The same adapted model through one door, compared with the other."""
    adapted = adapted_by(make_stack(jnp.float32), 8)
    x = jr.normal(jr.key(2), (2048, WIDTH))
    trained = lorax.trainable(adapted)
    floor = step("lorax, module door", on_batch, adapted, trained, x)
    function = lorax.lora(on_batch, on_materialise="error")
    programs = [step("lorax, function door", function, adapted, trained, x)]
    yield f"function and module door, stack of {LAYERS} × {WIDTH}²", floor, programs


def scanned_stack_cases(tokens: int) -> Iterator[Case]:
    """A scan keeps residuals for the backward pass of each layer. No copy of a weight
    may be among them. The weights have 50 MB."""
    layers, rank = 12, 8
    weights = jr.normal(jr.key(0), (layers, WIDTH, WIDTH)) / WIDTH**0.5
    x = jr.normal(jr.key(2), (tokens, WIDTH))

    def scanned(weights: Any, x: Any) -> Any:
        return lax.scan(lambda x, w: (raw_layer(w, x), None), x, weights)[0]

    adapted = lorax.init_lora(weights, lorax.LoraSpec(rank, batch=(0,)), jr.key(1))
    make = eqx.filter_vmap(
        lambda key: eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key)
    )
    modules = adapted_by(make(jr.split(jr.key(0), layers)), rank)

    def scanned_modules(modules: Any, x: Any) -> Any:
        arrays, rest = eqx.partition(modules, eqx.is_array)

        def body(x: Any, arrays: Any) -> Any:
            return jax.nn.relu(jax.vmap(eqx.combine(arrays, rest))(x)), None

        return lax.scan(body, x, arrays)[0]

    function = lorax.lora(scanned, on_materialise="error")
    trained = lorax.trainable(modules)
    programs = [
        step("lorax, function door", function, adapted, adapted.trainable(), x),
        step("lorax, module door", scanned_modules, modules, trained, x),
    ]
    name = f"scanned stack of {layers} × {WIDTH}², {tokens} tokens, rank {rank}"
    yield name, frozen("plain JAX, frozen", scanned, weights, x), programs


def large_groups() -> dict[str, Callable[[], Iterator[Case]]]:
    """Cases that are large enough for a GPU; a CPU needs hours for them."""
    dtypes = jnp.float32, jnp.bfloat16
    stacks = {
        f"stack-{dtype.__name__}-8192-{rank}": functools.partial(
            stack_cases, 8192, rank, dtype, 4096
        )
        for dtype in dtypes
        for rank in (8, 64)
    }
    return stacks | {
        f"transformer-{dtype.__name__}": functools.partial(
            transformer_cases, 6, 2048, 16, 512, dtype
        )
        for dtype in dtypes
    }


def every_case(only: Sequence[str], size: str = "medium") -> Iterator[Case]:
    """`only`: parts of the names of groups, any of which selects a group. `size`:
    `"small"`, `"medium"` or `"large"`."""
    groups = large_groups() if size == "large" else medium_groups(size == "small")
    for name, cases in groups.items():
        if any(part in name for part in only):
            yield from cases()


def medium_groups(small: bool) -> dict[str, Callable[[], Iterator[Case]]]:
    stacks = [
        (tokens, rank, dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
        for tokens in ((256,) if small else (256, 2048, 8192))
        for rank in (8, 64)
    ]
    groups: dict[str, Callable[[], Iterator[Case]]] = {
        f"stack-{dtype.__name__}-{tokens}-{rank}": functools.partial(
            stack_cases, tokens, rank, dtype
        )
        for tokens, rank, dtype in stacks
    }
    return groups | {
        "transformer": lambda: transformer_cases(
            2 if small else 6, 256, 2 if small else 8
        ),
        "minilm": lambda: minilm_cases(*(2, 8) if small else (32, 64)),
        "convolutions": lambda: convolution_cases(4 if small else 32),
        "decoding-float32": lambda: inference_cases(jnp.float32),
        "decoding-bfloat16": lambda: inference_cases(jnp.bfloat16),
        "vmapped": vmapped_cases,
        "doors": door_cases,
        "scanned-stack": lambda: scanned_stack_cases(64),
    }

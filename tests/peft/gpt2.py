"""A GPT-2 in Equinox with matrices stored in either layout, whose head may be its
embedding: a small causal model to compare with that of `transformers`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr


class InOut(eqx.Module):
    """A linear layer with its weight `(in, out)`, as `Conv1D` of `transformers`."""

    weight: jax.Array
    bias: jax.Array

    def __init__(self, n_in, n_out, key):
        self.weight = 0.1 * jr.normal(key, (n_in, n_out))
        self.bias = jnp.zeros(n_out)

    def __call__(self, x):
        return x @ self.weight + self.bias


class Block(eqx.Module):
    attend: eqx.Module
    attended: eqx.Module
    up: eqx.Module
    down: eqx.Module
    norms: list[eqx.nn.LayerNorm]
    heads: int

    def __init__(self, width, heads, linear, key):
        keys = jr.split(key, 4)
        self.attend = linear(width, 3 * width, keys[0])
        self.attended = linear(width, width, keys[1])
        self.up = linear(width, 4 * width, keys[2])
        self.down = linear(4 * width, width, keys[3])
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
        self.heads = heads

    def __call__(self, x):
        y = jax.vmap(self.attend)(jax.vmap(self.norms[0])(x))
        parts = (
            part.reshape(len(x), self.heads, -1) for part in jnp.split(y, 3, axis=-1)
        )
        y = jax.nn.dot_product_attention(*parts, is_causal=True)
        x = x + jax.vmap(self.attended)(y.reshape(x.shape))

        def feed_forward(x):
            return self.down(jax.nn.gelu(self.up(x), approximate=True))

        return x + jax.vmap(feed_forward)(jax.vmap(self.norms[1])(x))


class GPT2(eqx.Module):
    words: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear | None
    """`None` if the table of words serves as one."""

    def __init__(self, words, width, layers, heads, key, *, in_out, is_tied=False):
        keys = jr.split(key, 3 + layers)

        def linear(n_in, n_out, key):
            if in_out:
                return InOut(n_in, n_out, key)
            return eqx.nn.Linear(n_in, n_out, key=key)

        self.words = eqx.nn.Embedding(words, width, key=keys[0])
        self.positions = eqx.nn.Embedding(16, width, key=keys[1])
        self.blocks = [Block(width, heads, linear, key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(width)
        self.head = None
        if not is_tied:
            self.head = eqx.nn.Linear(width, words, use_bias=False, key=keys[2])

    def __call__(self, tokens):
        x = jax.vmap(self.words)(tokens)
        x = x + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        x = jax.vmap(self.norm)(x)
        if self.head is None:
            return x @ self.words.weight.T
        return jax.vmap(self.head)(x)


NAMES = {
    "words": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks.*.attend": "transformer.h.{}.attn.c_attn",
    "blocks.*.attended": "transformer.h.{}.attn.c_proj",
    "blocks.*.up": "transformer.h.{}.mlp.c_fc",
    "blocks.*.down": "transformer.h.{}.mlp.c_proj",
    "blocks.*.norms.0": "transformer.h.{}.ln_1",
    "blocks.*.norms.1": "transformer.h.{}.ln_2",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


def untied(model):
    """The same model with a separate head with equal values."""
    words = model.words.weight
    head = eqx.nn.Linear(*words.shape[::-1], use_bias=False, key=jr.key(0))
    head = eqx.tree_at(lambda head: head.weight, head, jnp.array(words))
    return eqx.tree_at(lambda m: m.head, model, head, is_leaf=lambda x: x is None)

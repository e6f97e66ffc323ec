"""Llama and its relatives (SmolLM2, Qwen2, Qwen3, Mistral) in plain Equinox. Nothing
here refers to LoRA.

Sizes and options are read from the `config.json` of a checkpoint. Modules have the
names that they have in Hugging Face's `transformers`, and compute the same.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, DTypeLike, Float, Int, PRNGKeyArray


MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")


# The configuration


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches low frequencies to longer contexts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options, under Hugging Face's names where there is one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """How many tokens each layer sees, the last included; `None` for all. Empty if all
    layers see all."""
    model_type: str = "llama"

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is not even, as rotations need."
            )
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(
                f"{len(self.windows)} windows for {self.num_hidden_layers} layers."
            )

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `config.json`, or the one in a folder."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The configuration that `config.json` holds.

        Raises `ValueError` for a model of another type, for options that would compute
        something else than the model here, and for sizes that are missing.
        """
        kind = raw.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(
                f"model_type={kind!r} is not implemented, only "
                f"{', '.join(MODEL_TYPES)}."
            )
        _refuse_options(raw)
        sizes = {name: _size(raw, name) for name in _SIZES}
        heads = sizes["num_attention_heads"]
        if raw.get("num_key_value_heads") is None and kind != "llama":
            _size(raw, "num_key_value_heads")  # Raises: their defaults are no sizes.
        head_dim = raw.get("head_dim") if kind != "qwen2" else None
        if head_dim is None and kind == "qwen3":
            head_dim = 128
        if head_dim is None and sizes["hidden_size"] % heads:
            raise ValueError(f"{heads} heads do not divide hidden_size.")
        theta, scaling = _rope(raw)
        attention_bias = kind != "mistral" and bool(raw.get("attention_bias", False))
        return cls(
            **sizes,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=head_dim or sizes["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or attention_bias,
            output_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            windows=_windows(raw),
            model_type=kind,
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Options with the values for which the model here computes the same.
_IMPLEMENTED = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "no_rope_layers": (None, []),
}


def _refuse_options(raw: Mapping[str, Any]) -> None:
    for name, values in _IMPLEMENTED.items():
        value = raw.get(name, values[0])
        if value not in values:
            raise ValueError(
                f"{name}={value!r} is not implemented, only {values[0]!r}."
            )
    quantised = raw.get("quantization_config")
    if quantised and quantised.get("quant_method") != "bitsandbytes":
        raise ValueError(
            "The weights of this checkpoint are quantised (`quantization_config`), and "
            "not by bitsandbytes. Take the checkpoint that it was made from."
        )


def _size(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{name}={value!r} is not a size; it has to be in config.json."
        )
    return value


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # Version 5 of `transformers` has all of it in `rope_parameters`.
    options = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = options.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default" and not any(isinstance(x, dict) for x in options.values()):
        return float(theta), None
    if kind != "llama3":
        raise ValueError(
            f"rope_scaling={options!r} is not implemented, only the type 'llama3'."
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    if missing := [name for name in names if name not in options]:
        raise ValueError(f"rope_scaling of the type 'llama3' lacks {missing}.")
    return float(theta), RopeScaling(**{name: options[name] for name in names})


def _windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    kind, count = raw["model_type"], raw["num_hidden_layers"]
    window = raw.get("sliding_window")
    if kind.startswith("qwen") and not raw.get("use_sliding_window", False):
        window = None
    if kind == "llama" or window is None:
        return ()
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28) if kind.startswith("qwen") else 0
        types = ["full_attention"] * first + ["sliding_attention"] * count
        types = types[:count]
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := set(types) - set(windows):
        raise ValueError(f"layer_types={sorted(unknown)} is not implemented.")
    return tuple(windows[x] for x in types)


# The model


class Attention(eqx.Module):
    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    q_norm: eqx.nn.RMSNorm | None
    k_norm: eqx.nn.RMSNorm | None
    head_dim: int = eqx.field(static=True)

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        width, size = config.hidden_size, config.head_dim
        query, pairs = config.num_attention_heads, config.num_key_value_heads
        bias = config.qkv_bias
        self.q_proj = _linear(width, query * size, bias, dtype, keys[0])
        self.k_proj = _linear(width, pairs * size, bias, dtype, keys[1])
        self.v_proj = _linear(width, pairs * size, bias, dtype, keys[2])
        self.o_proj = _linear(query * size, width, config.output_bias, dtype, keys[3])
        norm = _norm(size, config, dtype) if config.qk_norm else None
        self.q_norm, self.k_norm = norm, norm
        self.head_dim = size

    def project(
        self,
        x: Float[Array, "time hidden"],
        turns: Float[Array, "time half"],
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each `(time, heads, head_dim)`, the first two
        rotated."""
        query, key, value = (
            jax.vmap(linear)(x).reshape(len(x), -1, self.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query = jax.vmap(jax.vmap(self.q_norm))(query)
            key = jax.vmap(jax.vmap(self.k_norm))(key)
        return _rotate(query, turns), _rotate(key, turns), value

    def attend(
        self, query: Array, key: Array, value: Array, sees: Bool[Array, "time source"]
    ) -> Float[Array, "time hidden"]:
        attended = jax.nn.dot_product_attention(query, key, value, mask=sees[None])
        return jax.vmap(self.o_proj)(attended.reshape(len(query), -1))


class FeedForward(eqx.Module):
    gate_proj: eqx.nn.Linear
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        width, wide, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.mlp_bias,
        )
        self.gate_proj = _linear(width, wide, bias, dtype, keys[0])
        self.up_proj = _linear(width, wide, bias, dtype, keys[1])
        self.down_proj = _linear(wide, width, bias, dtype, keys[2])

    def __call__(self, x: Float[Array, "time hidden"]) -> Float[Array, "time hidden"]:
        gate, up = jax.vmap(self.gate_proj)(x), jax.vmap(self.up_proj)(x)
        return jax.vmap(self.down_proj)(jax.nn.silu(gate) * up)


class Block(eqx.Module):
    self_attn: Attention
    mlp: FeedForward
    input_layernorm: eqx.nn.RMSNorm
    post_attention_layernorm: eqx.nn.RMSNorm

    def __init__(self, config: LlamaConfig, dtype: DTypeLike, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.self_attn = Attention(config, dtype, key=keys[0])
        self.mlp = FeedForward(config, dtype, key=keys[1])
        self.input_layernorm = _norm(config.hidden_size, config, dtype)
        self.post_attention_layernorm = _norm(config.hidden_size, config, dtype)

    def project(
        self, x: Float[Array, "time hidden"], turns: Float[Array, "time half"]
    ) -> tuple[Array, Array, Array]:
        return self.self_attn.project(jax.vmap(self.input_layernorm)(x), turns)

    def finish(
        self,
        x: Float[Array, "time hidden"],
        projected: tuple[Array, Array, Array],
        sees: Bool[Array, "time source"],
    ) -> Float[Array, "time hidden"]:
        x = x + self.self_attn.attend(*projected, sees)
        return x + self.mlp(jax.vmap(self.post_attention_layernorm)(x))


class Cache(eqx.Module):
    """Keys and values of the tokens so far, for all layers."""

    keys: Float[Array, "layer length heads head_dim"]
    values: Float[Array, "layer length heads head_dim"]
    position: Int[Array, ""]
    """How many tokens there are."""


class Llama(eqx.Module):
    """Takes one text, as token ids, and returns logits of each next token. Use
    `jax.vmap` for a batch.

    `layers` is *one* block whose arrays have a leading axis for the layers, over which
    `jax.lax.scan` runs. Where embeddings are tied, `lm_head` is `None`.
    """

    embed_tokens: eqx.nn.Embedding
    layers: Block
    norm: eqx.nn.RMSNorm
    lm_head: eqx.nn.Linear | None
    config: LlamaConfig = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        checkpoint: bool = True,
        key: PRNGKeyArray,
    ):
        """`checkpoint` says whether the inside of each layer is computed again for
        gradients, instead of kept."""
        keys = jr.split(key, 3)
        words, width = config.vocab_size, config.hidden_size
        self.embed_tokens = eqx.nn.Embedding(words, width, dtype=dtype, key=keys[0])
        self.layers = eqx.filter_vmap(lambda key: Block(config, dtype, key=key))(
            jr.split(keys[1], config.num_hidden_layers)
        )
        self.norm = _norm(width, config, dtype)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = _linear(width, words, False, dtype, keys[2])
        self.config = config
        self.checkpoint = checkpoint

    def __call__(
        self,
        tokens: Int[Array, " time"],
        *,
        mask: Bool[Array, " time"] | None = None,
        positions: Int[Array, " chosen"] | None = None,
    ) -> Float[Array, "chosen vocab"]:
        """The logits after each token, or only after those at `positions`. `mask` is
        false at padding, on whichever side."""
        x = self.hidden(tokens, mask=mask)
        return self.logits(x if positions is None else x[positions])

    def hidden(
        self, tokens: Int[Array, " time"], *, mask: Bool[Array, " time"] | None = None
    ) -> Float[Array, "time hidden"]:
        """What `logits` takes, for each token."""
        time = jnp.arange(len(tokens))
        turns = _turns(self.config, time)
        causal = time <= time[:, None]
        if mask is not None:
            causal = causal & mask
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        def body(x: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, None]:
            block, window = eqx.combine(inputs[0], rest), inputs[1]
            sees = causal & _is_near(time, time, window)
            return block.finish(x, block.project(x, turns), sees), None

        if self.checkpoint:
            body = jax.checkpoint(body)
        x = jax.vmap(self.embed_tokens)(tokens)
        x, _ = jax.lax.scan(body, x, (arrays, self._windows()))
        return jax.vmap(self.norm)(x)

    def logits(self, x: Float[Array, "chosen hidden"]) -> Float[Array, "chosen vocab"]:
        if self.lm_head is not None:
            return jax.vmap(self.lm_head)(x)
        return x @ self.embed_tokens.weight.T

    def init_cache(self, length: int) -> Cache:
        """An empty cache for at most `length` tokens."""
        config = self.config
        shape = (length, config.num_key_value_heads, config.head_dim)
        dtype = self.norm.weight.dtype  # pyright: ignore[reportOptionalMemberAccess]
        zeros = jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))

    def decode(
        self,
        tokens: Int[ArrayLike, "*time"],
        cache: Cache,
        *,
        count: Int[ArrayLike, ""] | None = None,
        positions: Int[Array, " chosen"] | None = None,
    ) -> tuple[Float[Array, "*chosen vocab"], Cache]:
        """The logits after each of the next tokens, or after the next token, and the
        cache with these tokens in it.

        If `count` is given, only so many of `tokens` are there; the rest is padding,
        whose logits mean nothing. Logits after more tokens than the cache has room for
        are NaN.
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim == 0:
            logits, cache = self.decode(tokens[None], cache)
            return logits[0], cache
        time = cache.position + jnp.arange(len(tokens))
        length = cache.keys.shape[1]
        source = jnp.arange(length)
        turns = _turns(self.config, time)
        causal = source <= time[:, None]
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        # The cache is carried whole, so that it is changed where it lies.
        def body(carry: tuple[Array, Array, Array], inputs: Any) -> tuple[Any, None]:
            (x, keys, values), (arrays, window, layer) = carry, inputs
            block = eqx.combine(arrays, rest)
            query, key, value = block.project(x, turns)
            keys = keys.at[layer, time].set(key.astype(keys.dtype), mode="drop")
            values = values.at[layer, time].set(value.astype(values.dtype), mode="drop")
            sees = causal & _is_near(time, source, window)
            x = block.finish(x, (query, keys[layer], values[layer]), sees)
            return (x, keys, values), None

        x = jax.vmap(self.embed_tokens)(tokens)
        layers = jnp.arange(self.config.num_hidden_layers)
        (x, keys, values), _ = jax.lax.scan(
            body, (x, cache.keys, cache.values), (arrays, self._windows(), layers)
        )
        x = jnp.where(time[:, None] < length, jax.vmap(self.norm)(x), jnp.nan)
        logits = self.logits(x if positions is None else x[positions])
        count = len(tokens) if count is None else count
        return logits, Cache(keys, values, cache.position + count)

    def _windows(self) -> Int[Array, " layer"] | None:
        """For each layer how many tokens it sees, `None` if all see all."""
        if all(window is None for window in self.config.windows):
            return None
        most = np.iinfo(np.int32).max
        return jnp.asarray([most if x is None else x for x in self.config.windows])


def torch_name(path: str) -> str:
    """Where the module at `path` is in Hugging Face's checkpoints; `{}` stands for the
    number of a layer. This is an argument `names` of `lorax.peft`."""
    if path.startswith("layers."):
        return path.replace("layers.", "model.layers.{}.", 1)
    return path if path == "lm_head" else f"model.{path}"


def _linear(
    n_in: int, n_out: int, bias: bool, dtype: DTypeLike, key: PRNGKeyArray
) -> eqx.nn.Linear:
    return eqx.nn.Linear(n_in, n_out, use_bias=bias, dtype=dtype, key=key)


def _norm(size: int, config: LlamaConfig, dtype: DTypeLike) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(size, config.rms_norm_eps, use_bias=False, dtype=dtype)


def _is_near(
    time: Int[Array, " time"], source: Int[Array, " source"], window: Array | None
) -> Bool[Array, "time source"]:
    if window is None:
        return jnp.ones((len(time), len(source)), bool)
    return time[:, None] - source < window


def _turns(config: LlamaConfig, time: Int[Array, " time"]) -> Float[Array, "time half"]:
    """The angles of the rotations."""
    return time[:, None].astype(jnp.float32) * jnp.asarray(_frequencies(config))


def _frequencies(config: LlamaConfig) -> np.ndarray:
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is not None:
        # Turns within the original context: many stay, few are stretched.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def _rotate(
    x: Float[Array, "time heads head_dim"], turns: Float[Array, "time half"]
) -> Float[Array, "time heads head_dim"]:
    """Rotates entry `i` of the first half of each head with entry `i` of the second."""
    cos, sin = jnp.cos(turns)[:, None], jnp.sin(turns)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)

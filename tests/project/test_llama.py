"""`examples/llama.py`: against `transformers`, and its cache against itself."""

import dataclasses
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import llama
import numpy as np
import pytest
from helpers import assert_close, filled, run, trained

import eqx_lorax as lorax


pytestmark = pytest.mark.usefixtures("as_for_users")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm2": {
        "model_type": "llama",
        "rope_interleaved": False,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope_theta": 1e6},
    "mistral": {"model_type": "mistral", "head_dim": 6, "sliding_window": 4},
}


def make(family: str) -> llama.Llama:
    config = llama.LlamaConfig.from_dict(SIZES | FAMILIES[family])
    return filled(
        lambda dtype, key: llama.Llama(config, dtype=dtype, key=key),
        jnp.float32,
        jr.PRNGKey(0),
    )


def some_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], shape)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_cache_gives_the_same_logits(family):
    # A prompt of six tokens, padded to eight, then one token after the other.
    model, tokens = make(family), some_tokens(11)
    expected = run(model, tokens)

    @eqx.filter_jit
    def decode(model, tokens, cache, count=None):
        return model.decode(tokens, cache, count=count)

    logits, cache = decode(model, tokens[:8], model.init_cache(11), 6)
    found = [*logits[:6]]
    for token in tokens[6:]:
        logits, cache = decode(model, token, cache)
        found.append(logits)
    assert_close(jnp.stack(found), expected)
    assert cache.position == 11
    assert jnp.isnan(decode(model, tokens[0], cache)[0]).all()  # There is no room.


def test_padding_and_positions_on_adapted_layers():
    model, tokens = make("qwen2"), some_tokens(7)
    model = lorax.loraify(model, ["layers", "embed_tokens"], rank=2, key=jr.key(1))
    model = trained(model)
    expected = run(model, tokens)
    padded = np.concatenate([[1, 1], tokens, [2, 2]])
    mask = (np.arange(11) >= 2) & (np.arange(11) < 9)

    @eqx.filter_jit
    def masked(model, tokens, mask, positions):
        return model(tokens, mask=mask, positions=positions)

    positions = jnp.asarray([8, 3])
    found = masked(model, jnp.asarray(padded), jnp.asarray(mask), positions)
    assert_close(found, expected[jnp.asarray([6, 1])])
    assert found.shape == (2, SIZES["vocab_size"])


@pytest.mark.parametrize(
    "option, message",
    [
        ({"model_type": "gemma"}, "'gemma' is not implemented, only llama, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "only the type 'llama3'"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, "rope_scaling="),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks"),
        ({"quantization_config": {"bits": 4}}, "are quantised"),
        ({"hidden_size": None}, "hidden_size=None is not a size"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"head_dim": 5}, "not even"),
        (
            {"model_type": "mistral", "num_key_value_heads": None},
            "num_key_value_heads=None",
        ),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["chunked_attention"] * 3,
            },
            "chunked_attention",
        ),
    ],
)
def test_what_would_compute_something_else_is_refused(option, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SIZES | {"model_type": "llama"} | option))
    with pytest.raises(ValueError, match="config.json: .*") as error:
        llama.LlamaConfig.from_file(tmp_path)
    assert message in str(error.value)


def test_configurations_of_two_versions_are_the_same():
    old = SIZES | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3}
    new = SIZES | {"model_type": "llama"}
    new["rope_parameters"] = {"rope_theta": 500.0, **LLAMA3}
    config = llama.LlamaConfig.from_dict(old)
    assert llama.LlamaConfig.from_dict(new) == config
    assert config.head_dim == 8 and hash(config) == hash(dataclasses.replace(config))


# Against `transformers`


@pytest.mark.interop
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    raw = SIZES | FAMILIES[family]
    config = AutoConfig.for_model(**raw)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.2)
    read = llama.LlamaConfig.from_dict(config.to_dict())
    assert read == llama.LlamaConfig.from_dict(raw)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    model = eqx.filter_eval_shape(llama.Llama, read, key=jr.key(0))
    model = lorax.peft.load_weights(tmp_path / "theirs", model, names=llama.torch_name)
    tokens = some_tokens(2, 13)
    mask = np.stack([np.arange(13) >= 0, np.arange(13) >= 3])  # padding in the second
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(mask, dtype=torch.long)
        ).logits.numpy()

    @eqx.filter_jit
    def masked(model, tokens, mask):
        return jax.vmap(lambda x, y: model(x, mask=y))(tokens, mask)

    with jax.default_matmul_precision("highest"):
        found = np.asarray(masked(model, tokens, mask))
    assert np.abs(expected).max() > 1
    # Logits at padding mean nothing.
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5, rtol=1e-5)

    # Adapted, merged and written: they compute the same again.
    adapted = lorax.loraify(model, rank=2, key=jr.key(1))
    merged = lorax.unloraify(trained(adapted))
    lorax.peft.save_weights(
        tmp_path / "ours", merged, names=llama.torch_name, max_shard_size="20kB"
    )
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "ours")
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert again.dtype == torch.float32
    with torch.no_grad():
        expected = again(torch.tensor(tokens[0])[None]).logits[0].numpy()
    with jax.default_matmul_precision("highest"):
        found = np.asarray(run(merged, tokens[0]))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)

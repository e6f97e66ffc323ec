"""Causal models of `transformers` compared with the same in Equinox, with adapters that
the real PEFT writes and reads: matrices in either layout, and tied embeddings."""

import json

import equinox as eqx
import gpt2
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny_llama
from helpers import assert_identical, trained
from peft_helpers import (
    AGAINST_PEFT,
    by_peft,
    filled_from,
    in_peft,
    llama_pair,
    numpy,
    ours_on,
    tensor,
)

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT


TOKENS = np.random.default_rng(0).integers(0, 41, (2, 7))
PROJECTIONS = ["attend", "attended", "up", "down"]


def theirs(*, in_out=True, is_tied=False):
    """A GPT-2 in PyTorch, with matrices stored `(in, out)` or `(out, in)`."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=41,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        initializer_range=0.2,
        tie_word_embeddings=is_tied,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for block in model.transformer.h if not in_out else []:
        for module, name in [
            (block.attn, "c_attn"),
            (block.attn, "c_proj"),
            (block.mlp, "c_fc"),
            (block.mlp, "c_proj"),
        ]:
            old = getattr(module, name)
            new = torch.nn.Linear(*old.weight.shape)
            new.weight.data, new.bias.data = old.weight.data.T.clone(), old.bias.data
            setattr(module, name, new)
    return model


def ours_like(model, *, in_out, is_tied=False):
    """The same model in Equinox."""
    named = dict(model.named_parameters())
    theirs_in_out = type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"

    def is_turned(path):
        is_projection = path[-1] == "weight" and path[-2] in PROJECTIONS
        return is_projection and in_out is not theirs_in_out

    plain = gpt2.GPT2(41, 32, 2, 4, jr.key(0), in_out=in_out, is_tied=is_tied)
    plain = filled_from(plain, named, gpt2.NAMES, is_turned)
    expected = numpy(model(tensor(TOKENS)).logits)
    np.testing.assert_allclose(ours_on(plain, TOKENS), expected, atol=1e-5)
    return plain


def assert_same(ours, model, plain):
    expected = numpy(model(tensor(TOKENS)).logits)
    np.testing.assert_allclose(ours_on(ours, TOKENS), expected, atol=2e-5)
    assert np.abs(ours_on(plain, TOKENS) - expected).max() > 0.1


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# Stored (in, out)


EITHER_WAY = pytest.mark.parametrize(
    "here, there", [(here, there) for here in (0, 1) for there in (0, 1)]
)


@EITHER_WAY
def test_either_way_to_peft(here, there, tmp_path):
    model = theirs(in_out=bool(there))
    plain = ours_like(model, in_out=bool(here))
    adapted = trained(lorax.loraify(plain, PROJECTIONS, rank=4, alpha=1, key=jr.key(0)))
    transposed = "blocks" if here else None
    lorax.peft.save(tmp_path, adapted, names=gpt2.NAMES, transposed=transposed)
    assert config_of(tmp_path)["fan_in_fan_out"] is bool(here)
    assert_same(adapted, in_peft(model, tmp_path), plain)


@EITHER_WAY
def test_either_way_from_peft(here, there, tmp_path):
    model = theirs(in_out=bool(there))
    plain = ours_like(model, in_out=bool(here))
    options = dict(r=4, target_modules=["c_attn", "c_proj", "c_fc"])
    model = by_peft(model, tmp_path, lora_alpha=1, **options)
    assert config_of(tmp_path)["fan_in_fan_out"] is bool(there)
    transposed = "blocks" if here else None
    loaded = lorax.peft.load(tmp_path, plain, names=gpt2.NAMES, transposed=transposed)
    assert_same(loaded, model, plain)


@EITHER_WAY
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_whole_models_either_way(here, there, is_tied, tmp_path):
    model = theirs(in_out=bool(there), is_tied=is_tied)
    plain = ours_like(model, in_out=bool(here), is_tied=is_tied)
    kwargs = {
        "names": gpt2.NAMES,
        "transposed": "blocks" if here else None,
        "file_transposed": [f"blocks.*.{x}" for x in PROJECTIONS] if there else None,
        "tied": TIED if is_tied else None,
    }
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    # The head of a tied one is not in the files, and another model may have one.
    whole = gpt2.untied(plain) if is_tied else plain
    blank = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, whole)
    loaded = lorax.peft.load_weights(tmp_path / "theirs", blank, **kwargs)
    assert_identical(loaded, whole)
    # And back, as far as `transformers` has this layout.
    lorax.peft.save_weights(tmp_path / "ours", loaded, max_shard_size="20kB", **kwargs)
    if there:
        again = type(model).from_pretrained(tmp_path / "ours", config=model.config)
        expected = numpy(again.eval()(tensor(TOKENS)).logits)
        np.testing.assert_allclose(ours_on(plain, TOKENS), expected, atol=2e-5)


def test_square_ones_have_to_be_named(tmp_path):
    model = theirs()
    plain = ours_like(model, in_out=True)
    by_peft(model, tmp_path, r=4, target_modules=["attn.c_proj"])
    with pytest.raises(lorax.AdapterFileError, match="c_proj is stored `.in, out.`"):
        lorax.peft.load(tmp_path, plain, names=gpt2.NAMES)


def test_others_are_told_to_be_named(tmp_path):
    model = theirs()
    plain = ours_like(model, in_out=True)
    by_peft(model, tmp_path, r=4, target_modules=["c_attn"])
    with pytest.raises(lorax.AdapterFileError, match="Name it in `transposed`"):
        lorax.peft.load(tmp_path, plain, names=gpt2.NAMES)


# Tied embeddings


TIED = {"words": "lm_head"}
WORDS = ["words", *PROJECTIONS]


def tied_pair():
    model = theirs(is_tied=True)
    return model, ours_like(model, in_out=False, is_tied=True)


def test_tied_words_to_peft(tmp_path):
    model, plain = tied_pair()
    adapted = trained(lorax.loraify(plain, WORDS, rank=4, alpha=1, key=jr.key(0)))
    lorax.peft.save(tmp_path, adapted, names=gpt2.NAMES, tied=TIED)
    assert config_of(tmp_path)["ensure_weight_tying"]
    there = in_peft(model, tmp_path)
    assert_same(adapted, there, plain)
    words = there.get_input_embeddings().lora_embedding_B["default"]
    head = there.get_output_embeddings().lora_A["default"].weight
    assert words.data_ptr() == head.data_ptr()
    loaded = lorax.peft.load(tmp_path, plain, names=gpt2.NAMES, tied=TIED)
    assert_identical(loaded, adapted)


def test_tied_words_from_peft(tmp_path):
    model, plain = tied_pair()
    options = dict(r=4, target_modules=["lm_head", "c_fc"], ensure_weight_tying=True)
    model = by_peft(model, tmp_path, lora_alpha=1, **options)
    loaded = lorax.peft.load(tmp_path, plain, names=gpt2.NAMES, tied=TIED)
    assert_same(loaded, model, plain)
    with pytest.raises(lorax.AdapterFileError, match="nowhere in `model` for lm_head"):
        lorax.peft.load(tmp_path, plain, names=gpt2.NAMES, tied={})


@pytest.mark.parametrize("target", ("wte", "lm_head"))
def test_words_or_a_head_that_peft_adapts_alone(target, tmp_path):
    model, plain = tied_pair()
    # PEFT ties nothing to this name, whatever the options.
    options = dict(ensure_weight_tying=True) if target == "wte" else {}
    targets = [target, "c_fc"]
    model = by_peft(
        model, tmp_path, r=4, lora_alpha=1, target_modules=targets, **options
    )
    with pytest.raises(lorax.AdapterFileError, match="PEFT has adapted .* and not"):
        lorax.peft.load(tmp_path, plain, names=gpt2.NAMES, tied=TIED)
    # This is documented as exact: a separate head.
    untied = gpt2.untied(plain)
    loaded = lorax.peft.load(tmp_path, untied, names=gpt2.NAMES)
    assert_same(loaded, model, plain)
    if target == "wte":
        with pytest.warns(UserWarning, match="nothing else in `model` has its 41 entr"):
            lorax.peft.load(tmp_path, plain, names=gpt2.NAMES)
    lorax.peft.save(tmp_path / "ours", loaded, names=gpt2.NAMES)
    assert_same(loaded, in_peft(model.unload(), tmp_path / "ours"), plain)


def test_tied_words_of_a_llama(tmp_path):
    plain, model = llama_pair(
        jr.key(0),
        is_tied=True,
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
    )
    plain = tiny_llama.Tied(plain)
    names = {f"shared.pytree.{x}": y for x, y in tiny_llama.NAMES.items()}
    tied = {"shared.pytree.words": "lm_head"}
    options = dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = by_peft(model, tmp_path / "theirs", r=4, lora_alpha=1, **options)
    loaded = lorax.peft.load(tmp_path / "theirs", plain, names=names, tied=tied)
    assert_same(loaded, model, plain)
    with pytest.raises(ValueError, match="pytree.words is shared by `eqx.nn.Shared`"):
        lorax.peft.save(tmp_path / "ours", loaded, names=names)
    lorax.peft.save(tmp_path / "ours", loaded, names=names, tied=tied)
    assert_same(loaded, in_peft(model.unload(), tmp_path / "ours"), plain)

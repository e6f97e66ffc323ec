"""Biases trained beside adapters, compared with the real PEFT: `bias` and
`lora_bias`."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_identical, trained
from peft_helpers import (
    AGAINST_PEFT,
    by_peft,
    filled_from,
    in_peft,
    numpy,
    ours_on,
    tensor,
    through_layers,
)

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT


def make_theirs():
    import torch
    from torch import nn

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.layer = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.plain = nn.Linear(6, 6, bias=False)
            self.norm = nn.LayerNorm(6)
            self.conv = nn.Conv1d(6, 5, 3, padding=1)
            self.classifier = nn.Linear(5, 3)

        def forward(self, tokens):
            x = self.words(tokens)
            for layer in self.layer:
                x = torch.cos(layer(x))
            x = self.norm(self.plain(x))
            return self.classifier(self.conv(x.transpose(1, 2)).mean(-1))

    torch.manual_seed(0)
    return Theirs()


class Ours(eqx.Module):
    words: eqx.nn.Embedding
    layers: eqx.nn.Linear
    plain: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 5)
        make = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))
        self.words = eqx.nn.Embedding(11, 6, key=keys[0])
        self.layers = make(jr.split(keys[1], 2))
        self.plain = eqx.nn.Linear(6, 6, use_bias=False, key=keys[2])
        self.norm = eqx.nn.LayerNorm(6)
        self.conv = eqx.nn.Conv1d(6, 5, 3, padding=1, key=keys[3])
        self.head = eqx.nn.Linear(5, 3, key=keys[4])

    def __call__(self, tokens):
        x = through_layers(self.layers, jnp.cos, jax.vmap(self.words)(tokens))
        x = jax.vmap(self.norm)(jax.vmap(self.plain)(x))
        return self.head(self.conv(x.T).mean(-1))


NAMES = {
    "words": "words",
    "layers": "layer.{}",
    "plain": "plain",
    "norm": "norm",
    "conv": "conv",
    "head": "classifier",
}
TOKENS = np.random.default_rng(0).integers(0, 11, (5, 8))


@pytest.fixture
def pair(getkey):
    theirs = make_theirs()
    named = dict(theirs.named_parameters())
    return filled_from(Ours(getkey()), named, NAMES), theirs


def with_other_biases(model, filter=lambda name: True):
    """The model with changes to every bias that PEFT trains."""
    import torch

    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias") and "original_module" not in name and filter(name):
                x += torch.linspace(-0.5, 1, len(x))


@pytest.mark.parametrize("stabilised", (False, True))
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"lora_bias": True, "bias": "lora_only"},
        {"lora_bias": True, "bias": "all"},
    ],
    ids=str,
)
def test_from_peft(options, stabilised, pair, tmp_path):
    ours, theirs = pair
    targets = ["layer.0", "layer.1", "conv"]
    if "lora_bias" not in options:
        targets += ["plain", "words"]
    saved = {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": targets,
        "modules_to_save": ["classifier"],
        "use_rslora": stabilised,
    }
    model = by_peft(theirs, tmp_path, **saved, **options)
    is_trained = {
        "all": lambda name: True,
        "lora_only": lambda name: "base_layer" in name or "lora_B" in name,
        "none": lambda name: "lora_B" in name,
    }
    with_other_biases(model, is_trained[options.get("bias", "none")])
    model.save_pretrained(tmp_path)
    loaded = lorax.peft.load(tmp_path, ours, names=NAMES)
    expected = numpy(model(tensor(TOKENS)))
    np.testing.assert_allclose(ours_on(loaded, TOKENS), expected, atol=1e-5)
    again = in_peft(make_theirs(), tmp_path)
    np.testing.assert_allclose(expected, numpy(again(tensor(TOKENS))), atol=1e-6)
    assert not np.array_equal(loaded.layers.bias, ours.layers.bias)
    assert np.array_equal(loaded.norm.bias, ours.norm.bias) == (
        options.get("bias") != "all"
    )


BIASES = ["layers.bias", "conv.bias"]


@pytest.mark.parametrize(
    "also, option, whole",
    [
        (BIASES, "lora_only", None),
        # PEFT also has the others, unchanged.
        (["layers.bias"], "lora_only", None),
        ([*BIASES, "norm.bias", "head.bias"], "all", None),
        ([*BIASES, "norm.bias", "head"], "all", ["classifier"]),
        ([*BIASES, "head"], "lora_only", ["classifier"]),
        ([*BIASES, "norm"], "lora_only", ["norm"]),
        (["norm.bias"], "none", ["norm"]),
        (["head"], "none", ["classifier"]),
    ],
    ids=str,
)
def test_to_peft(also, option, whole, pair, tmp_path, getkey):
    ours, theirs = pair
    filter = ["words", "layers", "plain", "conv"]
    adapted = trained(lorax.loraify(ours, filter, rank=2, alpha=3, key=getkey()))
    also_trained = lorax.trainable(adapted, also=also)
    adapters = lorax.trainable(adapted)
    moved = jax.tree.map(
        lambda x, is_trained, is_factor: x + 0.3 if is_trained and not is_factor else x,
        adapted,
        also_trained,
        adapters,
    )
    lorax.peft.save(tmp_path, moved, names=NAMES, also=also)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == (option, whole)
    expected = numpy(in_peft(theirs, tmp_path)(tensor(TOKENS)))
    np.testing.assert_allclose(ours_on(moved, TOKENS), expected, atol=1e-5)
    assert np.abs(ours_on(adapted, TOKENS) - expected).max() > 0.005
    assert_identical(lorax.peft.load(tmp_path, ours, names=NAMES), moved)


def test_a_bias_of_the_adapter_without_one_of_the_layer(pair, tmp_path):
    ours, theirs = pair
    by_peft(theirs, tmp_path, r=2, target_modules=["plain", "conv"], lora_bias=True)
    with pytest.raises(lorax.AdapterFileError, match="plain has a bias of its adapter"):
        lorax.peft.load(tmp_path, ours, names=NAMES)


@pytest.mark.parametrize(
    "option, lost", [("all", "norm.bias"), ("lora_only", "conv.base_layer.bias")]
)
def test_a_lost_bias(option, lost, pair, tmp_path):
    from safetensors.numpy import load_file, save_file

    ours, theirs = pair
    by_peft(theirs, tmp_path, r=2, target_modules=["conv"], bias=option)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model." + lost]
    save_file(tensors, path)
    name = lost.partition(".")[0]
    with pytest.raises(lorax.AdapterFileError, match=f"there is no bias of {name}"):
        lorax.peft.load(tmp_path, ours, names=NAMES)

"""Names that PEFT's matching confuses with others. The same modules are adapted and
saved as a whole as here, compared with the real PEFT."""

import json
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_identical, trained
from peft_helpers import AGAINST_PEFT

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT


def theirs_of(names):
    """A PyTorch model of linear layers at these paths, applied one after another."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    root = nn.Module()
    for name in names:
        *around, last = name.split(".")
        at = root
        for part in around:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.add_module(last, nn.Linear(4, 4))

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in root.named_children():
                self.add_module(name, module)

        def forward(self, x):
            for name in names:
                at = self
                for part in name.split("."):
                    at = at.get_submodule(part)
                x = torch.cos(at(x)) + x
            return x

    return Theirs()


class Ours(eqx.Module):
    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.cos(layer(x)) + x
        return x


def ours_of(theirs, names):
    modules = dict(theirs.named_modules())
    layers = []
    for name in names:
        layer = eqx.nn.Linear(4, 4, key=jr.key(0))
        arrays = [jnp.asarray(x.detach().numpy()) for x in modules[name].parameters()]
        layers.append(
            eqx.tree_at(lambda layer: [layer.weight, layer.bias], layer, arrays)
        )
    return Ours(layers)


INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def saved_and_loaded(names, adapted, also, folder, known=None, **options):
    """Saves a model with adapters and heads at some of these paths. Returns its
    outputs, those of the model that PEFT loads, and the modules that PEFT changed."""
    import peft
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    theirs = theirs_of(names)
    plain = ours_of(theirs, names)
    mapping = {f"layers.{i}": x for i, x in enumerate(names) if x in (known or names)}
    here = {name: f"layers.{i}" for i, name in enumerate(names)}
    model = plain
    if adapted:
        filter = [here[name] for name in adapted]
        model = lorax.loraify(plain, filter, key=jr.key(1), **{"rank": 2} | options)
        model = trained(model)
    for name in also:
        new = eqx.tree_at(
            lambda m: m.layers[names.index(name)].weight, model, jnp.full((4, 4), 0.3)
        )
        model = new
    also_here = [here[name] for name in also] or None
    lorax.peft.save(folder, model, names=mapping, also=also_here)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        warnings.filterwarnings("error", "The following")
        loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        found = loaded(torch.tensor(INPUTS)).numpy()
    base = loaded.get_base_model()
    kinds = {
        kind: {name for name, x in base.named_modules() if isinstance(x, kind)}
        for kind in (LoraLayer, ModulesToSaveWrapper)
    }
    again = lorax.peft.load(folder, plain, names=mapping)
    assert_identical(again, model)
    np.testing.assert_allclose(jax.vmap(model)(INPUTS), found, atol=1e-5)
    assert np.abs(jax.vmap(plain)(INPUTS) - found).max() > 0.05
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, kinds[LoraLayer], kinds[ModulesToSaveWrapper]


NASTY = [
    "fc",
    "layers.0.fc",
    "layers.1.fc",
    "decoder.layers.1.fc",
    "1.1",
    "11",
    "1.11",
    "21.1",
    "a+b",
    "aab",
    "x.a+b",
    "w(0)",
    "w[0]$",
    "lora_A",
]


@pytest.mark.parametrize(
    "adapted",
    [
        ["fc"],
        ["layers.0.fc"],
        ["layers.1.fc"],
        ["fc", "layers.1.fc"],
        ["1.1", "11"],
        ["21.1"],
        ["a+b"],
        ["aab", "w(0)", "w[0]$"],
        ["x.a+b", "1.11"],
        NASTY[:-1],
    ],
    ids=str,
)
def test_just_these_are_adapted(adapted, tmp_path):
    ranks = {f"layers.{i}": 1 + i % 3 for i, x in enumerate(NASTY) if x in adapted}
    alphas = {f"layers.{i}": 2 + i % 4 for i, x in enumerate(NASTY) if x in adapted}
    _, layers, whole = saved_and_loaded(
        NASTY, adapted, [], tmp_path, rank=ranks, alpha=alphas
    )
    assert (layers, whole) == (set(adapted), set())


def test_modules_that_names_says_nothing_of(tmp_path):
    _, layers, _ = saved_and_loaded(NASTY, ["fc"], [], tmp_path, known=["fc"])
    assert layers == {"fc"}


def test_a_list_where_that_is_exact(tmp_path):
    names = ["layers.0.fc", "layers.1.fc"]
    config, layers, _ = saved_and_loaded(names, names[:1], [], tmp_path)
    assert config["target_modules"] == ["layers.0.fc"]
    assert layers == {"layers.0.fc"}


@pytest.mark.parametrize(
    "head, adapted, is_named",
    [
        ("head", ["layers.0.fc", "c"], True),
        ("score.out", ["layers.0.fc", "layers.out"], True),
        ("a+b", ["layers.0.fc"], True),
        ("c", ["layers.0.fc"], False),
        ("c", ["layers.0.c", "x.abc"], False),
        ("out", ["attn.q_out", "layers.0.fc"], False),
        ("fc", ["layers.0.fc"], False),
        ("default", ["layers.0.fc"], False),
        ("base_layer", ["layers.0.fc"], False),
        ("w(0", ["layers.0.fc"], False),
        ("a+b", ["aab"], False),
        ("1.1", ["21.1", "11"], False),
    ],
)
def test_heads(head, adapted, is_named, tmp_path):
    names = ["a.first", *adapted, head]
    if is_named:
        config, layers, whole = saved_and_loaded(names, adapted, [head], tmp_path)
    else:
        with pytest.warns(UserWarning, match="cannot name .* alone") as caught:
            config, layers, whole = saved_and_loaded(names, adapted, [head], tmp_path)
        assert any(f"cannot name {head} alone" in str(x.message) for x in caught)
    assert layers == set(adapted)
    assert whole == ({head} if is_named else set())
    assert config["modules_to_save"] == ([head] if is_named else None)


def test_heads_alone(tmp_path):
    _, layers, whole = saved_and_loaded(["a.fc", "head"], [], ["head"], tmp_path)
    assert (layers, whole) == (set(), {"head"})

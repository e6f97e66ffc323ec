"""Each method with the real PEFT, from the same arrays: outputs, gradients of all that
is trained, and folders both ways."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_identical
from peft_helpers import AGAINST_PEFT, in_peft, numpy, ours_on, tensor
from safetensors.numpy import load_file
from small_pair import make_pair, make_theirs, NAMES, TOKENS

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT

LAYERS = ["words", "layer.0", "layer.1", "conv", "image", "classifier"]
LINEAR = ["layer.0", "layer.1", "classifier"]
NO_TABLES = [*LINEAR, "conv", "image"]
# Each method: the name of its configuration in PEFT, options of it, and its weight
# here.
METHODS = {
    "lora": ("LoraConfig", dict(r=2, lora_alpha=3), lorax.LoraWeight),
    "lora, stabilised": (
        "LoraConfig",
        dict(r=2, lora_alpha=3, use_rslora=True),
        lorax.LoraWeight,
    ),
    "dora": ("LoraConfig", dict(r=2, lora_alpha=3, use_dora=True), lorax.DoraWeight),
    "dora, patterns": (
        "LoraConfig",
        dict(
            r=2,
            lora_alpha=3,
            use_dora=True,
            use_rslora=True,
            rank_pattern={"conv": 1},
            alpha_pattern={"image": 5},
        ),
        lorax.DoraWeight,
    ),
    "vera": (
        "VeraConfig",
        dict(r=3, target_modules=LINEAR),
        lorax.VeraWeight,
    ),
    "loha": (
        "LoHaConfig",
        dict(r=2, alpha=3, target_modules=NO_TABLES, rank_pattern={"conv": 1}),
        lorax.LohaWeight,
    ),
    "lokr": (
        "LoKrConfig",
        dict(r=1, alpha=3, target_modules=NO_TABLES, alpha_pattern={"image": 5}),
        lorax.LokrWeight,
    ),
    "lokr, both": (
        "LoKrConfig",
        dict(
            r=1,
            alpha=3,
            target_modules=NO_TABLES,
            decompose_both=True,
            decompose_factor=3,
        ),
        lorax.LokrWeight,
    ),
    "lokr, whole": (
        "LoKrConfig",
        dict(r=4, alpha=3, target_modules=[*LINEAR, "image"]),
        lorax.LokrWeight,
    ),
    "adalora": (
        "AdaLoraConfig",
        dict(
            init_r=3,
            lora_alpha=5,
            total_step=9,
            target_modules=[*LINEAR, "image"],
        ),
        lorax.AdaLoraWeight,
    ),
    "ia3": (
        "IA3Config",
        dict(
            target_modules=["classifier", "image", "layer.0", "layer.1"],
            feedforward_modules=["image", "layer.0", "layer.1"],
        ),
        lorax.Ia3Weight,
    ),
}


@pytest.fixture(params=METHODS)
def case(request, tmp_path, getkey):
    """The base here, the adapted model in PEFT with random numbers in all arrays of its
    adapter, its folder, and the class here."""
    config, options, kind = METHODS[request.param]
    ours, theirs = make_pair(getkey())
    adapted = with_random_adapter(theirs, config, options, tmp_path / "theirs")
    return ours, adapted, tmp_path, kind


def with_random_adapter(theirs, config, options, folder):
    """The model with an adapter by PEFT with random numbers in all of its arrays, which
    is saved to `folder`."""
    import peft
    import torch

    config = getattr(peft, config)(**(dict(target_modules=LAYERS) | options))
    adapted = peft.get_peft_model(theirs, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder)
    return adapted.eval()


def gradients_of(model, folder):
    """The gradients of `sum(outputs²)` here, by their names in PEFT: a model with
    gradients in the place of its arrays is written as any other."""
    params, frozen = lorax.partition(model)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(params):
        return jnp.sum(jax.vmap(lorax.combine(params, frozen))(TOKENS) ** 2)

    lorax.peft.save(folder, lorax.combine(gradient(params), frozen), names=NAMES)
    return load_file(folder / "adapter_model.safetensors")


def gradients_in_peft(model):
    model.zero_grad()
    (model(tensor(TOKENS)) ** 2).sum().backward()
    return list_gradients(model)


def list_gradients(model):
    """The gradients in PyTorch, by their names in files."""
    return {
        name.replace(".default", "").replace("vector.weight", "vector"): numpy(x.grad)
        for name, x in model.named_parameters()
        if x.grad is not None
    }


def outputs(model):
    return ours_on(model, TOKENS)


def test_numbers_and_gradients(case, tmp_path):
    ours, theirs, folder, kind = case
    loaded = lorax.peft.load(folder / "theirs", ours, names=NAMES, trainable=True)
    weights = [x for x in jax.tree.leaves(loaded, is_leaf=is_weight) if is_weight(x)]
    assert weights and all(type(x) is kind for x in weights)
    expected = numpy(theirs(tensor(TOKENS)))
    assert_close(outputs(loaded), expected)
    assert np.abs(outputs(ours) - expected).max() > 1e-3
    found, expected = gradients_of(loaded, tmp_path), gradients_in_peft(theirs)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_folders_both_ways(case):
    ours, theirs, folder, _ = case
    loaded = lorax.peft.load(folder / "theirs", ours, names=NAMES)
    lorax.peft.save(folder / "ours", loaded, names=NAMES)
    again = lorax.peft.load(folder / "ours", ours, names=NAMES)
    assert_identical(again, loaded)
    found = numpy(in_peft(make_theirs(), folder / "ours")(tensor(TOKENS)))
    assert_close(found, numpy(theirs(tensor(TOKENS))))


# Layers that are stored `(in, out)`, as `Conv1D` of `transformers` is.


class InOut(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight + self.bias


IN_OUT = {
    "lora": ("LoraConfig", dict(r=2, lora_alpha=3)),
    "dora": ("LoraConfig", dict(r=2, lora_alpha=3, use_dora=True)),
    "vera": ("VeraConfig", dict(r=3)),
    "adalora": ("AdaLoraConfig", dict(init_r=3, lora_alpha=5, total_step=9)),
    "ia3": ("IA3Config", dict(feedforward_modules=["layer"])),
}


@pytest.mark.parametrize("config, options", IN_OUT.values(), ids=IN_OUT)
def test_layers_that_are_stored_in_out(config, options, tmp_path):
    import torch
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    theirs = torch.nn.ModuleDict({"layer": Conv1D(6, 4)})
    arrays = (jnp.asarray(numpy(getattr(theirs.layer, x))) for x in ("weight", "bias"))
    ours = {"layer": InOut(*arrays)}
    options = dict(target_modules=["layer"], fan_in_fan_out=True) | options
    adapted = with_random_adapter(theirs, config, options, tmp_path / "theirs")
    given = dict(names={"layer": "layer"}, transposed=InOut)
    loaded = lorax.peft.load(tmp_path / "theirs", ours, trainable=True, **given)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    there = adapted.base_model.model.layer(tensor(x))
    assert_close(loaded["layer"](x), numpy(there))
    assert np.abs(ours["layer"](x) - numpy(there)).max() > 1e-3
    (there**2).sum().backward()
    params, frozen = lorax.partition(loaded)
    of_outputs = lambda p: jnp.sum(lorax.combine(p, frozen)["layer"](x) ** 2)  # noqa: E731
    gradient = lorax.combine(eqx.filter_grad(of_outputs)(params), frozen)
    lorax.peft.save(tmp_path / "gradients", gradient, **given)
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    for name, expected in list_gradients(adapted).items():
        assert_close(found[name], expected)
    lorax.peft.save(tmp_path / "ours", loaded, **given)
    again = torch.nn.ModuleDict({"layer": Conv1D(6, 4)})
    again.load_state_dict(adapted.unload().state_dict())
    again = in_peft(again, tmp_path / "ours").base_model.model
    assert_close(numpy(again.layer(tensor(x))), numpy(there))


# A stack of which one layer has another rank, or no adapter.
UNEVEN = {
    "dora, ranks": (
        "LoraConfig",
        dict(r=2, lora_alpha=3, use_dora=True, rank_pattern={"layer.0": 1}),
    ),
    "dora, one layer": (
        "LoraConfig",
        dict(r=2, use_dora=True, target_modules=["layer.1"]),
    ),
    "loha, ranks": (
        "LoHaConfig",
        dict(
            r=2,
            alpha=3,
            target_modules=LINEAR,
            rank_pattern={"layer.0": 1},
            alpha_pattern={"layer.1": 5},
        ),
    ),
    "lokr, scales": (
        "LoKrConfig",
        dict(r=1, alpha=3, target_modules=LINEAR, alpha_pattern={"layer.1": 5}),
    ),
    "vera, one layer": ("VeraConfig", dict(r=2, target_modules=["layer.1"])),
    "ia3, one layer": (
        "IA3Config",
        dict(target_modules=["layer.1"], feedforward_modules=["layer.1"]),
    ),
}


@pytest.mark.parametrize("config, options", UNEVEN.values(), ids=UNEVEN)
def test_stacks_of_which_layers_differ(config, options, tmp_path, getkey):
    ours, theirs = make_pair(getkey())
    adapted = with_random_adapter(theirs, config, options, tmp_path)
    loaded = lorax.peft.load(tmp_path, ours, names=NAMES)
    expected = numpy(adapted(tensor(TOKENS)))
    assert_close(outputs(loaded), expected)


# Starts that are not zero. PEFT changes its base, and here the base stays.
STARTS = {
    "pissa": dict(r=2, lora_alpha=3),
    "olora": dict(r=2, lora_alpha=2),
    "pissa, stabilised": dict(r=2, lora_alpha=3, use_rslora=True),
}


@pytest.mark.parametrize("name, options", STARTS.items(), ids=STARTS)
def test_starts_that_are_not_zero(name, options, tmp_path, getkey):
    import peft

    init = name.partition(",")[0]
    ours, theirs = make_pair(getkey())
    linear = ["layer.0", "layer.1", "classifier"]
    config = peft.LoraConfig(init_lora_weights=init, target_modules=linear, **options)
    theirs = peft.get_peft_model(theirs, config)
    model = lorax.loraify(
        ours,
        ["layers", "head"],
        rank=options["r"],
        alpha=options["lora_alpha"],
        rank_stabilised=options.get("use_rslora", False),
        init=init,
        key=getkey(),
    )
    assert_close(outputs(model), numpy(theirs(tensor(TOKENS))))
    found, expected = gradients_at_start(model), gradients_in_peft(theirs)
    prefix = "base_model.model."
    for path, (b, a) in found.items():
        theirs_b, theirs_a = (
            expected[f"{prefix}{path}.lora_{side}.weight"] for side in "BA"
        )
        # A singular vector has either sign.
        assert_close(b @ b.T, theirs_b @ theirs_b.T)
        assert_close(a.T @ a, theirs_a.T @ theirs_a)
    step = lambda w: eqx.tree_at(lambda w: w.b, w, w.b + 0.1)  # noqa: E731
    model = jax.tree.map(
        lambda x: step(x) if is_weight(x) else x, model, is_leaf=is_weight
    )
    lorax.peft.save(tmp_path, model, names=NAMES)
    found = numpy(in_peft(make_theirs(), tmp_path)(tensor(TOKENS)))
    assert_close(found, outputs(model))
    assert np.abs(found - outputs(ours)).max() > 1e-3
    assert load_config(tmp_path)["r"] == 2 * options["r"]


def gradients_at_start(model):
    """The gradients of `sum(outputs²)` in `b` and `a`, by paths in PyTorch."""
    params, frozen = lorax.partition(model)
    gradient = eqx.filter_grad(
        lambda params: jnp.sum(outputs(lorax.combine(params, frozen)) ** 2)
    )(params)
    layers, head = gradient.layers.weight, gradient.head.weight
    return {
        "layer.0": (layers.b[0], layers.a[0]),
        "layer.1": (layers.b[1], layers.a[1]),
        "classifier": (head.b, head.a),
    }


def test_dora_that_is_measured_from_its_start(tmp_path, getkey):
    ours, theirs = make_pair(getkey())
    filters = ["words", "layers", "conv", "image", "head"]
    options = dict(rank=2, alpha=3.0, init="pissa", method="dora")
    model = lorax.loraify(ours, filters, key=getkey(), **options)
    step = lambda w: eqx.tree_at(lambda w: w.b, w, w.b + 0.1)  # noqa: E731
    model = jax.tree.map(
        lambda x: step(x) if is_weight(x) else x, model, is_leaf=is_weight
    )
    lorax.peft.save(tmp_path, model, names=NAMES)
    found = numpy(in_peft(theirs, tmp_path)(tensor(TOKENS)))
    assert_close(found, outputs(model))
    assert np.abs(found - outputs(ours)).max() > 1e-3


def moved(model):
    """The model with another `b` in each weight."""
    step = lambda weight: eqx.tree_at(lambda w: w.b, weight, weight.b + 0.1)  # noqa: E731
    leaves = lambda x: step(x) if is_weight(x) else x  # noqa: E731
    return jax.tree.map(leaves, model, is_leaf=is_weight)


def load_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_factors_that_peft_exchanges(tmp_path, getkey):
    """PEFT's Kronecker product of a whole `w2` of a `Conv1d` has `w2` first, for want
    of an axis of `w1`, so that it cannot be read as that of other layers."""
    ours, theirs = make_pair(getkey())
    options = dict(r=4, target_modules=["conv"])
    adapted = with_random_adapter(theirs, "LoKrConfig", options, tmp_path)
    conv = adapted.base_model.model.conv
    w1, w2 = (numpy(x["default"]) for x in (conv.lokr_w1, conv.lokr_w2))
    found = numpy(conv.get_delta_weight("default"))
    scale = conv.scaling["default"]
    exchanged = scale * np.kron(w2, w1[:, :, None])
    assert_close(found, exchanged)
    assert not np.allclose(found, scale * np.kron(w1[:, :, None], w2))
    with pytest.raises(lorax.AdapterFileError, match=r"conv: .*kron\(w2, w1\).*Merge"):
        lorax.peft.load(tmp_path, ours, names=NAMES)


# The matrices of VeRA that a seed says here are not those of any seed there.
def test_seeded_vera_to_peft(tmp_path, getkey):
    ours, theirs = make_pair(getkey())
    model = lorax.loraify(
        ours, ["layers", "head"], rank={"head": 2, "*": 3}, method="vera", key=getkey()
    )
    params, frozen = lorax.partition(model)
    model = lorax.combine(jax.tree.map(lambda x: x + 0.3, params), frozen)
    lorax.peft.save(tmp_path, model, names=NAMES)
    found = numpy(in_peft(theirs, tmp_path)(tensor(TOKENS)))
    assert_close(found, outputs(model))
    assert np.abs(found - outputs(ours)).max() > 1e-3
    loaded = lorax.peft.load(tmp_path, ours, names=NAMES)
    assert_close(outputs(loaded), found)


TOKEN_CASES = {
    "with lora": dict(r=2, target_modules=["layer.0", "layer.1"]),
    "with dora": dict(r=2, target_modules=["conv"], use_dora=True),
    "alone": dict(target_modules="dummy-target-modules"),
}


@pytest.mark.parametrize("options", TOKEN_CASES.values(), ids=TOKEN_CASES)
def test_trained_rows(options, tmp_path, getkey):
    ours, theirs = make_pair(getkey())
    base = ours.words.weight
    options = options | dict(trainable_token_indices={"words": [4, 1, 7]})
    adapted = with_random_adapter(theirs, "LoraConfig", options, tmp_path / "theirs")
    loaded = lorax.peft.load(tmp_path / "theirs", ours, names=NAMES, trainable=True)
    assert loaded.words.weight.indices == (4, 1, 7)
    expected = numpy(adapted(tensor(TOKENS)))
    assert_close(outputs(loaded), expected)
    assert np.abs(outputs(ours) - expected).max() > 1e-3
    found = gradients_of(loaded, tmp_path / "gradients")
    for name, gradient in gradients_in_peft(adapted).items():
        # What is written is the sum of a row and its change, here the gradient.
        rows = base[jnp.asarray([4, 1, 7])] if "token" in name else 0
        assert_close(found[name], gradient + rows)
    lorax.peft.save(tmp_path / "ours", loaded, names=NAMES)
    found = numpy(in_peft(make_theirs(), tmp_path / "ours")(tensor(TOKENS)))
    assert_close(found, expected)


def test_pruned_adalora(tmp_path, getkey):
    """Directions that were pruned are not in the file, and the scale is that of the
    rank at the start."""
    import torch

    ours, theirs = make_pair(getkey())
    options = dict(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR)
    adapted = with_random_adapter(theirs, "AdaLoraConfig", options, tmp_path / "whole")
    left = {
        "layer.0.lora_E.default": [True, False, True],
        "layer.1.lora_E.default": [False, False, False],
        "classifier.lora_E.default": [True, True, False],
    }
    for name, kept in left.items():
        gates = adapted.base_model.model.get_submodule(name.partition(".lora_E")[0])
        with torch.no_grad():
            gates.lora_E["default"] *= torch.tensor(kept)[:, None]
    adapted.peft_config["default"].rank_pattern = left
    adapted.save_pretrained(tmp_path / "theirs")
    loaded = lorax.peft.load(tmp_path / "theirs", ours, names=NAMES)
    expected = numpy(adapted(tensor(TOKENS)))
    assert_close(outputs(loaded), expected)
    assert loaded.head.weight.rank == loaded.layers.weight.rank == 2
    lorax.peft.save(tmp_path / "ours", loaded, names=NAMES)
    found = numpy(in_peft(make_theirs(), tmp_path / "ours")(tensor(TOKENS)))
    assert_close(found, expected)


def assert_close(found, expected):
    """Equal up to 1e-5 of the largest number."""
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


def is_weight(x):
    return isinstance(x, lorax.AbstractLoraWeight)

"""Methods beside LoRA in PEFT's format, without PEFT: what comes back, and what is
refused. `test_peft_methods_interop.py` compares with the real PEFT."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_identical
from safetensors.numpy import load_file, save_file

import eqx_lorax as lorax


# The embedding is not the head here, as the warning asks.
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing else in `model` has its")


class InOut(eqx.Module):
    weight: jax.Array


class Model(eqx.Module):
    words: eqx.nn.Embedding
    layers: eqx.nn.Linear
    """Two of them, stacked."""
    conv: eqx.nn.Conv1d
    grouped: eqx.nn.Conv1d
    experts: jax.Array
    project: InOut

    def __init__(self, key):
        keys = jr.split(key, 6)
        make = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 6, use_bias=False, key=key))
        self.words = eqx.nn.Embedding(9, 4, key=keys[0])
        self.layers = make(jr.split(keys[1], 2))
        self.conv = eqx.nn.Conv1d(4, 6, 3, key=keys[2])
        self.grouped = eqx.nn.Conv1d(4, 6, 3, groups=2, key=keys[3])
        self.experts = jr.normal(keys[4], (3, 6, 4))
        self.project = InOut(jr.normal(keys[5], (4, 6)))


NAMES = {
    "words": "words",
    "layers": "layer.{}",
    "conv": "conv",
    "grouped": "grouped",
    "experts": "mlp.experts",
    "project": "project",
}


def is_weight(x):
    return isinstance(x, lorax.AbstractLoraWeight)


def randomised(model):
    """The model with random numbers in all that is trained."""
    random = np.random.default_rng(0)
    params, frozen = lorax.partition(model)
    noise = lambda x: x + 0.3 * jnp.asarray(random.normal(size=x.shape), x.dtype)  # noqa: E731
    return lorax.combine(jax.tree.map(noise, params), frozen)


def make(getkey, targets, **options):
    plain = Model(getkey())
    model = lorax.loraify(plain, targets, rank=2, alpha=3.0, key=getkey(), **options)
    return plain, randomised(model)


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def write(folder, config, tensors):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# Each method: targets and options of `loraify`, `peft_type`, and the last names of the
# tensors of a linear layer.
METHODS = {
    "dora": (
        ["words", "layers", "conv"],
        dict(method="dora"),
        "LORA",
        {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    ),
}


@pytest.fixture(params=METHODS)
def saved(request, tmp_path, getkey):
    targets, options, kind, names = METHODS[request.param]
    plain, model = make(getkey, targets, **options)
    lorax.peft.save(tmp_path, model, names=NAMES)
    return plain, model, tmp_path, kind, names


def test_round_trip(saved):
    plain, model, folder, kind, names = saved
    assert_identical(lorax.peft.load(folder, plain, names=NAMES), model)
    config, tensors = files(folder)
    assert config["peft_type"] == kind
    start = "base_model.model.layer.1."
    assert {x.removeprefix(start) for x in tensors if x.startswith(start)} == names


def test_missing_tensors_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    gone = f"base_model.model.layer.1.{max(names)}"
    write(folder, config, {x: y for x, y in tensors.items() if x != gone})
    with pytest.raises(lorax.AdapterFileError, match=r"(?s)layer\.1.*[Cc]opy or save"):
        lorax.peft.load(folder, plain, names=NAMES)


def test_other_tensors_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    extra = f"base_model.model.layer.2.{max(names)}"
    of_layer = tensors[f"base_model.model.layer.1.{max(names)}"]
    write(folder, config, tensors | {extra: of_layer})
    with pytest.raises(lorax.AdapterFileError, match=r"nowhere.*layer\.2"):
        lorax.peft.load(folder, plain, names=NAMES)


def test_other_shapes_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    for name in names:
        path = f"base_model.model.layer.1.{name}"
        wrong = np.concatenate([tensors[path], tensors[path]])
        write(folder, config, tensors | {path: wrong})
        with pytest.raises(lorax.AdapterFileError, match=r"layer\.1.*model"):
            lorax.peft.load(folder, plain, names=NAMES)


def test_unknown_options_are_refused(saved):
    plain, _, folder, _, _ = saved
    config, tensors = files(folder)
    write(folder, config | {"use_magic": True}, tensors)
    with pytest.raises(lorax.AdapterFileError, match="use_magic"):
        lorax.peft.load(folder, plain, names=NAMES)


def test_names_of_adapters(saved):
    """In a state dict that was not saved by PEFT, names have that of the adapter."""
    plain, model, folder, _, names = saved
    config, tensors = files(folder)

    def renamed(name):
        end = next((x for x in names if name.endswith(f".{x}")), "")
        head, dot, tail = end.partition(".weight")
        return name.removesuffix(end) + head + ".default" + dot if end else name

    write(folder, config, {renamed(x): y for x, y in tensors.items()})
    assert_identical(lorax.peft.load(folder, plain, names=NAMES), model)


# DoRA


def test_dora_beside_lora_is_refused(tmp_path, getkey):
    _, model = make(getkey, ["words", "conv"], method={"words": "dora", "*": "lora"})
    with pytest.raises(ValueError, match="several methods, 'dora'.*'lora'.*save_adapt"):
        lorax.peft.save(tmp_path, model, names=NAMES)


@pytest.mark.parametrize(
    "target, message",
    [
        ("grouped", "no DoRA of grouped convolutions"),
        ("experts", "no DoRA of parameters"),
        ("project", "magnitude of its rows.*outputs are its columns"),
    ],
)
def test_dora_that_peft_has_not(target, message, tmp_path, getkey):
    rank = lorax.LoraSpec(2, batch=(0,)) if target == "experts" else 2
    plain = Model(getkey())
    model = lorax.loraify(plain, target, rank=rank, method="dora", key=getkey())
    options = dict(transposed=InOut) if target == "project" else {}
    with pytest.raises(ValueError, match=f"{message}.*as_lora.*save_adapter"):
        lorax.peft.save(tmp_path, model, names=NAMES, **options)


def test_dora_of_a_layer_that_is_stored_in_out(tmp_path, getkey):
    plain, model = make(getkey, "project", method="dora")
    names = {"project": "project"}
    # With a layer `(out, in)` as the go-between: its outputs are its rows.
    turned = eqx.tree_at(lambda m: m.project.weight, plain, plain.project.weight.T)
    model = lorax.loraify(
        turned, "project", rank=2, alpha=3.0, method="dora", key=getkey()
    )
    model = randomised(model)
    lorax.peft.save(tmp_path, model, names=names)
    loaded = lorax.peft.load(
        tmp_path, plain, names=names, transposed=InOut, allow_other_base=True
    )
    assert loaded.project.weight.outputs == "columns"
    found, expected = (x.project.weight.materialise() for x in (loaded, model))
    np.testing.assert_allclose(found.T, expected, rtol=1e-5)


def test_dora_of_tied_embeddings_is_refused(tmp_path, getkey):
    _, model = make(getkey, "words", method="dora")
    with pytest.raises(ValueError, match=r"words\.weight has DoRA.*[Uu]ntie"):
        lorax.peft.save(tmp_path, model, names=NAMES, tied={"words": "lm_head"})

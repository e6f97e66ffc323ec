"""PEFT's format without PEFT: saved adapters load again, and unsuitable ones are
errors. `test_peft_interop.py` compares with the real PEFT."""

import functools
import json
import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_identical, trained, weights, wide
from safetensors.numpy import load_file, save_file

import eqx_lorax as lorax


# The embedding is not the head here, as the warning asks.
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing else in `model` has its")


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    experts: jax.Array
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[0])
        self.experts = jr.normal(keys[1], (3, 5, 4))
        self.norm = eqx.nn.LayerNorm(4)


class Model(eqx.Module):
    words: eqx.nn.Embedding
    blocks: Block
    """Two of them, stacked."""
    convs: list[eqx.nn.Conv2d]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 5)
        self.words = eqx.nn.Embedding(9, 4, key=keys[0])
        self.blocks = eqx.filter_vmap(Block)(jr.split(keys[1], 2))
        self.convs = [
            eqx.nn.Conv2d(4, 6, 3, key=keys[2]),
            eqx.nn.Conv2d(4, 6, 3, groups=2, key=keys[3]),
        ]
        self.head = eqx.nn.Linear(4, 2, key=keys[4])


NAMES = {
    "words": "embed.word",
    "blocks.attention.query_proj": "layer.{}.self.q",
    "blocks.attention.key_proj": "layer.{}.self.k",
    "blocks.attention.value_proj": "layer.{}.self.v",
    "blocks.attention.output_proj": "layer.{}.self.o",
    "blocks.experts": "layer.{}.mlp.experts",
    "blocks.norm": "layer.{}.norm",
    "convs.*": "conv{}",
    "head": "classifier",
}
FILTER = ["words", "attention", "experts", "convs"]


def make(getkey, also="head", **options):
    plain = Model(getkey())
    options = {"rank": {"convs": 1, "*": 2}, "alpha": 3.0} | options
    return plain, trained(lorax.loraify(plain, FILTER, key=getkey(), **options))


def files(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def write(folder, config, tensors):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


@pytest.fixture
def saved(tmp_path, getkey):
    plain, adapted = make(getkey)
    also = ["head", "norm"]
    lorax.peft.save(tmp_path, adapted, names=NAMES, also=also, task_type="SEQ_CLS")
    return plain, adapted, tmp_path


def test_round_trip(saved):
    plain, adapted, folder = saved
    assert_identical(lorax.peft.load(folder, plain, names=NAMES), adapted)


@pytest.mark.parametrize("look_up", (NAMES.get, NAMES.__getitem__))
def test_names_by_a_function(look_up, saved):
    plain, adapted, folder = saved

    def names(path):
        return "conv" + path[-1] if path.startswith("convs.") else look_up(path)

    assert_identical(lorax.peft.load(folder, plain, names=names), adapted)


@pytest.mark.parametrize(
    "options",
    [
        dict(rank_stabilised=True),
        dict(dropout={"attention": 0.25, "convs": 0.25}),
        dict(rank={"key_proj": 3, "convs": 1, "*": 2}, alpha={"value_proj": 7}),
        dict(dtype=jnp.bfloat16),
    ],
    ids=str,
)
def test_options_come_back(options, tmp_path, getkey):
    plain, adapted = make(getkey, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PEFT has one `lora_dropout`")
        lorax.peft.save(tmp_path, adapted, names=NAMES)
    loaded = lorax.peft.load(tmp_path, plain, names=NAMES)
    for x, y in zip(weights(loaded), weights(adapted), strict=True):
        assert np.isclose(x.scale, y.scale)
        assert_identical((x.w, x.b, x.a), (y.w, y.b, y.a))


def test_the_configuration(saved):
    _, _, folder = saved
    config, tensors = files(folder)
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "SEQ_CLS"
    assert config["inference_mode"] is True
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert config["rank_pattern"] == {"conv0": 1}
    # The groups multiply the rank, and so alpha too.
    assert config["alpha_pattern"] == {"conv1": 6}
    assert config["target_parameters"] == [f"layer.{i}.mlp.experts" for i in range(2)]
    # A list would select every module called `conv0`.
    assert re.fullmatch(config["target_modules"], "layer.1.self.o")
    assert not re.fullmatch(config["target_modules"], "other.conv0")
    assert config["modules_to_save"] == ["classifier", "layer.0.norm", "layer.1.norm"]
    shapes = {name: x.shape for name, x in tensors.items()}
    prefix = "base_model.model."
    assert shapes[prefix + "layer.1.self.q.lora_A.weight"] == (2, 4)
    assert shapes[prefix + "embed.word.lora_embedding_A"] == (2, 9)
    assert shapes[prefix + "embed.word.lora_embedding_B"] == (4, 2)
    assert shapes[prefix + "conv1.lora_A.weight"] == (2, 4, 3, 3)
    assert shapes[prefix + "conv1.lora_B.weight"] == (6, 1, 1, 1)
    assert shapes[prefix + "layer.0.mlp.lora_A.weight"] == (6, 4)
    assert shapes[prefix + "layer.0.mlp.lora_B.weight"] == (5, 6)
    assert shapes[prefix + "classifier.bias"] == (2,)
    assert all(name.startswith(prefix) for name in shapes)


def test_names(tmp_path, getkey):
    _, adapted = make(getkey)
    few = {path: torch for path, torch in NAMES.items() if path != "words"}
    with pytest.raises(ValueError, match="`names` has nothing for 'words'"):
        lorax.peft.save(tmp_path, adapted, names=few)
    with pytest.raises(ValueError, match=r"'layer\.0\.self\.k' twice"):
        names = NAMES | {"blocks.attention.query_proj": "layer.{}.self.k"}
        lorax.peft.save(tmp_path, adapted, names=names)
    with pytest.raises(ValueError, match=r"is a stack of \(2,\): it needs one '\{\}'"):
        names = NAMES | {"blocks.attention.query_proj": "layer.{}.{}.self.k"}
        lorax.peft.save(tmp_path, adapted, names=names)
    with pytest.raises(ValueError, match="`names` has nothing for 'head'"):
        names = {path: torch for path, torch in NAMES.items() if path != "head"}
        lorax.peft.save(tmp_path, adapted, names=names, also="head")
    assert not list(tmp_path.iterdir())


def test_what_peft_has_no_form_for(tmp_path, getkey):
    transposed = eqx.nn.ConvTranspose2d(2, 3, 3, key=getkey())
    model = lorax.loraify([transposed], rank=2, key=getkey())
    with pytest.raises(ValueError, match="0.weight: PEFT has no transposed conv"):
        lorax.peft.save(tmp_path, model, names=lambda path: "conv")
    linear = [eqx.nn.Linear(4, 4, key=getkey())]
    twice = lorax.loraify(
        lorax.loraify(linear, rank=2, key=getkey()), rank=1, nested=True, key=getkey()
    )
    with pytest.raises(ValueError, match="adapter on top of an adapter.*Merge"):
        lorax.peft.save(tmp_path, twice, names=lambda path: "x")
    dilated = [eqx.nn.Conv2d(2, 3, 3, dilation=2, key=getkey())]
    dilated = lorax.loraify(dilated, rank=2, key=getkey())
    with pytest.warns(UserWarning, match="dilated"):
        lorax.peft.save(tmp_path, dilated, names=lambda path: "conv")
    rates = lorax.loraify(
        [*linear, *linear][:1] + [eqx.nn.Linear(4, 4, key=getkey())],
        rank=2,
        dropout={"0": 0.1},
        key=getkey(),
    )
    with pytest.warns(UserWarning, match="one `lora_dropout`"):
        lorax.peft.save(tmp_path, rates, names={"0": "x", "1": "y"})


@pytest.mark.parametrize(
    "option, message",
    [
        ({"peft_type": "OFT"}, "`peft_type` is 'OFT'"),
        ({"peft_type": None}, "`peft_type` is None"),
        ({"use_dora": True}, "of conv0 there is only"),
        ({"use_qalora": True}, "it uses use_qalora"),
        ({"layer_replication": [[0, 1]]}, "it uses layer_replication"),
        ({"trainable_token_indices": [1]}, r"has \[1\], for which there is no tensor"),
        ({"alora_invocation_tokens": [1]}, "it uses alora_invocation_tokens"),
        ({"of_tomorrow": {"x": 1}}, "it uses of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base.*conversion"),
        ({"init_lora_weights": "olora"}, "has changed the base"),
        ({"bias": "some"}, "`bias='some'` is not known"),
        ({"bias": "lora_only"}, "there is no bias of conv0"),
        ({"r": 5}, r"has rank 2, but 5 in the configuration"),
        ({"rank_pattern": {"k": 4, "conv0": 1}}, "self.k has rank 2, but 4 in the"),
    ],
)
def test_other_methods_are_refused_by_name(saved, option, message):
    plain, _, folder = saved
    config, tensors = files(folder)
    write(folder, config | option, tensors)
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(folder, plain, names=NAMES)


def renamed(old, new):
    def change(tensors):
        found = {k.replace(old, new): x for k, x in tensors.items()}
        assert found.keys() != tensors.keys()
        return found

    return change


def without(part):
    return lambda tensors: {k: x for k, x in tensors.items() if part not in k}


def misshapen(part):
    return lambda tensors: {
        k: np.ascontiguousarray(x.T) if part in k else x for k, x in tensors.items()
    }


@pytest.mark.parametrize(
    "change, message",
    [
        (renamed("self.q", "self.query"), "leads nowhere.*self.query.lora_A"),
        (renamed("lora_A", "lora_magnitude"), "there is only layer.0.self.q.lora_B"),
        (
            renamed("base_model.model.", "model."),
            "leads nowhere(?s:.*)None of its tensors begins with base_model.model.",
        ),
        (without("layer.1.self.v.lora_B"), "of layer.1.self.v there is only"),
        (
            without("layer.1.self.v"),
            "targets layer.1.self.v, for which there is no adapter",
        ),
        (without("layer.1.mlp"), "targets layer.1.mlp.experts, for which"),
        (without("classifier.bias"), "of classifier there is no classifier.bias"),
        (misshapen("classifier.weight"), r"classifier.weight has shape \(4, 2\)"),
        (misshapen("conv0.lora_B"), "conv0"),
        (misshapen("embed.word.lora_embedding_A"), "embed.word"),
        (
            lambda t: t | {"base_model.model.x": np.ones(2, np.float32)},
            "leads nowhere.* for x",
        ),
        (
            lambda t: {k: x + 1 if "conv1.lora_A" in k else x for k, x in t.items()},
            "conv1.*see each other's inputs",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    plain, _, folder = saved
    config, tensors = files(folder)
    write(folder, config, change(tensors))
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(folder, plain, names=NAMES)


def test_another_base(saved, getkey):
    _, adapted, folder = saved
    other = Model(getkey())
    with pytest.raises(
        lorax.AdapterFileError, match="another base.*words.weight differs"
    ):
        lorax.peft.load(folder, other, names=NAMES)
    loaded = lorax.peft.load(folder, other, names=NAMES, allow_other_base=True)
    assert_identical(loaded.words.weight.b, adapted.words.weight.b)
    # PEFT itself stores nothing about the base.
    write(folder, *files(folder))
    lorax.peft.load(folder, other, names=NAMES)


def test_damaged_files(saved):
    plain, _, folder = saved
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(lorax.AdapterFileError, match="not a whole safetensors file"):
        lorax.peft.load(folder, plain, names=NAMES)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(lorax.AdapterFileError, match="adapter_config.json: Expecting"):
        lorax.peft.load(folder, plain, names=NAMES)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(lorax.AdapterFileError, match="adapter_config.json"):
        lorax.peft.load(folder, plain, names=NAMES)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        lorax.peft.load(folder, plain, names=NAMES)


class InOut(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return x @ self.weight


OF_EXPERTS = lorax.LoraSpec(2, rows=(1,), columns=(2,), batch=(0,))


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (3, 4, 4), (3, 4, 6)])
@pytest.mark.parametrize("transposed", ["0", "0.weight", lambda node: True, InOut])
def test_stored_in_out(shape, transposed, tmp_path, getkey):
    rank = OF_EXPERTS if len(shape) == 3 else 2
    plain = [InOut(jr.normal(getkey(), shape))]
    adapted = trained(lorax.loraify(plain, "0.weight", rank=rank, key=getkey()))
    names = {"0": "x.y"}
    lorax.peft.save(tmp_path, adapted, names=names, transposed=transposed)
    config, tensors = files(tmp_path)
    (weight,) = weights(adapted)
    first = tensors[f"base_model.model.x{'.y' * (len(shape) == 2)}.lora_A.weight"]
    inputs = np.swapaxes(weight.b, -1, -2).reshape(-1, 4)
    assert np.array_equal(first, inputs)
    assert config["fan_in_fan_out"] is (len(shape) == 2)
    # For other layers the version is not needed, and the oldest PEFT rejects the field.
    assert config.get("peft_version") == (None if len(shape) == 2 else "0.21.0")
    loaded = lorax.peft.load(tmp_path, plain, names=names, transposed=transposed)
    assert_identical(loaded, adapted)


@pytest.mark.parametrize("transposed", ["head", "convs.*", "words", re.compile("head")])
def test_what_cannot_be_stored_in_out(transposed, saved):
    plain, adapted, folder = saved
    for call, model in ((lorax.peft.load, plain), (lorax.peft.save, adapted)):
        with pytest.raises(ValueError, match="`transposed=.* names no array that"):
            call(folder, model, names=NAMES, transposed=transposed)
        with pytest.raises(ValueError, match="`transposed='heads'` matched nothing"):
            call(folder, model, names=NAMES, transposed="heads")


def test_an_array_that_is_named_for_nothing(saved):
    plain, _, folder = saved
    with pytest.raises(lorax.AdapterFileError, match="other way round only.*It is nam"):
        lorax.peft.load(folder, plain, names=NAMES, transposed="blocks.experts")


@pytest.mark.parametrize("version", ("0.18.1.dev0", "0.18.1.dev0@5f2e5a", "main"))
def test_experts_of_a_version_that_tells_nothing(version, tmp_path, getkey):
    for size in (4, 6):
        plain = [InOut(jr.normal(getkey(), (3, 4, size)))]
        adapted = trained(
            lorax.loraify(plain, "0.weight", rank=OF_EXPERTS, key=getkey())
        )
        lorax.peft.save(tmp_path, adapted, names={"0": "x.y"})
        config, tensors = files(tmp_path)
        write(tmp_path, config | {"peft_version": version}, tensors)
        if size == 6:
            loaded = lorax.peft.load(tmp_path, plain, names={"0": "x.y"})
            assert_identical(loaded, adapted)
            continue
        with pytest.raises(lorax.AdapterFileError, match="square experts.*'0.18.0' or"):
            lorax.peft.load(tmp_path, plain, names={"0": "x.y"})


def test_fan_in_fan_out_asks_about_square_arrays(tmp_path, getkey):
    plain = [InOut(jr.normal(getkey(), (4, 4)))]
    adapted = trained(lorax.loraify(plain, "0.weight", rank=2, key=getkey()))
    lorax.peft.save(tmp_path, adapted, names={"0": "x"})
    config, tensors = files(tmp_path)
    write(tmp_path, config | {"fan_in_fan_out": True}, tensors)
    with pytest.raises(lorax.AdapterFileError, match="`transposed=\\[\\]` says that"):
        lorax.peft.load(tmp_path, plain, names={"0": "x"})
    loaded = lorax.peft.load(tmp_path, plain, names={"0": "x"}, transposed=[])
    assert_identical(loaded, adapted)
    # A linear layer is unambiguous.
    plain = [eqx.nn.Linear(4, 4, key=getkey())]
    adapted = trained(lorax.loraify(plain, rank=2, key=getkey()))
    lorax.peft.save(tmp_path, adapted, names={"0": "x"})
    config, tensors = files(tmp_path)
    write(tmp_path, config | {"fan_in_fan_out": True}, tensors)
    assert_identical(lorax.peft.load(tmp_path, plain, names={"0": "x"}), adapted)


class Gated(eqx.Module):
    gate: jax.Array
    up: jax.Array

    def __init__(self, key):
        self.gate, self.up = jr.normal(key, (2, 3, 5, 4))


def test_parameters_of_one_module(tmp_path, getkey):
    plain = [Gated(getkey()), Gated(getkey())]
    adapted = lorax.loraify(plain, ["gate", "up"], rank=2, key=getkey())
    adapted = trained(adapted)
    names = {"*.gate": "layer.{}.gate_proj", "*.up": "layer.{}.up_proj"}
    options = dict(names=names, parameter_order=["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match="layer.0.gate_proj and layer.0.up_proj apart"):
        lorax.peft.save(tmp_path, adapted, names=names)
    with pytest.raises(ValueError, match="has 'gate', which is the end of no path"):
        lorax.peft.save(tmp_path, adapted, names=names, parameter_order=["gate"])
    with pytest.raises(TypeError, match="`parameter_order='gate'` must be a list"):
        lorax.peft.save(tmp_path, adapted, names=names, parameter_order="gate")
    lorax.peft.save(tmp_path, adapted, **options)
    assert_identical(lorax.peft.load(tmp_path, plain, names=names), adapted)
    write(tmp_path, *files(tmp_path))
    with pytest.raises(lorax.AdapterFileError, match="layer.0 has adapters for the"):
        lorax.peft.load(tmp_path, plain, names=names)
    assert_identical(lorax.peft.load(tmp_path, plain, **options), adapted)
    config, tensors = files(tmp_path)
    lost = {x: y for x, y in tensors.items() if "layer.1.base_layer" not in x}
    write(tmp_path, config, lost)
    with pytest.raises(lorax.AdapterFileError, match="layer.1 has adapters for 1 of"):
        lorax.peft.load(tmp_path, plain, **options)


def linears(getkey, count=3):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 5, key=key))
    return [make(jr.split(getkey(), count))]


def folder_of(folder, layers, **options):
    """A folder with layers of a stack: a rank and an alpha for each position."""
    random = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, **options}
    config["target_modules"] = [f"layer.{i}" for i in layers]
    config["rank_pattern"] = {f"layer.{i}": rank for i, (rank, _) in layers.items()}
    config["alpha_pattern"] = {f"layer.{i}": alpha for i, (_, alpha) in layers.items()}
    tensors = {}
    for i, (rank, _) in layers.items():
        for name, shape in (("lora_A", (rank, 4)), ("lora_B", (5, rank))):
            array = random.normal(size=shape).astype(np.float32)
            tensors[f"base_model.model.layer.{i}.{name}.weight"] = array
    write(folder, config, tensors)
    return {
        i: (alpha / (rank**0.5 if options.get("use_rslora") else rank))
        * tensors[f"base_model.model.layer.{i}.lora_B.weight"].astype(float)
        @ tensors[f"base_model.model.layer.{i}.lora_A.weight"].astype(float)
        for i, (rank, alpha) in layers.items()
    }


@pytest.mark.parametrize("use_rslora", (False, True))
@pytest.mark.parametrize(
    "layers",
    [
        {0: (2, 3.0), 2: (2, 3.0)},
        {1: (2, 3.0)},
        {0: (1, 2.0), 1: (3, 5.0), 2: (2, 0.5)},
        {0: (4, 1.0), 2: (2, 2.0)},
    ],
    ids=str,
)
def test_a_stack_with_layers_of_several_kinds(layers, use_rslora, tmp_path, getkey):
    plain = linears(getkey)
    (tmp_path / "theirs").mkdir()
    updates = folder_of(tmp_path / "theirs", layers, use_rslora=use_rslora)
    names = {"0": "layer.{}"}
    loaded = lorax.peft.load(tmp_path / "theirs", plain, names=names)
    lorax.peft.save(tmp_path / "ours", loaded, names=names)
    again = lorax.peft.load(tmp_path / "ours", plain, names=names)
    for weight in (*weights(loaded), *weights(again)):
        for i in range(3):
            b, a = wide(weight.b[i]), wide(weight.a[i])
            expected = updates.get(i, np.zeros((5, 4)))
            np.testing.assert_allclose(weight.scale * b @ a, expected, atol=1e-6)
            assert i in updates or not b.any()


def test_dropout_is_off_until_it_is_trained(tmp_path, getkey):
    plain = eqx.nn.MLP(4, 4, 8, 1, key=getkey())
    adapted = trained(lorax.loraify(plain, rank=2, dropout=0.25, key=getkey()))
    names = {"layers.*": "layer.{}"}
    lorax.peft.save(tmp_path / "a", adapted, names=names)
    loaded = lorax.peft.load(tmp_path / "a", plain, names=names)
    x = jnp.ones(4)
    assert_identical(loaded(x), eqx.nn.inference_mode(adapted)(x))
    assert_identical(eqx.nn.inference_mode(loaded, False), adapted)
    lorax.peft.save(tmp_path / "b", loaded, names=names)
    assert files(tmp_path / "b")[0]["lora_dropout"] == 0.25
    loaded = lorax.peft.load(tmp_path / "b", plain, names=names, trainable=True)
    assert_identical(loaded, adapted)


def test_the_dropout_of_the_model_itself_stays(tmp_path, getkey):
    plain = [eqx.nn.Linear(4, 4, key=getkey()), eqx.nn.Dropout(0.5)]
    adapted = lorax.loraify(plain, rank=2, dropout=0.25, key=getkey())
    lorax.peft.save(tmp_path, adapted, names={"0": "x"})
    loaded = lorax.peft.load(tmp_path, plain, names={"0": "x"})
    assert loaded[0].dropout.inference and not loaded[1].inference


@pytest.mark.parametrize("path", ("embed.word", "head"))
def test_the_base_that_comes_with_an_embedding_or_a_head(path, tmp_path, getkey):
    plain = Model(getkey())
    adapted = lorax.loraify(plain, ["words", "head"], rank=2, key=getkey())
    names = NAMES | {"head": "head"}
    lorax.peft.save(tmp_path, trained(adapted), names=names)
    config, tensors = files(tmp_path)
    module = plain.words if path == "embed.word" else plain.head
    base = np.asarray(module.weight)
    key = f"base_model.model.{path}.base_layer.weight"
    load = functools.partial(lorax.peft.load, tmp_path, plain, names=names)
    for same in (base, np.asarray(base, jnp.bfloat16)):
        if same.dtype == jnp.bfloat16:
            plain = eqx.tree_at(
                lambda m: (m.words.weight, m.head.weight),
                plain,
                replace_fn=lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
            )
        write(tmp_path, config, tensors | {key: same})
        loaded = lorax.peft.load(tmp_path, plain, names=names)
        assert_identical(lorax.unloraify(loaded, merge=False), plain)
    for other in (base + 1, np.concatenate([base, base])):
        write(tmp_path, config, tensors | {key: other})
        with pytest.raises(lorax.AdapterFileError, match=f"{path}.base_layer.weight"):
            load()
        assert len(weights(load(allow_other_base=True))) == 2


class Reader(eqx.Module):
    words: eqx.nn.Embedding
    other: eqx.nn.Linear

    def __init__(self, key):
        self.words = eqx.nn.Embedding(9, 4, key=key)
        self.other = eqx.nn.Linear(4, 4, key=key)

    def __call__(self, token):
        return self.other(self.words(token)) @ self.words.weight.T


READER = {"words": "wte", "other": "mlp"}


def test_a_table_that_may_be_a_head(tmp_path, getkey):
    plain = Reader(getkey())
    adapted = trained(lorax.loraify(plain, ["words", "other"], rank=2, key=getkey()))
    saved = functools.partial(lorax.peft.save, tmp_path, adapted, names=READER)
    load = functools.partial(lorax.peft.load, tmp_path, plain, names=READER)
    message = (
        "words has an adapter, and nothing else in `model` has its 9 entries.*tied="
    )
    with pytest.raises(ValueError, match=message):
        saved(task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=message):
        saved()
    with pytest.warns(UserWarning, match=message):
        load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tied={}, task_type="CAUSAL_LM")
        assert_identical(load(tied={}), adapted)
        saved(tied={"words": "head"}, task_type="CAUSAL_LM")
        assert_identical(load(tied={"words": "head"}), adapted)
    with pytest.raises(ValueError, match="`tied` has 'wte', which is the path of no"):
        saved(tied={"wte": "head"})
    with pytest.raises(ValueError, match="words.weight is trained as it is and has mo"):
        rest = lorax.loraify(plain, "other", rank=2, key=getkey())
        lorax.peft.save(
            tmp_path, rest, names=READER, also="words", tied={"words": "head"}
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, key: t.pop(key + "A.weight"), "PEFT has adapted wte and not head"),
        (
            lambda t, key: t.update({key + "B.weight": t[key + "B.weight"] + 1}),
            "differ",
        ),
    ],
)
def test_tied_adapters_that_are_not_the_same(change, message, tmp_path, getkey):
    plain = Reader(getkey())
    adapted = trained(lorax.loraify(plain, "words", rank=2, key=getkey()))
    tied = {"words": "head"}
    lorax.peft.save(tmp_path, adapted, names=READER, tied=tied)
    config, tensors = files(tmp_path)
    assert config["ensure_weight_tying"] is True
    change(tensors, "base_model.model.head.lora_")
    write(tmp_path, config, tensors)
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(tmp_path, plain, names=READER, tied=tied)

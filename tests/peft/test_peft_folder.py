"""Incomplete PEFT folders, and files in other formats: the error names the format or
the problem, and the fix."""

import json
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_identical, trained
from safetensors.numpy import load_file, save_file

import eqx_lorax as lorax


# The embedding is not the head here, as the warning asks.
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing else in `model` has its")


class Block(eqx.Module):
    q: eqx.nn.Linear
    v: eqx.nn.Linear
    experts: jax.Array

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.q = eqx.nn.Linear(4, 4, key=keys[0])
        self.v = eqx.nn.Linear(4, 4, key=keys[1])
        self.experts = jr.normal(keys[2], (3, 5, 4))


class Model(eqx.Module):
    words: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.words = eqx.nn.Embedding(9, 4, key=keys[0])
        self.blocks = [Block(key) for key in keys[1:3]]
        self.norm = eqx.nn.LayerNorm(4)
        self.head = eqx.nn.Linear(4, 2, key=keys[3])


NAMES = {
    "words": "model.embed_tokens",
    "blocks.*.q": "model.layers.{}.attn.q_proj",
    "blocks.*.v": "model.layers.{}.attn.v_proj",
    "blocks.*.experts": "model.layers.{}.mlp.experts",
    "norm": "model.norm",
    "head": "score",
}


PREFIX = "base_model.model."


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def without(tensors, *parts):
    return {k: x for k, x in tensors.items() if not any(part in k for part in parts)}


@pytest.fixture
def saved(tmp_path, getkey):
    """A folder as PEFT would have trained and saved it."""
    plain = Model(getkey())
    adapted = lorax.loraify(plain, ["q", "v"], rank=2, key=getkey())
    lorax.peft.save(tmp_path, trained(adapted), names=NAMES, also="head")
    config, tensors = read(tmp_path)
    config |= {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    return plain, config, tensors


# Adapters that the configuration announces

BOTH = {"target_modules": ["q_proj", "v_proj"]}
REGEX = {"target_modules": r"model\.layers\.\d+\.attn\.(q|v)_proj"}
FULL = {
    "target_modules": [f"model.layers.{i}.attn.{x}_proj" for i in (0, 1) for x in "qv"]
}


@pytest.mark.parametrize("config", [BOTH, REGEX, FULL, {"target_modules": None}])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"target_modules": ["attn.q_proj", "v_proj", "score"]},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
        {"exclude_modules": ["model.embed_tokens"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.0\.attn\.q_proj": 2}},
    ],
    ids=str,
)
def test_whole_folders(saved, config, more, tmp_path):
    plain, original, tensors = saved
    write(tmp_path / "new", original | config | more, tensors)
    loaded = lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    assert_identical(loaded, lorax.peft.load(tmp_path, plain, names=NAMES))


@pytest.mark.parametrize(
    "config, lost, message",
    [
        (BOTH, ["layers.1.attn.v_proj"], r"targets model\.layers\.1\.attn\.v_proj, "),
        (REGEX, ["layers.1.attn.v_proj"], r"targets model\.layers\.1\.attn\.v_proj, "),
        (FULL, ["layers.1.attn.v_proj"], r"targets model\.layers\.1\.attn\.v_proj, "),
        (
            {"target_modules": "all-linear"},
            ["layers.1.attn.v_proj"],
            r"targets model\.layers\.1\.attn\.v_proj, ",
        ),
        (BOTH, ["v_proj"], "targets .*0.attn.v_proj, .*1.attn.v_proj, for which"),
        (BOTH, ["layers.1", "layers.0.attn.q"], r"0\.attn\.q.*1\.attn\.q.*1\.attn\.v"),
        (
            {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
            [],
            "targets model.embed_tokens, for",
        ),
        (
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            [],
            "`target_modules` has 'up_proj', for which there is no tensor",
        ),
        (
            {"target_modules": r".*\.up_proj"},
            [],
            r"`target_modules` is '.*up_proj', for which there is no tensor",
        ),
        (BOTH, ["score"], "`modules_to_save` has 'score', and there is no score"),
        (BOTH, ["score.weight"], "of score there is no score.weight"),
        (
            {"modules_to_save": ["score", "norm"]},
            [],
            "`modules_to_save` has 'norm', and there is no model.norm",
        ),
        (
            {"modules_to_save": ["score", "pooler"]},
            [],
            "`modules_to_save` has 'pooler', for which there is no tensor",
        ),
        (
            {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
            ["score"],
            "'score', and there is no score",
        ),
        (
            {"target_parameters": ["mlp.experts"]},
            [],
            "targets model.layers.0.mlp.experts, model.layers.1.mlp.experts, for which",
        ),
        (
            {"target_parameters": ["mlp.down"]},
            [],
            "`target_parameters` has 'mlp.down', for which there is no tensor",
        ),
        (
            {"layers_to_transform": [1]},
            ["layers.1.attn.v_proj"],
            r"targets model\.layers\.1\.attn\.v_proj, for",
        ),
        (BOTH, ["lora", "score"], "there is not one tensor in it"),
    ],
)
def test_what_is_lost_is_named(saved, config, lost, message, tmp_path):
    plain, original, tensors = saved
    write(tmp_path / "new", original | config, without(tensors, *lost))
    with pytest.raises(lorax.AdapterFileError, match=f"(?s){message}"):
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)


@pytest.mark.parametrize(
    "config, lost",
    [
        ({"layers_to_transform": 0}, ["layers.1"]),
        ({"layers_to_transform": [0], "layers_pattern": ["layers"]}, ["layers.1"]),
        ({"exclude_modules": ["layers.1.attn.v_proj"]}, ["layers.1.attn.v_proj"]),
        ({"exclude_modules": r".*\.1\..*"}, ["layers.1"]),
        ({"target_modules": r".*\.0\.attn\..*"}, ["layers.1"]),
        ({"target_modules": "all-linear"}, ["v_proj"]),
        (
            {"target_modules": ["q_proj", "layers.0.attn.v_proj"]},
            ["layers.1.attn.v_proj"],
        ),
    ],
    ids=str,
)
def test_what_was_never_promised_is_not_missed(saved, config, lost, tmp_path):
    plain, original, tensors = saved
    write(tmp_path / "new", original | config, without(tensors, *lost))
    lorax.peft.load(tmp_path / "new", plain, names=NAMES)


def test_all_that_is_wrong_at_once(saved, tmp_path):
    plain, config, tensors = saved
    config |= {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    tensors = without(tensors, "score", "0.attn.q_proj.lora_A", "1.attn.v_proj")
    tensors |= {PREFIX + "other": np.ones(2, np.float32)}
    write(tmp_path / "new", config, tensors)
    with pytest.raises(lorax.AdapterFileError) as error:
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    lines = str(error.value).split("\n")
    parts = ["only", "leads nowhere", "1.attn.v_proj", "up_proj", "score"]
    assert all(x in line for x, line in zip(parts, lines[1:-1], strict=True))
    assert lines[-1].startswith("If tensors were lost")


def test_a_module_that_pytorch_has_not(saved, tmp_path):
    """Its adapter counts as missing only if `names` translates the module."""
    plain, config, tensors = saved
    write(tmp_path / "new", config, without(tensors, "layers.1"))
    names = {k: x.replace("{}", "0") for k, x in NAMES.items()}
    names = {k.replace("*", "0"): x for k, x in names.items()}
    loaded = lorax.peft.load(tmp_path / "new", plain, names=names)
    assert_identical(loaded.blocks[1], plain.blocks[1])


def test_patterns_that_no_module_follows(saved, tmp_path):
    plain, config, tensors = saved
    config |= {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"^q_proj": 9}}
    write(tmp_path / "new", config, tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    texts = [str(x.message) for x in caught]
    assert [x.partition(", which")[0] for x in texts] == [
        "`rank_pattern` has 'k_proj'",
        "`alpha_pattern` has '^q_proj'",
    ]


# Values of the configuration


@pytest.mark.parametrize(
    "option, messages",
    [
        ({"lora_alpha": None}, ["`lora_alpha` is null, where a number belongs"]),
        ({"lora_alpha": "16"}, ['`lora_alpha` is "16", where a number belongs']),
        ({"lora_alpha": float("nan")}, ["`lora_alpha` is NaN, where a number belongs"]),
        ({"r": None}, ["`r` is null, where a rank belongs"]),
        ({"r": "2"}, ['`r` is "2", where a rank belongs']),
        ({"r": 0}, ["`r` is 0, where a rank belongs"]),
        ({"r": True}, ["`r` is true, where a rank belongs"]),
        (
            {"r": 2.5, "lora_alpha": [1]},
            ["`r` is 2.5, where", "`lora_alpha` is [1], where"],
        ),
        ({"lora_dropout": None}, ["`lora_dropout` is null, where a rate"]),
        ({"lora_dropout": 1.0}, ["`lora_dropout` is 1.0, where a rate"]),
        ({"rank_pattern": [2]}, ["`rank_pattern` is [2], where an object belongs"]),
        ({"rank_pattern": {"q": None}}, ["`rank_pattern` has null for 'q'"]),
        ({"alpha_pattern": {"q(": 2}}, ["`alpha_pattern` has 'q(', no regular expr"]),
        ({"target_modules": "q["}, ["`target_modules` has 'q[', no regular expr"]),
        ({"target_modules": {"q": 1}}, ["`target_modules` is {", "a list of names"]),
        ({"modules_to_save": "score"}, ['`modules_to_save` is "score", where a list']),
        ({"target_parameters": "up"}, ['`target_parameters` is "up", where a list']),
        ({"peft_type": None}, ["`peft_type` is None; only 'LORA'", "which file"]),
        ({"peft_type": "lora"}, ["`peft_type` is 'lora'; only 'LORA'"]),
        (
            {"peft_type": "OFT"},
            ["`peft_type` is 'OFT'; only", "`merge_and_unload()`"],
        ),
        ({"peft_type": "PREFIX_TUNING"}, ["trains inputs of a model"]),
        ({"peft_type": ["LORA"]}, ["`peft_type` is ['LORA']; only 'LORA'"]),
        ({"layers_to_transform": "0"}, ['`layers_to_transform` is "0", where']),
        ({"layers_to_transform": [0, "1"]}, ["`layers_to_transform` is [0,"]),
        ({"layers_pattern": 1}, ["`layers_pattern` is 1, where"]),
        ({"layers_pattern": ["h("]}, ["`layers_pattern` has 'h(', no regular"]),
    ],
    ids=str,
)
def test_values_of_the_configuration(saved, option, messages, tmp_path):
    plain, config, tensors = saved
    write(tmp_path / "new", config | option, tensors)
    with pytest.raises(lorax.AdapterFileError) as error:
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    assert all(message in str(error.value) for message in messages), error.value
    assert str(tmp_path / "new" / "adapter_config.json") in str(error.value)


def test_a_bug_in_names_is_no_damaged_file(saved, tmp_path):
    plain, config, tensors = saved
    write(tmp_path / "new", config, tensors)
    with pytest.raises(TypeError, match="can only concatenate"):
        lorax.peft.load(tmp_path / "new", plain, names=lambda path: path + 1)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("eqx_lorax_base", "[1]"),
        ("eqx_lorax_base", "{"),
        ("eqx_lorax_parameter_order", "1"),
        ("eqx_lorax_parameter_order", '"up"'),
        ("eqx_lorax_parameter_order", "["),
    ],
)
def test_metadata_that_say_nothing(saved, entry, value, tmp_path):
    plain, config, tensors = saved
    write(tmp_path, config, tensors)
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, {"format": "pt", entry: value})
    with pytest.raises(lorax.AdapterFileError, match="does not describe an adapter"):
        lorax.peft.load(tmp_path, plain, names=NAMES)


# Names of tensors


def renamed(change):
    return lambda tensors: {change(name): x for name, x in tensors.items()}


def with_adapter_name(name):
    """As in the state of a PEFT model."""
    name = name.replace("lora_A.weight", "lora_A.default.weight")
    name = name.replace("lora_B.weight", "lora_B.default.weight")
    return name.replace("score.", "score.modules_to_save.default.")


@pytest.mark.parametrize(
    "change",
    [
        renamed(lambda name: name.removeprefix(PREFIX)),
        renamed(with_adapter_name),
        renamed(lambda name: with_adapter_name(name).removeprefix(PREFIX)),
        renamed(lambda name: PREFIX + "_orig_mod." + name.removeprefix(PREFIX)),
        renamed(lambda name: "_orig_mod." + name),
    ],
)
def test_names_that_can_be_told(saved, change, tmp_path):
    plain, config, tensors = saved
    write(tmp_path / "new", config, change(tensors))
    loaded = lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    assert_identical(loaded, lorax.peft.load(tmp_path, plain, names=NAMES))


def other_adapter(name):
    part = "lora_A.other.weight" if ".0." in name else "lora_A.default.weight"
    return name.replace("lora_A.weight", part)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            renamed(lambda name: name.replace(PREFIX, "module.")),
            "leads nowhere .* for module.model.layers.*None of its tensors begins with "
            "base_model.model.",
        ),
        (
            renamed(lambda name: name.replace(PREFIX + "score", "score")),
            "some of its tensors begin with base_model.model. and some do not: score",
        ),
        (renamed(other_adapter), "several adapters, (other|default), (other|default)."),
        (
            lambda t: t | renamed(with_adapter_name)(t),
            "two of its tensors are the same but for names of adapters",
        ),
    ],
)
def test_names_that_cannot_be_told(saved, change, message, tmp_path):
    plain, config, tensors = saved
    write(tmp_path / "new", config, change(tensors))
    with pytest.raises(lorax.AdapterFileError, match=f"(?s){message}"):
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)


# Other formats

X = np.ones((2, 2), np.float32)
KOHYA = {
    "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": X,
    "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight": X,
    "lora_unet_down_blocks_0_attn1_to_q.alpha": X,
}
DIFFUSERS = {
    "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight": X,
    "unet.down_blocks.0.attn1.processor.to_q_lora.up.weight": X,
}
OLD_DIFFUSERS = {
    "text_encoder.layers.0.q_proj.lora_linear_layer.down.weight": X,
    "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight": X,
}
WHOLE_MODEL = {"model.layers.0.attn.q_proj.weight": X, "model.norm.weight": X}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (KOHYA, "in the style of kohya's scripts.*load_lora_weights"),
        (DIFFUSERS, "in the style of diffusers.*get_peft_model_state_dict"),
        (OLD_DIFFUSERS, "in the style of diffusers"),
        (WHOLE_MODEL, "holds a whole model and no adapter. Load it as the base"),
    ],
)
def test_files_in_the_style_of_others(saved, tensors, message, tmp_path):
    plain, config, _ = saved
    write(tmp_path / "new", config, tensors)
    file = tmp_path / "new" / "adapter_model.safetensors"
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(tmp_path / "new", plain, names=NAMES)
    file = file.rename(tmp_path / "something.safetensors")
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(file, plain, names=NAMES)
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.load_adapter(file, plain)


BIN = b"PK\x03\x04" + b"0" * 40
CONFIG = {"adapter_config.json": b"{}"}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"adapter_model.bin": BIN} | CONFIG, r"\(adapter_model.bin\).*never is here"),
        ({"adapter_model.safetensors": BIN} | CONFIG, "is a pickle of PyTorch's"),
        (
            {
                "adapter_model-00001-of-00002.safetensors": b"",
                "adapter_model-00002-of-00002.safetensors": b"",
                "adapter_model.safetensors.index.json": b"{}",
            }
            | CONFIG,
            r"\(adapter_model-00001-of-00002.*has an adapter in parts.*save_file",
        ),
        ({"model.safetensors": b"", "config.json": b"{}"}, "holds a whole model"),
        ({"pytorch_model-00001-of-00002.bin": b""}, "holds a whole model"),
        ({"pytorch_lora_weights.safetensors": b""}, "in the style of diffusers"),
        (
            {"default/adapter_config.json": b"{}", "other/adapter_config.json": b"{}"},
            "has folders with adapters. Pass one of them: default, other",
        ),
        (
            {"adapter_model.safetensors": b"version https://git-lfs.github.com/spec/v1"}
            | CONFIG,
            "`git lfs pull`",
        ),
    ],
    ids=range(8),
)
def test_folders_of_others(files, message, tmp_path, getkey):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(lorax.AdapterFileError, match=message):
        lorax.peft.load(tmp_path, Model(getkey()), names=NAMES)


def test_what_is_not_there(saved, tmp_path):
    plain, _, _ = saved
    with pytest.raises(
        FileNotFoundError, match="no folder user/adapter.*snapshot_down"
    ):
        lorax.peft.load("user/adapter", plain, names=NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in"):
        lorax.peft.load(tmp_path / "empty", plain, names=NAMES)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_config.json in.*write it"):
        lorax.peft.load(tmp_path, plain, names=NAMES)


def test_the_file_and_the_folder(saved, tmp_path):
    plain, _, _ = saved
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        with pytest.raises(
            lorax.AdapterFileError, match="one file of an adapter. Pass"
        ):
            lorax.peft.load(tmp_path / name, plain, names=NAMES)
    with pytest.raises(lorax.AdapterFileError, match="read by `lorax.peft.load`"):
        lorax.load_adapter(tmp_path, plain)
    with pytest.raises(lorax.AdapterFileError, match="read by `lorax.peft.load`"):
        lorax.load_adapter(tmp_path / "adapter_model.safetensors", plain)
    native = tmp_path / "native" / "adapter.safetensors"
    lorax.save_adapter(native, lorax.peft.load(tmp_path, plain, names=NAMES))
    for path in (native, native.parent):
        with pytest.raises(lorax.AdapterFileError, match="`lorax.load_adapter`"):
            lorax.peft.load(path, plain, names=NAMES)
    pickled = tmp_path / "adapter_model.bin"
    pickled.write_bytes(BIN)
    with pytest.raises(lorax.AdapterFileError, match="is a pickle of PyTorch's"):
        lorax.load_adapter(pickled, plain)
    with pytest.raises(lorax.AdapterFileError, match="is a pickle of PyTorch's"):
        lorax.adapter_info(pickled)


@pytest.mark.parametrize("start", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_something_else(start, tmp_path, getkey):
    model = lorax.loraify([eqx.nn.Linear(2, 2, key=getkey())], rank=1, key=getkey())
    path = tmp_path / "a.safetensors"
    note, length = "", 0
    for _ in range(3):  # the length grows in steps of eight
        lorax.save_adapter(path, model, metadata={"note": note})
        length = int.from_bytes(path.read_bytes()[:8], "little")
        note += "x" * ((start - length) % 0x10000)
    assert length % 0x10000 == start
    assert_identical(lorax.load_adapter(path, model), model)


# Biases; `test_peft_biases.py` compares them with PEFT


def test_biases_beside_adapters(tmp_path, getkey):
    plain = Model(getkey())
    model = trained(lorax.loraify(plain, ["q", "v"], rank=2, key=getkey()))
    lorax.peft.save(tmp_path, model, names=NAMES, also=["blocks.*.q.bias", "head"])
    config, tensors = read(tmp_path)
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["score"])
    assert {name for name in tensors if name.endswith(".bias")} == {
        f"{PREFIX}score.bias",
        *(
            f"{PREFIX}model.layers.{i}.attn.{x}_proj.base_layer.bias"
            for i in (0, 1)
            for x in "qv"
        ),
    }
    assert_identical(lorax.peft.load(tmp_path, plain, names=NAMES), model)
    # Older versions had no `base_layer`.
    write(
        tmp_path, config, {k.replace("base_layer.", ""): x for k, x in tensors.items()}
    )
    assert_identical(lorax.peft.load(tmp_path, plain, names=NAMES), model)


def test_a_bias_of_the_adapter_is_rounded_once(tmp_path, getkey):
    plain = {"q": eqx.nn.Linear(4, 3, dtype=jnp.bfloat16, key=getkey())}
    model = trained(lorax.loraify(plain, rank=2, alpha=3, key=getkey()))
    lorax.peft.save(tmp_path, model, names={"q": "q"})
    config, tensors = read(tmp_path)
    added = np.asarray(jr.normal(getkey(), (3,)))
    write(
        tmp_path,
        config | {"lora_bias": True},
        tensors | {PREFIX + "q.lora_B.bias": added},
    )
    loaded = lorax.peft.load(tmp_path, plain, names={"q": "q"})
    exact = np.asarray(plain["q"].bias, np.float64) + 1.5 * np.asarray(
        added, np.float64
    )
    assert_identical(loaded["q"].bias, jnp.asarray(exact, jnp.bfloat16))


def test_an_array_beside_an_adapter_that_is_no_bias(tmp_path, getkey):
    class Gained(eqx.Module):
        weight: jax.Array
        gain: jax.Array

    model = [Gained(jr.normal(getkey(), (4, 4)), jnp.ones(4))]
    model = lorax.loraify(model, "0.weight", rank=2, key=getkey())
    with pytest.raises(
        ValueError, match="which has an adapter too.*the bias of a layer"
    ):
        lorax.peft.save(tmp_path, model, names={"0": "x"}, also="0.gain")

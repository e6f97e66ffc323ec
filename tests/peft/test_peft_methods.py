"""Methods beside LoRA in PEFT's format, without PEFT: what comes back, and what is
refused. `test_peft_methods_interop.py` compares with the real PEFT."""

import json
import shutil

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


def make(targets, **options):
    plain = Model(jr.key(0))
    options = dict(rank=2, alpha=3.0) | options
    model = lorax.loraify(plain, targets, key=jr.key(1), **options)
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
    "loha": (
        ["layers", "conv", "grouped", "project"],
        dict(method="loha"),
        "LOHA",
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    ),
    "lokr": (
        ["layers", "conv", "grouped", "project"],
        dict(method="lokr", rank=1),
        "LOKR",
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    ),
    "lokr, both": (
        ["layers", "project"],
        dict(method="lokr", rank=1, decompose_both=True, decompose_factor=3),
        "LOKR",
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    ),
    "adalora": (
        ["layers", "project"],
        dict(method="adalora"),
        "ADALORA",
        {"lora_A", "lora_B", "lora_E"},
    ),
    "ia3": (
        ["layers", "project"],
        dict(method="ia3"),
        "IA3",
        {"ia3_l"},
    ),
}


@pytest.fixture(scope="module", params=METHODS)
def made(request, tmp_path_factory):
    targets, options, kind, names = METHODS[request.param]
    plain, model = make(targets, **options)
    folder = tmp_path_factory.mktemp("saved")
    lorax.peft.save(folder, model, names=NAMES, transposed=InOut)
    return plain, model, folder, kind, names


@pytest.fixture
def saved(made, tmp_path):
    plain, model, folder, kind, names = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return plain, model, tmp_path, kind, names


def load(folder, plain):
    return lorax.peft.load(folder, plain, names=NAMES, transposed=InOut)


def test_round_trip(saved):
    plain, model, folder, kind, names = saved
    assert_identical(load(folder, plain), model)
    config, tensors = files(folder)
    assert config["peft_type"] == kind
    start = "base_model.model.layer.1."
    assert {x.removeprefix(start) for x in tensors if x.startswith(start)} == names


def test_missing_tensors_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    lost = f"base_model.model.layer.1.{max(names)}"
    write(folder, config, {x: y for x, y in tensors.items() if x != lost})
    with pytest.raises(lorax.AdapterFileError, match=r"(?s)layer\.1.*copy or save"):
        load(folder, plain)


def test_other_tensors_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    extra = f"base_model.model.layer.2.{max(names)}"
    of_layer = tensors[f"base_model.model.layer.1.{max(names)}"]
    write(folder, config, tensors | {extra: of_layer})
    with pytest.raises(lorax.AdapterFileError, match=r"(?s)nowhere.*layer\.2.*take it"):
        load(folder, plain)


def test_other_shapes_are_refused(saved):
    plain, _, folder, _, names = saved
    config, tensors = files(folder)
    for name in names:
        path = f"base_model.model.layer.1.{name}"
        wrong = np.concatenate([tensors[path], tensors[path]])
        write(folder, config, tensors | {path: wrong})
        with pytest.raises(
            lorax.AdapterFileError, match=r"layer\.1.*The file is for a"
        ):
            load(folder, plain)


def test_unknown_options_are_refused(saved):
    plain, _, folder, _, _ = saved
    config, tensors = files(folder)
    for option in ({"use_magic": True}, {"bias": "all_of_them"}):
        write(folder, config | option, tensors)
        with pytest.raises(lorax.AdapterFileError, match="(magic|all_of_them).*Merge"):
            load(folder, plain)


def test_names_of_adapters(saved):
    """In a state dict that was not saved by PEFT, names have that of the adapter."""
    plain, model, folder, _, names = saved
    config, tensors = files(folder)

    def renamed(name):
        end = next((x for x in names if name.endswith(f".{x}")), "")
        head, dot, tail = end.partition(".weight")
        return name.removesuffix(end) + head + ".default" + dot if end else name

    write(folder, config, {renamed(x): y for x, y in tensors.items()})
    assert_identical(load(folder, plain), model)


# What PEFT has not, or has otherwise: each error says what to do.

GIVEN_UP = "as_lora.*save_adapter"
REFUSED = {
    "dora, grouped": ("grouped", dict(method="dora"), "no DoRA of grouped conv"),
    "dora, experts": ("experts", dict(method="dora"), "no DoRA of parameters"),
    "dora, in out": (
        "project",
        dict(method="dora"),
        "magnitude of its rows.*outputs are its columns",
    ),
    "vera, in out": ("project", dict(method="vera"), "gain of its inputs"),
    "vera, conv": ("conv", dict(method="vera"), "VeRA of linear layers"),
    "loha, words": ("words", dict(method="loha"), "no LoHa of embeddings"),
    "loha, experts": ("experts", dict(method="loha"), "no 'loha' of parameters"),
    "lokr, whole": ("conv", dict(method="lokr"), r"kron\(w2, w1\)"),
    "adalora, conv": ("conv", dict(method="adalora"), "AdaLoRA of `Conv2d`"),
    "ia3, conv": ("conv", dict(method="ia3", scale_inputs=True), "IA³ of `Conv1d`"),
    "lora_xs": ("layers", dict(method="lora_xs"), "method 'lora_xs'"),
    "several": (
        ["layers", "conv"],
        dict(method={"layers": "loha", "*": "lora"}),
        "several methods",
    ),
}


@pytest.mark.parametrize("target, options, message", REFUSED.values(), ids=REFUSED)
def test_what_peft_has_not(target, options, message, tmp_path):
    rank = lorax.LoraSpec(2, batch=(0,)) if target == "experts" else 2
    plain = Model(jr.key(0))
    model = lorax.loraify(plain, target, rank=rank, key=jr.key(1), **options)
    with pytest.raises(ValueError, match=f"{message}.*{GIVEN_UP}"):
        lorax.peft.save(tmp_path, model, names=NAMES, transposed=InOut)
    assert not list(tmp_path.iterdir())


def test_scales_that_peft_has_not(tmp_path):
    """PEFT scales the bias of a layer together with its outputs."""
    layer = [eqx.nn.Linear(4, 6, key=jr.key(0))]
    names = {"0": "x"}
    free = [eqx.nn.Linear(4, 6, use_bias=False, key=jr.key(0))]
    model = lorax.loraify(free, method="ia3", key=jr.key(1))
    lorax.peft.save(tmp_path, model, names=names)
    with pytest.raises(lorax.AdapterFileError, match="x: .*bias.*merge_and_unload"):
        lorax.peft.load(tmp_path, layer, names=names, allow_other_base=True)


OTHER_FILES = {
    "effective convolutions": (
        "loha",
        {"conv.hada_t1": np.ones((2, 2, 3, 1), np.float32)},
        {},
        "conv: hada_t1 cannot be read here: merge it in PyTorch",
    ),
    "no rank": ("loha", {}, {"r": 0}, "`r` is 0, where a rank belongs"),
    "another rank": ("loha", {}, {"r": 3}, "layer.0: `hada_w1_a` has shape"),
    "another split": (
        "lokr",
        {},
        {"decompose_factor": 1},
        r"layer.0: `lokr_w1` has shape \(2, 2\), and .*\(1, 1\)",
    ),
    "a bad pattern": (
        "adalora",
        {},
        {"rank_pattern": ["x"]},
        "`rank_pattern` is no object. Save the adapter again",
    ),
    "pruned otherwise": (
        "adalora",
        {},
        {"rank_pattern": {"layer.0.lora_E": [True, False]}},
        r"layer.0: `lora_A` has shape \(2, 4\), and .*\(1, 4\)",
    ),
    "stabilised": ("adalora", {}, {"use_rslora": True}, "it uses use_rslora"),
    "inputs": ("ia3", {}, {"feedforward_modules": ["layer.0"]}, "layer.0: `ia3_l`"),
    "biases": ("loha", {}, {"bias": "all"}, "`bias='all'` is not known.*merge_and"),
    "others": ("loha", {}, {"peft_type": "OFT"}, "`peft_type` is 'OFT'; only 'LORA'"),
}


@pytest.mark.parametrize(
    "method, more, options, message", OTHER_FILES.values(), ids=OTHER_FILES
)
def test_files_that_are_refused(method, more, options, message, tmp_path):
    targets, of_method, *_ = METHODS[method]
    plain, model = make(targets, **of_method)
    lorax.peft.save(tmp_path, model, names=NAMES, transposed=InOut)
    config, tensors = files(tmp_path)
    more = {f"base_model.model.{name}": x for name, x in more.items()}
    write(tmp_path, config | options, tensors | more)
    with pytest.raises(lorax.AdapterFileError, match=message):
        load(tmp_path, plain)


def test_dropout_that_is_not_here(tmp_path):
    plain, model = make("layers", method="loha")
    lorax.peft.save(tmp_path, model, names=NAMES)
    config, tensors = files(tmp_path)
    write(tmp_path, config | {"rank_dropout": 0.1}, tensors)
    with pytest.warns(UserWarning, match="`rank_dropout=0.1` of LOHA are not here"):
        assert_identical(lorax.peft.load(tmp_path, plain, names=NAMES), model)
    model = lorax.loraify(plain, "layers", method="loha", dropout=0.1, key=jr.key(1))
    with pytest.warns(UserWarning, match="no dropout of LOHA"):
        lorax.peft.save(tmp_path, model, names=NAMES)


def test_sides_that_are_not_said(tmp_path):
    """Only the code of a module tells which axis has its inputs."""
    plain, model = make("project", method="adalora")
    lorax.peft.save(tmp_path, model, names=NAMES, transposed=InOut)
    with pytest.raises(lorax.AdapterFileError, match="project: `lora_A`.*`transposed`"):
        lorax.peft.load(tmp_path, plain, names=NAMES)
    square = {"project": InOut(jnp.ones((4, 4)))}
    model = lorax.loraify(
        square, "project.weight", rank=2, method="adalora", key=jr.key(1)
    )
    lorax.peft.save(tmp_path, model, names=NAMES, transposed=InOut)
    config, tensors = files(tmp_path)
    write(tmp_path, config | {"fan_in_fan_out": True}, tensors)
    with pytest.raises(lorax.AdapterFileError, match="cannot be seen. If.*transposed"):
        lorax.peft.load(tmp_path, square, names=NAMES)
    assert_identical(load(tmp_path, square), model)


# VeRA


def test_vera(tmp_path):
    """A seed is written as the matrices that it says, which come back as arrays."""
    plain, model = make("layers", method="vera", seed=3)
    lorax.peft.save(tmp_path / "seed", model, names=NAMES)
    _, tensors = files(tmp_path / "seed")
    assert {"base_model.vera_A", "base_model.vera_B"} <= tensors.keys()
    loaded = lorax.peft.load(tmp_path / "seed", plain, names=NAMES)
    found, expected = (x.layers.weight.materialise() for x in (loaded, model))
    np.testing.assert_array_equal(found, expected)
    lorax.peft.save(tmp_path / "arrays", loaded, names=NAMES)
    again = lorax.peft.load(tmp_path / "arrays", plain, names=NAMES)
    assert_identical(again, loaded)


def test_vera_without_matrices(tmp_path):
    plain, model = make("layers", method="vera")
    lorax.peft.save(tmp_path, model, names=NAMES)
    config, tensors = files(tmp_path)
    shared = {"base_model.vera_A", "base_model.vera_B"}
    write(tmp_path, config, {x: y for x, y in tensors.items() if x not in shared})
    with pytest.raises(lorax.AdapterFileError, match="vera_A.*save_projection=True"):
        lorax.peft.load(tmp_path, plain, names=NAMES)
    narrow = tensors | {"base_model.vera_A": tensors["base_model.vera_A"][:, :3]}
    write(tmp_path, config, narrow)
    with pytest.raises(lorax.AdapterFileError, match=r"`vera_A` has shape \(2, 3\)"):
        lorax.peft.load(tmp_path, plain, names=NAMES)


def test_vera_with_several_matrices(tmp_path):
    free = [eqx.nn.Linear(4, 4, use_bias=False, key=jr.key(i)) for i in range(2)]
    model = lorax.loraify(free, rank=2, method="vera", key=jr.key(2))
    other = lorax.loraify(free, rank=2, method="vera", seed=1, key=jr.key(2))
    names = {"0": "x", "1": "y"}
    mixed = [model[0], other[1]]
    with pytest.raises(ValueError, match=r"seeds \{0, 1\}.*save_adapter"):
        lorax.peft.save(tmp_path, mixed, names=names)
    loaded = []
    for one in (model, other):
        lorax.peft.save(tmp_path, one, names=names)
        loaded.append(lorax.peft.load(tmp_path, free, names=names))
    mixed = [loaded[0][0], loaded[1][1]]
    with pytest.raises(ValueError, match="those of . are not the beginnings"):
        lorax.peft.save(tmp_path, mixed, names=names)


# Trained rows of a table

ROWS = "base_model.model.words.token_adapter.trainable_tokens_delta"


@pytest.fixture
def with_rows(tmp_path):
    method = {"words": "tokens", "*": "lora"}
    plain, model = make(["words", "layers"], method=method, indices=(4, 1))
    lorax.peft.save(tmp_path, model, names=NAMES)
    return plain, model, tmp_path


def test_trained_rows(with_rows):
    plain, model, folder = with_rows
    config, tensors = files(folder)
    assert config["trainable_token_indices"] == {"words": [4, 1]}
    new = model.words.weight.materialise()[jnp.asarray([4, 1])]
    np.testing.assert_allclose(tensors[ROWS], new, rtol=1e-6)
    loaded = lorax.peft.load(folder, plain, names=NAMES)
    assert loaded.words.weight.indices == (4, 1)
    np.testing.assert_allclose(
        loaded.words.weight.delta, model.words.weight.delta, atol=1e-6
    )
    assert_identical(loaded.layers, model.layers)
    # PEFT takes a list for the rows of the embedding of the model.
    write(folder, config | {"trainable_token_indices": [4, 1]}, tensors)
    assert_identical(lorax.peft.load(folder, plain, names=NAMES), loaded)
    default = {x: y for x, y in tensors.items() if x != ROWS}
    write(folder, config, default | {f"{ROWS}.default": tensors[ROWS]})
    assert_identical(lorax.peft.load(folder, plain, names=NAMES), loaded)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"words": [4]}, r"shape \(2, 4\), and .* \(1, 4\).*The file is for a model"),
        ({"words": [4, 9]}, r"\[4, 9\] for words.*0 to 8.*make that of `model` as"),
        ({"words": "4"}, r"'4' for words, where a list of numbers"),
        ({"words": [4, 1], "x": [1]}, r"has 'x', for which there is no tensor"),
        ({"x": [4, 1]}, "nowhere.*words.token_adapter"),
        (None, "nowhere.*words.token_adapter"),
    ],
)
def test_rows_that_are_refused(option, message, with_rows):
    plain, _, folder = with_rows
    config, tensors = files(folder)
    write(folder, config | {"trainable_token_indices": option}, tensors)
    with pytest.raises(lorax.AdapterFileError, match=f"(?s){message}"):
        lorax.peft.load(folder, plain, names=NAMES)


def test_rows_that_peft_has_not(tmp_path):
    _, model = make("layers", method="tokens", indices=(1,))
    with pytest.raises(ValueError, match=r"layers\.weight .* no embedding.*save_adapt"):
        lorax.peft.save(tmp_path, model, names=NAMES)
    _, model = make(["words"], method="tokens", indices=(1,))
    names = NAMES | {"conv": "more_words"}
    with pytest.raises(ValueError, match="cannot name words alone.*save_adapter"):
        lorax.peft.save(tmp_path, model, names=names)


# DoRA


def test_dora_beside_lora_is_refused(tmp_path):
    _, model = make(["words", "conv"], method={"words": "dora", "*": "lora"})
    with pytest.raises(ValueError, match="several methods, 'dora'.*'lora'.*save_adapt"):
        lorax.peft.save(tmp_path, model, names=NAMES)


def test_dora_of_a_layer_that_is_stored_in_out(tmp_path):
    plain = Model(jr.key(0))
    names = {"project": "project"}
    # With a layer `(out, in)` as the go-between: its outputs are its rows.
    turned = eqx.tree_at(lambda m: m.project.weight, plain, plain.project.weight.T)
    model = lorax.loraify(
        turned, "project", rank=2, alpha=3.0, method="dora", key=jr.key(1)
    )
    model = randomised(model)
    lorax.peft.save(tmp_path, model, names=names)
    loaded = lorax.peft.load(
        tmp_path, plain, names=names, transposed=InOut, allow_other_base=True
    )
    assert loaded.project.weight.outputs == "columns"
    found, expected = (x.project.weight.materialise() for x in (loaded, model))
    np.testing.assert_allclose(found.T, expected, rtol=1e-5)


def test_dora_of_tied_embeddings_is_refused(tmp_path):
    _, model = make("words", method="dora")
    with pytest.raises(ValueError, match=r"words\.weight has DoRA.*[Uu]ntie"):
        lorax.peft.save(tmp_path, model, names=NAMES, tied={"words": "lm_head"})

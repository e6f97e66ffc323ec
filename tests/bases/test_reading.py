"""Weights in the formats of other libraries, against plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical
from stored import as_tensor, byte, KINDS, make_file, make_tensor, RANDOM

import eqx_lorax as lorax


@pytest.mark.parametrize("kind", KINDS)
def test_gguf(kind):
    tensor, values = make_tensor(kind)
    array = lorax.quantised.from_gguf(tensor)
    assert array.shape == values.shape and array.dtype == jnp.float32
    # Bit for bit, in no more bytes than the file has.
    np.testing.assert_array_equal(array.dequantise(), values)
    assert array.nbytes == tensor.data.nbytes
    rows = np.array([3, 1])
    np.testing.assert_array_equal(array[rows], values[rows])
    permuted = jax.tree.map(lambda x: x[rows], array)
    np.testing.assert_array_equal(permuted.dequantise(), values[rows])
    stack = jax.tree.map(lambda *x: jnp.stack(x), array, array)
    np.testing.assert_array_equal(stack[1].dequantise(), values)
    assert lorax.quantised.from_gguf(tensor, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_of_gguf(kind):
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[kind]
    values = RANDOM.normal(size=(3, 4)).astype(dtype)
    # The package gives bfloat16 as bytes.
    data = values.view(np.uint8) if kind == "BF16" else values
    found = lorax.quantised.from_gguf(as_tensor(kind, (3, 4), data))
    assert isinstance(found, jax.Array) and found.dtype == dtype
    assert (found == values).all()


SHAPES = {"rows": (4, 128), "over the ends of rows": (6, 32), "a part": (5, 10)}
SHAPES["many blocks"] = (40, 640)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes(name, nested, shape):
    tensors, values = make_file(name, nested, shape)
    array = lorax.quantised.from_bitsandbytes(tensors, "a")
    assert array.shape == shape
    np.testing.assert_array_equal(array.dequantise(), values)
    x = jnp.ones(shape[1])
    assert_close(array @ x, values @ np.ones(shape[1]), 1e-4)
    narrow = lorax.quantised.from_bitsandbytes(tensors, "a", dtype=jnp.bfloat16)
    assert (narrow.dequantise() == values.astype(jnp.bfloat16)).all()


def test_eight_bits_of_bitsandbytes():
    codes, largest = byte(3, 8).view(np.int8), RANDOM.random(3).astype(np.float32)
    tensors = {"weight": codes, "SCB": largest, "weight_format": np.uint8(0)}
    array = lorax.quantised.from_bitsandbytes(tensors, "")
    scales = largest * np.float32(1 / 127)
    np.testing.assert_array_equal(array.dequantise(), codes * scales[:, None])
    tensors["weight_format"] = np.uint8(2)
    with pytest.raises(ValueError, match="weight_format=2.*newer bitsandbytes"):
        lorax.quantised.from_bitsandbytes(tensors, "")


@pytest.mark.parametrize("storage", [jnp.bfloat16, np.float32])
def test_four_bits_stored_as_other_dtypes(storage):
    tensors, values = make_file()
    tensors["a.weight"] = tensors["a.weight"].view(np.uint8).reshape(-1).view(storage)
    array = lorax.quantised.from_bitsandbytes(tensors, "a")
    np.testing.assert_array_equal(array.dequantise(), values)


def test_scales_in_bfloat16():
    # As of a model that has run on a CPU before it was saved.
    tensors, _ = make_file()
    absmax = tensors["a.weight.absmax"].astype(jnp.bfloat16)
    tensors["a.weight.absmax"] = absmax
    array = lorax.quantised.from_bitsandbytes(tensors, "a")
    tensors["a.weight.absmax"] = absmax.astype(np.float32)
    assert_identical(array, lorax.quantised.from_bitsandbytes(tensors, "a"))


def test_a_codebook_of_the_file():
    tensors, _ = make_file()
    tensors["a.weight.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
    array = lorax.quantised.from_bitsandbytes(tensors, "a")
    assert array.format.codebook == tuple(tensors["a.weight.quant_map"].tolist())


def test_errors_of_gguf():
    tensor, _ = make_tensor("Q4_1")
    tensor.data = tensor.data[:, :-3]
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight.*228 bytes.*incomplete"):
        lorax.quantised.from_gguf(tensor)
    with pytest.raises(ValueError, match="kind IQ2_XS, which is not read.*Q6_K, F32"):
        lorax.quantised.from_gguf(as_tensor("IQ2_XS", (4, 256), byte(4, 10)))
    with pytest.raises(ValueError, match="do not divide its last axis"):
        lorax.quantised.from_gguf(as_tensor("Q8_0", (4, 33), byte(4, 34)))


def without(name):
    def change(tensors):
        del tensors[name]

    return change


def shortened(tensors):
    tensors["a.weight"] = tensors["a.weight"][:-1]


def cast(tensors):
    tensors["a.weight.absmax"] = tensors["a.weight.absmax"].astype(np.float64)


def damaged(text):
    def change(tensors):
        tensors[STATE] = np.frombuffer(text.encode(), np.uint8)

    return change


STATE = "a.weight.quant_state.bitsandbytes__nf4"

ERRORS = {
    "text": (damaged('{"shape": [4,'), f"{STATE} does not say .*JSON.* damaged. Get"),
    "key": (damaged('{"shape": [4, 128]}'), f"{STATE} .*KeyError: 'blocksize'"),
    "block": (
        damaged('{"shape": [4, 128], "blocksize": 0}'),
        "blocks of 0 in an array of shape .4, 128.*damaged",
    ),
    "list": (damaged("[]"), f"{STATE} does not say"),
    "weight": (without("a.weight"), "no tensor 'a.weight'"),
    "absmax": (without("a.weight.absmax"), "no tensor 'a.weight.absmax', without"),
    "codebook": (without("a.weight.quant_map"), "no tensor 'a.weight.quant_map'"),
    "state": (
        without(STATE),
        "comes with neither .*not quantised by bitsandbytes.*uint8",
    ),
    "size": (shortened, "a.weight has 255 entries of uint8 in the place of 256 bytes"),
    "dtype": (cast, "a.weight.absmax has 8 entries of float64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_bitsandbytes(name):
    change, message = ERRORS[name]
    tensors, _ = make_file()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        lorax.quantised.from_bitsandbytes(tensors, "a")


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_quantised_as_the_file_was(kind):
    """In the same format, and with scales as narrow, but for nested ones of GGUF."""
    array = lorax.quantised.from_gguf(make_tensor(kind)[0])
    w = RANDOM.normal(size=array.shape).astype(np.float32)
    again = merge_and_quantise(array, w)
    bits = sum(array.format.bits)
    assert np.linalg.norm(again.dequantise() - w) < 1.7 * 2**-bits * np.linalg.norm(w)
    assert again.format == array.format
    if kind in ("Q4_K", "Q6_K"):
        assert again.scales.dtype == jnp.float32
    else:
        assert jax.tree.structure(again) == jax.tree.structure(array)
        assert again.nbytes == array.nbytes


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_bitsandbytes_are_as_they_were(shape, nested):
    tensors, _ = make_file("nf4", nested, SHAPES[shape])
    array = lorax.quantised.from_bitsandbytes(tensors, "a")
    w = RANDOM.normal(size=array.shape).astype(np.float32)
    again = merge_and_quantise(array, w)
    assert np.linalg.norm(again.dequantise() - w) < 0.13 * np.linalg.norm(w)
    assert jax.tree.structure(again) == jax.tree.structure(array)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(y)] for y in (again, array)]
    assert shapes[0] == shapes[1]


def merge_and_quantise(array, w):
    """What `array` becomes with an update that makes it `w`."""
    delta = jnp.asarray(w) - array.dequantise()
    weight = lorax.FullWeight(array, delta)
    return lorax.unloraify({"w": weight}, requantise=True)["w"]

"""Weights in the formats of other libraries, against plain definitions."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import eqx_lorax as lorax
from eqx_lorax._bases import FORMATS
from eqx_lorax._bases.formats import SCALES


RANDOM = np.random.default_rng(0)


def half(*shape):
    """Random numbers of 16 bits, and their bytes."""
    numbers = RANDOM.normal(size=shape).astype("<f2")
    return numbers.astype(np.float32), numbers[..., None].view(np.uint8)


def byte(*shape):
    return RANDOM.integers(0, 256, shape).astype(np.uint8)


def nibbles(x):
    return np.concatenate([x & 15, x >> 4], -1)


# From a number of blocks to their bytes and their values, entry by entry as the
# format's description says.


def q4_0(n):
    (d, d_bytes), qs = half(n), byte(n, 16)
    return [d_bytes, qs], d[:, None] * (nibbles(qs) - np.float32(8))


def q4_1(n):
    (d, d_bytes), (m, m_bytes), qs = half(n), half(n), byte(n, 16)
    return [d_bytes, m_bytes, qs], d[:, None] * nibbles(qs) + m[:, None]


def fifth(bits):
    words = np.ascontiguousarray(bits).view("<u4")
    return (words >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8) << 4


def q5_0(n):
    (d, d_bytes), qh, qs = half(n), byte(n, 4), byte(n, 16)
    codes = nibbles(qs) | fifth(qh)
    return [d_bytes, qh, qs], d[:, None] * (codes - np.float32(16))


def q5_1(n):
    (d, d_bytes), (m, m_bytes), qh, qs = half(n), half(n), byte(n, 4), byte(n, 16)
    codes = nibbles(qs) | fifth(qh)
    return [d_bytes, m_bytes, qh, qs], d[:, None] * codes + m[:, None]


def q8_0(n):
    (d, d_bytes), qs = half(n), byte(n, 32)
    return [d_bytes, qs], d[:, None] * qs.view(np.int8)


def q4_k(n):
    (d, d_bytes), (low, low_bytes), s, qs = half(n), half(n), byte(n, 12), byte(n, 128)
    values = np.zeros((n, 256), np.float32)
    for j in range(8):
        if j < 4:
            scale, least = s[:, j] & 63, s[:, j + 4] & 63
        else:
            scale = (s[:, j + 4] & 15) | ((s[:, j - 4] >> 6) << 4)
            least = (s[:, j + 4] >> 4) | ((s[:, j] >> 6) << 4)
        chunk = qs[:, 32 * (j // 2) : 32 * (j // 2) + 32]
        codes = (chunk >> 4 if j % 2 else chunk & 15).astype(np.float32)
        scaled = (d * scale)[:, None] * codes
        values[:, 32 * j : 32 * j + 32] = scaled - (low * least)[:, None]
    return [d_bytes, low_bytes, s, qs], values


def q6_k(n):
    ql, qh, s, (d, d_bytes) = byte(n, 128), byte(n, 64), byte(n, 16), half(n)
    values = np.zeros((n, 256), np.float32)
    for i in range(256):
        part, rest = divmod(i, 128)
        run, at = divmod(rest, 32)
        low = ql[:, 64 * part + at + 32 * (run % 2)]
        low = low >> 4 if run > 1 else low & 15
        high = qh[:, 32 * part + at] >> (2 * run) & 3
        code = (low | high << 4).astype(np.float32) - 32
        values[:, i] = (d * s.view(np.int8)[:, i // 16]) * code
    return [ql, qh, s, d_bytes], values


KINDS = {x.__name__.upper(): x for x in (q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q6_k)}


def make_tensor(kind, rows=4, blocks=3):
    parts, values = KINDS[kind](rows * blocks)
    data = np.concatenate(parts, -1).reshape(rows, -1)
    values = values.reshape(rows, -1)
    return as_tensor(kind, values.shape, data), values


def as_tensor(kind, shape, data):
    return types.SimpleNamespace(
        name="blk.0.ffn_up.weight",
        tensor_type=types.SimpleNamespace(name=kind),
        shape=np.array(shape[::-1]),
        data=data,
    )


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


def make_file(name="nf4", nested=False, shape=(4, 128), block=64):
    """The tensors of a layer of bitsandbytes, and its values."""
    size = int(np.prod(shape))
    codes, blocks = byte(-(-size // 2)), -(-size // block)
    book = FORMATS[name].values
    state = dict(quant_type=name, blocksize=block, dtype="float32", shape=shape)
    tensors = {"a.weight": codes[:, None], "a.weight.quant_map": book}
    if nested:
        small, count = byte(blocks), -(-blocks // 256)
        scales = RANDOM.random(count).astype(np.float32)
        state |= dict(nested_blocksize=256, nested_offset=0.7, nested_dtype="float32")
        tensors["a.weight.absmax"] = small
        tensors["a.weight.nested_absmax"] = scales
        tensors["a.weight.nested_quant_map"] = SCALES.values
        each = np.repeat(scales, 256)[:blocks]
        absmax = (SCALES.values[small] * each).astype(np.float32) + np.float32(0.7)
    else:
        absmax = RANDOM.random(blocks).astype(np.float32)
        tensors["a.weight.absmax"] = absmax
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"a.weight.quant_state.bitsandbytes__{name}"] = text
    entries = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[:size]
    values = book[entries] * np.repeat(absmax, block)[:size]
    return tensors, values.reshape(shape)


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

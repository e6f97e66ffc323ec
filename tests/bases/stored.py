"""Tensors as files of other libraries have them, with random bits, and their values by
plain definitions."""

import json
import types

import numpy as np

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

"""Codes in bytes, and codes of arrays, against plain definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import eqx_lorax as lorax
from eqx_lorax._bases import Format, FORMATS
from eqx_lorax._bases.packing import pack, unpack_values


RANDOM = np.random.default_rng(0)
LAYOUTS = [(4,), (8,), (4, 1), (4, 2), (1, 2, 4)]


def make_format(bits, is_lookup):
    if not is_lookup:
        return Format("whole", bits, zero=3)
    return Format("lookup", bits, tuple(RANDOM.normal(size=2 ** sum(bits)).tolist()))


def read(planes, format):
    """The codes, bit by bit: the first has the highest bits of a byte."""
    codes, shift = 0, 0
    for plane, bits in zip(planes, format.bits, strict=True):
        each = np.unpackbits(np.asarray(plane), axis=-1)
        each = each.reshape(*plane.shape[:-1], -1, bits)
        codes = codes + ((each << np.arange(bits)[::-1]).sum(-1) << shift)
        shift += bits
    return codes


@pytest.mark.parametrize("is_lookup", [False, True], ids=["whole", "lookup"])
@pytest.mark.parametrize("bits", LAYOUTS, ids=str)
def test_codes_come_back(bits, is_lookup):
    format = make_format(bits, is_lookup)
    shape = (2, 16)

    @given(arrays(np.uint8, shape, elements=st.integers(0, 2 ** sum(bits) - 1)))
    @settings(deadline=None, max_examples=10)
    def check(codes):
        planes = pack(codes, format)
        for plane, width in zip(planes, bits, strict=True):
            assert plane.dtype == jnp.uint8 and plane.shape == (2, 16 * width // 8)
        np.testing.assert_array_equal(read(planes, format), codes)
        planes = tuple(map(jnp.asarray, planes))
        values = unpack_values(planes, format)
        assert values.dtype == jnp.float32
        np.testing.assert_array_equal(values, format.values[codes])

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_each_entry_has_the_nearest_value(name):
    # Entries of very different sizes, one of which lies on the largest value.
    w = RANDOM.standard_t(2, size=(6, 32)).astype(np.float32)
    axes = {} if name == "int8" else dict(block=16)
    array = lorax.quantise({"w": jnp.asarray(w)}, format=name, **axes)["w"]
    found = np.asarray(array.dequantise(), np.float64)
    if name == "int8":
        # A scale for each output, which in trees of parameters is the last axis.
        w, found = w.T, found.T
    blocks = w.reshape(len(w), -1, array.block)
    values = np.asarray(FORMATS[name].values, np.float64)
    scales = np.asarray(array.scales, np.float64)[..., None, None]
    offsets = 0 if array.offsets is None else np.asarray(array.offsets)[..., None, None]
    least = np.abs(scales * values + offsets - blocks[..., None]).min(-1)
    error = np.abs(found.reshape(blocks.shape) - blocks)
    assert (error <= least + 1e-6 * np.abs(blocks).max(-1, keepdims=True)).all()
    # Scales are as small as they can be; that of int4 is rounded to 18 bits.
    largest = np.abs(found).reshape(blocks.shape).max(-1)
    assert np.allclose(largest, np.abs(blocks).max(-1), rtol=1e-5)

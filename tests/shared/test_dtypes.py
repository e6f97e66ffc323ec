"""Narrow dtypes: bases with eight bits, and arrays with fewer anywhere in a model."""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest
from functions import normal
from helpers import assert_close, assert_identical, dense_weight, is_weight, trained

import eqx_lorax as lorax
from eqx_lorax._adapters.fingerprint import fingerprint
from eqx_lorax._factored import dense as form_dense


def known(*names):
    """Those of the dtypes that this version of JAX has."""
    return [jnp.dtype(getattr(ml_dtypes, x)) for x in names if hasattr(jnp, x)]


FP8 = known(
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
# It has only powers of two, without zero and sign: for scales, not for weights.
SCALES = known("float8_e8m0fnu")
SUB_BYTE = known("int2", "int4", "uint2", "uint4", "float4_e2m1fn")
every_fp8 = pytest.mark.parametrize("dtype", FP8, ids=str)
every_narrow = pytest.mark.parametrize("dtype", [*FP8, *SCALES, *SUB_BYTE], ids=str)


def count_bits(dtype):
    floats = jnp.issubdtype(dtype, jnp.floating)
    return (jnp.finfo if floats else jnp.iinfo)(dtype).bits


def every_value(dtype):
    """An array with every bit pattern of the dtype."""
    codes = np.arange(2 ** count_bits(dtype), dtype=np.uint8)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        # Always sign-extended, however they were made.
        half = 2 ** (count_bits(dtype) - 1)
        return (codes.astype(np.int8) - half).astype(dtype).reshape(2, -1)
    return codes.view(dtype).reshape(2, -1)


class Cast(eqx.Module):
    """The usual code for weights in few bits."""

    w: jax.Array

    def __call__(self, x):
        return self.w.astype(x.dtype) @ x


def fp8(dtype, *shape, seed=0):
    return normal(*shape, seed=seed).astype(dtype)


@every_fp8
def test_fp8_bases(dtype, tmp_path):
    """Adapted, called in both ways, differentiated, merged and saved."""
    plain = Cast(fp8(dtype, 4, 8))
    adapted = trained(lorax.loraify(plain, "w", rank=2, alpha=3.0, key=jr.key(0)))
    assert is_weight(adapted.w) and adapted.w.b.dtype == jnp.float32
    assert adapted.w.a.dtype == jnp.float32 and adapted.w.dtype == dtype
    x = normal(8, seed=1)
    dense = dense_weight(adapted.w)
    assert_close(adapted(x), dense @ np.asarray(x, np.float64))

    # `lorax.lora`
    params = lorax.init_lora({"w": plain.w}, 2, jr.key(0))
    assert params["w"].b.dtype == jnp.float32
    function = lorax.lora(lambda p, x: p["w"].astype(x.dtype) @ x)
    assert_close(function({"w": adapted.w}, x), dense @ np.asarray(x, np.float64), 1e-6)

    gradient = lorax.filter_grad(lambda m: jnp.sum(m(x)))(adapted)
    ones = np.ones((4, 1)) @ np.asarray(x, np.float64)[None]
    b, a = (np.asarray(y, np.float64) for y in (adapted.w.b, adapted.w.a))
    assert_close(gradient.w.b, adapted.w.scale * ones @ a.T)
    assert_close(gradient.w.a, adapted.w.scale * b.T @ ones)

    merged = lorax.unloraify(adapted)
    wide = np.asarray(form_dense(adapted.w.factored()))
    assert wide.dtype == np.float32
    assert_identical(merged.w, jnp.asarray(wide.astype(dtype)))
    assert_identical(lorax.unloraify(adapted, merge=False), plain)

    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", plain), adapted)
    other = Cast(jnp.asarray(np.asarray(plain.w)[::-1]))
    with pytest.raises(lorax.AdapterFileError, match="another base.*w differs"):
        lorax.load_adapter(tmp_path / "a", other)


@every_fp8
def test_fp8_inputs(dtype):
    """Without a cast, the output of a plain product has the narrow dtype. So does that
    of an adapted one, rounded once."""
    weight = lorax.LoraWeight(
        fp8(dtype, 4, 8), normal(4, 2, seed=1), normal(2, 8, seed=2)
    )
    x = fp8(dtype, 8, seed=3)
    found = weight @ x
    assert found.dtype == dtype
    dense = dense_weight(weight) @ np.asarray(x, np.float64)
    step = float(jnp.finfo(dtype).eps)
    assert_close(found, dense, 2 * step)
    assert_identical(weight[2].dtype, dtype)
    assert_close(weight[2], dense_weight(weight)[2], step)
    assert weight.T.astype(jnp.bfloat16).dtype == jnp.bfloat16


# The gate runs the heavy tests as users compile.
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_merging_rounds_once(again):
    """Not through float16, which would round values in between twice."""
    for dtype in FP8:
        near = np.asarray(every_value(dtype), np.float32).ravel()
        near = np.sort(near[np.isfinite(near)])
        middle = (near[1:] + near[:-1]) / 2
        values = np.concatenate([middle, middle * (1 - 2e-7), middle * (1 + 2e-7)])
        assert values.dtype == np.float32
        if os.environ.get("LORAX_OPTIMISED") != "1":
            # Of what is between the least negative number and a zero that has no sign,
            # the simpler way of XLA to write code, see `conftest.py`, makes NaN.
            is_kept = np.signbit(values) <= (values.astype(dtype) != 0)
            assert np.sum(~is_kept) <= 2
            values = values[is_kept]
        weight = lorax.LoraWeight(
            jnp.zeros((1, len(values)), dtype),
            jnp.ones((1, 1)),
            jnp.asarray(values[None]),
        )
        found = lorax.unloraify({"w": weight})["w"]
        assert found.dtype == dtype
        assert_close(found[0], values.astype(dtype), 0)


def test_merging_beyond_a_narrow_range():
    for dtype in FP8:
        weight = lorax.LoraWeight(
            jnp.ones((2, 2), dtype), jnp.full((2, 1), 1e6), jnp.ones((1, 2))
        )
        with pytest.raises(ValueError, match="not finite in w"):
            lorax.unloraify({"w": weight})


@every_narrow
def test_digests(dtype):
    x = every_value(dtype)
    on_device = jnp.asarray(x)
    assert fingerprint(on_device) == fingerprint(x)
    seen = {fingerprint(x), fingerprint(x[::-1]), fingerprint(x.reshape(-1))}
    seen.add(fingerprint(x.view(np.uint8)))
    changed = x.copy()
    changed[1, 0] = x[0, 0]
    assert len({*seen, fingerprint(changed)}) == 5


@every_narrow
def test_elsewhere_in_a_model(dtype, tmp_path):
    """They are frozen, so they are in no file but in every fingerprint."""
    table = jnp.asarray(every_value(dtype))
    model = {"codes": table, "layer": eqx.nn.Linear(4, 3, key=jr.key(0))}
    adapted = trained(lorax.loraify(model, "layer", rank=2, key=jr.key(1)))
    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", model), adapted)
    changed = {**model, "codes": jnp.asarray(np.asarray(table)[::-1])}
    with pytest.raises(lorax.AdapterFileError, match="base.*codes differs"):
        lorax.load_adapter(tmp_path / "a", changed)
    assert_identical(lorax.unloraify(adapted, merge=False), model)
    assert "layer" in str(lorax.summary(adapted))

    params, frozen = lorax.partition(adapted)
    with lorax.Checkpoints(tmp_path / "run", frozen) as checkpoints:
        numpy = np.asarray(table)
        state = {"codes": table, "numpy": numpy, "one": numpy[1, 1], "params": params}
        checkpoints.save(1, state)
        other = {"codes": table[::-1], "numpy": numpy[::-1], "one": numpy[0, 0]}
        found = checkpoints.restore(
            {**other, "params": jax.tree.map(jnp.zeros_like, params)}
        )
        assert found is not None
        new: Any = found[1]
        assert_identical(
            {**new, "numpy": jnp.asarray(new["numpy"])},
            {**state, "numpy": jnp.asarray(numpy)},
        )
        assert isinstance(new["numpy"], np.ndarray)


@every_narrow
def test_trained_arrays_in_files(dtype, tmp_path):
    """A dtype that safetensors lacks is an error."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return
    model = {"head": jnp.asarray(every_value(dtype)), "bias": jnp.ones(3)}
    path = tmp_path / "a"
    there = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
    if dtype.name in [f"float8_{x}" for x in there]:
        lorax.save_adapter(path, model, also=["head", "bias"])
        blank = jax.tree.map(jnp.ones_like, model)
        assert_identical(lorax.load_adapter(path, blank), model)
    else:
        with pytest.raises(TypeError, match=f"head is of dtype {dtype}.*also"):
            lorax.save_adapter(path, model, also=["head", "bias"])
        assert not path.exists()

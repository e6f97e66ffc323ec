"""`quantise` and `dequantise`: which arrays, the models that result, and errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

import eqx_lorax as lorax


KEY = jr.key(0)
FORMATS = {
    "nf4": dict(format="nf4", block=16),
    "nested": dict(format="nf4", block=16, nested=True),
    "fp4": dict(format="fp4", block=16),
    "int4": dict(format="int4", block=16),
    "int8": dict(format="int8"),
    "int8-block": dict(format="int8-block", block=16),
}
X = jnp.linspace(-1, 1, 16)
IMAGE = jr.normal(KEY, (16, 6, 6))


class Raw(eqx.Module):
    """Uses its array in ways that only `lora` can follow."""

    w: jax.Array

    def __call__(self, x):
        return jnp.einsum("oi,i->o", self.w, x) + jnp.dot(x, self.w.T)


MODELS = {
    "linear": (eqx.nn.MLP(16, 16, 16, 1, key=KEY), None, X),
    "convolution": (eqx.nn.Conv2d(16, 4, 3, key=KEY), None, IMAGE),
    "transposed": (eqx.nn.ConvTranspose2d(16, 4, 2, 2, key=KEY), None, IMAGE),
    "embedding": (eqx.nn.Embedding(5, 16, key=KEY), "weight", jnp.array(3)),
    "cell": (lambda x: eqx.nn.GRUCell(16, 16, key=KEY)(x, x), None, X),
    "raw": (Raw(jr.normal(KEY, (16, 16))), "w", X),
}
MODELS["cell"] = (eqx.nn.GRUCell(16, 16, key=KEY), ["weight_ih", "weight_hh"], X)


def call(model, x):
    return model(x, x) if isinstance(model, eqx.nn.GRUCell) else model(x)


CASES = [(name, format) for name in MODELS for format in ("nf4", "int8")]
CASES += [("linear", x) for x in FORMATS if ("linear", x) not in CASES]


@pytest.mark.parametrize("name, format", CASES)
def test_the_model_runs_as_it_is_and_comes_back(name, format):
    model, filter, x = MODELS[name]
    quantised = lorax.quantise(model, filter, **FORMATS[format])
    assert isinstance(quantised, type(model))
    back = lorax.dequantise(quantised)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    assert_close(call(quantised, x), call(back, x))
    error = np.linalg.norm(call(back, x) - call(model, x))
    limit = 0.1 if format.startswith("int8") else 0.5
    assert 0 < error < limit * np.linalg.norm(call(model, x))
    adapted = lorax.loraify(quantised, filter, rank=2, key=KEY)
    assert_close(call(adapted, x), call(quantised, x))
    assert eqx.tree_equal(lorax.unloraify(adapted, merge=False), quantised)
    assert eqx.tree_equal(lorax.unloraify(adapted), back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_trees_of_parameters(format):
    params = {"dense": {"kernel": jr.normal(KEY, (16, 32)), "bias": jnp.ones(32)}}
    quantised = lorax.quantise(params, **FORMATS[format])
    assert quantised["dense"]["bias"] is params["dense"]["bias"]

    @lorax.lora
    def apply(params, x):
        return x @ params["dense"]["kernel"] + params["dense"]["bias"]

    assert_close(apply(quantised, X), apply(lorax.dequantise(quantised), X))
    spec = {"dense": {"kernel": 2, "bias": lorax.LORA_FREEZE}}
    adapted = lorax.init_lora(quantised, spec, KEY)
    assert_close(apply(adapted, X), apply(quantised, X))
    if format == "int8":
        # One scale for each output, which is the last axis of such kernels.
        assert quantised["dense"]["kernel"].scales.shape == (32, 1)


def test_bytes():
    w = {"w": jnp.ones((256, 256))}
    wanted = {"nf4": 0.5625, "nested": 0.516, "int8": 1 + 4 / 256, "int8-block": 1.0625}
    for name, bytes_ in wanted.items():
        array = lorax.quantise(w, **(FORMATS[name] | dict(block=64)))["w"]
        assert array.nbytes / array.size == pytest.approx(bytes_, abs=5e-4)


def test_blocks_of_zeros_stay_zeros():
    w = {"w": jnp.zeros((4, 32)).at[1].set(1)}
    for options in FORMATS.values():
        found = lorax.dequantise(lorax.quantise(w, **options))
        assert_close(found["w"], w["w"], 2e-2)
        assert (found["w"][0] == 0).all() or "nested" in options


def test_tied_arrays_stay_tied():
    linear = eqx.nn.Linear(16, 16, key=KEY)
    first, second = lorax.quantise([linear, linear], block=16)
    assert first.weight.codes[0] is second.weight.codes[0]


def test_adapters_that_are_there_already():
    model = MODELS["linear"][0]
    adapted = lorax.loraify(model, rank=2, key=KEY)
    one = lorax.quantise(adapted, block=16)
    other = lorax.loraify(lorax.quantise(model, block=16), rank=2, key=KEY)
    assert eqx.tree_equal(one, other)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        w = {"w": jr.normal(KEY, (4, 32), dtype)}
        found = lorax.dequantise(lorax.quantise(w, format="int8"))
        assert found["w"].dtype == dtype
        assert_close(found["w"], w["w"], 2e-2)


W = jr.normal(KEY, (10, 30))
MODEL = MODELS["linear"][0]
ERRORS = {
    "format": (lambda: lorax.quantise(MODEL, format="nf5"), "Did you mean 'nf4'"),
    "odd block": (lambda: lorax.quantise(MODEL, block=63), "Pass 64"),
    "no number": (lambda: lorax.quantise(MODEL, block="64"), "such as 64"),
    "block": (lambda: lorax.quantise({"w": W}), r"300 entries of w.*`block=4`"),
    "each block": (
        lambda: lorax.quantise({"w": W, "v": W}),
        r"300 entries of v.*300 entries of w",
    ),
    "nan": (
        lambda: lorax.quantise({"w": W.at[0, 0].set(jnp.nan)}, block=4),
        "w has values that are not finite, and nothing was",
    ),
    "inf": (
        lambda: lorax.quantise({"w": W.at[9, 9].set(jnp.inf)}, "w", "int4", block=4),
        "not finite",
    ),
    "twice": (
        lambda: lorax.quantise(lorax.quantise(MODEL, block=16)),
        "quantised already.*dequantise",
    ),
    "integers": (lambda: lorax.quantise({"w": W.astype(int)}), "nothing to quantise"),
    "narrow": (
        lambda: lorax.quantise({"w": W.astype("float8_e4m3fn")}),
        "w is of dtype float8_e4m3fn.*few bits",
    ),
    "filter": (lambda: lorax.quantise(MODEL, "layer"), "Did you mean 'layers'"),
    "not quantised": (lambda: lorax.dequantise(MODEL), "no quantised arrays"),
    "no adapters": (
        lambda: lorax.unloraify(lorax.quantise(MODEL, block=16)),
        "no adapters to take out",
    ),
    "trained": (
        lambda: lorax.partition(lorax.quantise(MODEL, block=16), also="*.weight"),
        "matched nothing|no array that could be trained",
    ),
    "array": (
        lambda: np.asarray(lorax.quantise({"w": W}, block=4)["w"]),
        r"dequantise\(\)",
    ),
    "inner axis": (
        lambda: lorax.quantise({"w": W}, block=2)["w"][:, 3:],
        "Axis 1 of .* the blocks of a quantised array lie along that axis",
    ),
}


@pytest.mark.own_errors
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    do, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        do()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_stacks_in_trees_of_parameters(format):
    w = lorax.quantise({"w": jr.normal(KEY, (3, 16, 16))}, **FORMATS[format])["w"]

    def apply(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    wanted = apply(w.dequantise(), X)
    assert_close(apply(w, X), wanted, 1e-4)
    assert_close(lorax.lora(apply, on_materialise="error")(w, X), wanted, 1e-4)


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_loops_along_an_axis_that_is_not_stored_first(transform):
    # As many rows as columns, so that the shapes alone would not tell.
    table = {"w": jr.normal(KEY, (16, 16))}
    views = [
        lorax.quantise(table, block=16)["w"].T,
        lorax.quantise(table, format="int8")["w"],
    ]

    def read(w):
        if transform == "vmap":
            return jax.vmap(lambda row: row.dequantise())(w)
        return jax.lax.scan(lambda _, row: (None, row.dequantise()), None, w)[1]

    def add(w):
        return jax.lax.scan(lambda _, row: (None, jnp.sum(row)), None, w)[1]

    for view in views:
        with pytest.raises(ValueError, match="do not belong together.*another axis"):
            read(view)
        with pytest.warns(lorax.MaterialiseWarning, match="not the first one"):
            found = lorax.lora(add)(view)
        assert_close(found, jnp.sum(view.dequantise(), 1), 1e-4)
    assert_close(read(views[0].T), views[0].T.dequantise())


def test_specs_see_one_array():
    quantised = lorax.quantise({"w": jr.normal(KEY, (16, 16))}, block=16)
    spec = lorax.simple_spec(quantised, decision_fn=lambda path, array: array.ndim)
    assert spec == {"w": 2}

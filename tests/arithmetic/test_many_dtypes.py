"""Several adapters with any dtypes: only the result is rounded, and nothing depends on
JAX's promotion of dtypes."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import base_of, run, weights, wide

import eqx_lorax as lorax


# With x64 the default dtype is float64, which is then mixed with narrow ones.
CASES = [
    ("bfloat16", False),
    ("float16", True),
    ("float32", False),
    ("float32", True),
    ("float64", True),
    ("complex64", True),
    ("complex128", True),
]
MODELS = {
    "linear": (lambda dtype, key: eqx.nn.Linear(4, 3, dtype=dtype, key=key), (4,)),
    "conv": (lambda dtype, key: eqx.nn.Conv1d(4, 3, 2, dtype=dtype, key=key), (4, 5)),
    "embedding": (lambda dtype, key: _table(dtype, key), ()),
}


def _table(dtype, key):
    return {"words": eqx.nn.Embedding(5, 4, dtype=dtype, key=key)}


@pytest.fixture(params=CASES, ids=str)
def dtype(request):
    name, x64 = request.param
    with jax.enable_x64(True) if x64 else contextlib.nullcontext():
        yield jnp.dtype(name)


def drawn(shape, dtype, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * random.normal(size=shape)
    return jnp.asarray(values.astype(dtype))


def make(dtype, name="linear", options=((2, 3.0, False), (1, 2.0, True))):
    """Adapters with different ranks and scales, the frozen part of the first, and an
    input."""
    build, shape = MODELS[name]
    key = jax.random.key(0)
    model = jax.tree.map(lambda x: drawn(x.shape, dtype, 0), build(jnp.float32, key))
    parts = []
    for i, (rank, alpha, stabilised) in enumerate(options):
        adapted = lorax.loraify(
            model,
            "words" if name == "embedding" else None,
            rank=rank,
            alpha=alpha,
            rank_stabilised=stabilised,
            dtype=dtype,
            key=key,
        )
        params, frozen = lorax.partition(adapted)
        leaves, treedef = jax.tree.flatten(params)
        leaves = [drawn(x.shape, dtype, 9 * i + j) for j, x in enumerate(leaves)]
        parts.append((jax.tree.unflatten(treedef, leaves), frozen))
    x = 2 if name == "embedding" else drawn(shape, dtype, 99)
    return [params for params, _ in parts], parts[0][1], x


def update(adapter):
    """`scale * (b · a)` in float64, as a matrix."""
    (weight,) = weights(adapter)
    b = wide(weight.b).reshape(-1, weight.rank)
    a = wide(weight.a).reshape(weight.rank, -1)
    if getattr(weight, "gate", None) is not None:
        b = b * wide(weight.gate)
    return weight.scale * b @ a


def call(model, x):
    return model["words"](x) if isinstance(model, dict) else model(x)


def outputs(frozen, new, x):
    """The float64 outputs of the frozen model with the update `new`."""
    (weight,) = weights(frozen)
    kernel = wide(weight.w) + new.reshape(weight.w.shape)
    if isinstance(frozen, dict):
        return kernel[x]
    x, bias = wide(x), wide(frozen.bias)
    if kernel.ndim == 2:
        return kernel @ x + bias
    windows = np.stack([x[:, i : i + 2] for i in range(x.shape[1] - 1)])
    return np.einsum("oik,tik->ot", kernel, windows) + bias


def close(found, expected, dtype, roundings=4):
    assert found.dtype == dtype or found.dtype in (np.float64, np.complex128)
    expected = wide(expected)
    size = np.abs(expected).max()
    error = np.abs(wide(found) - expected).max()
    assert error <= roundings * float(jnp.finfo(dtype).eps) * size, (error, size)


@eqx.filter_jit
def arithmetic(adapters, factors):
    return (
        lorax.scale(adapters[0], factors[0]),
        lorax.stack([*adapters, None]),
        lorax.weighted_sum(adapters, factors),
        lorax.weighted_sum(adapters, factors, "svd", rank=3),
    )


def test_arithmetic(dtype):
    kind = list if dtype.itemsize == 4 else jnp.array
    adapters, frozen, x = make(dtype)
    updates = [update(adapter) for adapter in adapters]
    scaled, stacked, exact, compressed = arithmetic(adapters, kind([0.1, -0.7]))
    close(update(scaled), 0.1 * updates[0], dtype)
    for i, expected in enumerate(updates):
        close(update(jax.tree.map(lambda x, i=i: x[i], stacked)), expected, dtype)
    total = 0.1 * updates[0] - 0.7 * updates[1]
    close(update(exact), total, dtype, 16)
    close(update(compressed), total, dtype, 64)
    for new in (scaled, exact):
        (weight,) = weights(new)
        assert weight.b.dtype == weight.a.dtype == dtype
    close(
        run(lorax.combine(exact, frozen), x), outputs(frozen, update(exact), x), dtype
    )


@eqx.filter_jit
def mixtures(bank, frozen, factors, x):
    """The outputs for each adapter, for the mixture, and for the mixture merged."""
    models = [lorax.combine(bank[i], frozen) for i in range(len(bank))]
    models.append(lorax.combine(bank.mix(factors), frozen))
    return [call(model, x) for model in models], models[-1], lorax.unloraify(models[-1])


def test_bank(dtype):
    check_bank("linear", dtype)


@pytest.mark.parametrize("dtype", (CASES[0], CASES[4]), indirect=True, ids=str)
@pytest.mark.parametrize("name", ("conv", "embedding"))
def test_bank_of_other_layers(name, dtype):
    check_bank(name, dtype)


def check_bank(name, dtype):
    adapters, frozen, x = make(dtype, name)
    updates = [update(adapter) for adapter in adapters]
    bank = lorax.AdapterBank([*adapters, None])
    mixed = 0.1 * updates[0] - 0.7 * updates[1]
    kind = list if name == "linear" else np.array
    found, mixture, merged = mixtures(bank, frozen, kind([0.1, -0.7, 5.0]), x)
    for y, expected in zip(found, [*updates, 0 * mixed, mixed], strict=True):
        close(y, outputs(frozen, expected, x), dtype)
    close(update(mixture), mixed, dtype, 16)
    base = base_of(weights(frozen)[0])
    (kernel,) = [x for x in jax.tree.leaves(merged) if x.shape == base.shape]
    close(kernel.reshape(mixed.shape), wide(base).reshape(mixed.shape) + mixed, dtype)
    assert kernel.dtype == dtype


def test_gradients_in_the_weights_of_a_mixture(dtype):
    adapters, frozen, x = make(dtype)
    bank = lorax.AdapterBank(adapters)
    for factors in (jnp.array([0.1, -0.7]), jnp.array([0.1, -0.7], jnp.bfloat16)):
        total = lambda w: lorax.combine(bank.mix(w), frozen)(x).real.sum()  # noqa: E731
        found = jax.jit(jax.grad(total))(factors)
        expected = np.array([(update(each) @ wide(x)).sum().real for each in adapters])
        assert found.dtype == factors.dtype
        size = np.abs(wide(expected)).max()
        eps = max(float(jnp.finfo(d).eps) for d in (dtype, factors.dtype))
        assert np.abs(wide(found) - expected).max() <= 8 * eps * size


def test_complex_numbers(dtype):
    """Complex coefficients scale complex adapters, but are an error for real ones."""
    adapters, frozen, x = make(dtype)
    bank = lorax.AdapterBank(adapters)
    ways = [
        lambda: lorax.scale(adapters[0], 0.1j),
        lambda: lorax.weighted_sum(adapters, [0.1j, 0]),
        lambda: bank.mix(jnp.array([0.1j, 0])),
    ]
    for way in map(jax.jit, ways):
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            with pytest.raises(ValueError, match=r"complex.*real"):
                way()
            continue
        close(update(way()), 0.1j * update(adapters[0]), dtype, 16)


def test_heads_of_a_bank(dtype):
    """A head is returned bit for bit, whatever the values of the others."""
    keys = jax.random.split(jax.random.key(0))
    model = {"body": eqx.nn.Linear(4, 3, key=keys[0]), "head": jnp.ones(3)}
    adapted = lorax.loraify(model, "body", rank=2, key=keys[1])
    params = lorax.partition(adapted, also="head")[0]
    adapters = [params | {"head": drawn((3,), dtype, i)} for i in range(2)]
    bank = lorax.AdapterBank([*adapters, params | {"head": jnp.full(3, np.nan, dtype)}])
    index = eqx.filter_jit(lambda bank, i: bank[i]["head"])
    for i, adapter in enumerate(adapters):
        for one in (bank[i]["head"], index(bank, jnp.array(i))):
            assert one.dtype == dtype and np.array_equal(one, adapter["head"])
    bank = lorax.AdapterBank(adapters)
    heads = [wide(adapter["head"]) for adapter in adapters]
    for factors in ([0.1, -0.7], np.array([0.1, -0.7]), jnp.array([2, -1])):
        head = bank.mix(factors)["head"]
        close(head, wide(factors)[0] * heads[0] + wide(factors)[1] * heads[1], dtype)
        assert head.dtype == dtype


def test_factors_of_two_dtypes(dtype):
    """Factors of one weight may differ in dtype, and so may weights that are added
    up."""
    (first, second), frozen, x = make(dtype)
    other = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    (weight,) = weights(second)
    second = eqx.tree_at(lambda m: m.wrapped.weight.a, second, weight.a.astype(other))
    total = 0.1 * update(first) - 0.7 * update(second)
    for method, rank in (("exact", None), ("svd", 3)):
        both = eqx.filter_jit(lorax.weighted_sum)
        new = both([first, second], [0.1, -0.7], method, rank=rank)
        close(update(new), total, dtype, 64)
    bank = lorax.AdapterBank([second, second])
    mixed = -0.6 * update(second)
    model = lorax.combine(
        bank.mix([0.1, -0.7]), lorax.partition(_scaled_as(second, frozen))[1]
    )
    close(run(model, x), outputs(frozen, mixed, x), dtype)


def _scaled_as(params, frozen):
    """The model of `frozen` with the static settings of `params`."""
    (weight,) = weights(params)
    (there,) = weights(frozen)
    whole = weight.replace(w=there.w)
    return eqx.tree_at(
        lambda m: m.wrapped.weight, frozen, whole, is_leaf=lambda x: x is there
    )

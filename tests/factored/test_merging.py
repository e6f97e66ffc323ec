"""Products with the sum of base and update, formed where a CPU is faster with it."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_no_dense, call64, DERIVATIVES, trained

import eqx_lorax as lorax


OUT, IN = 48, 96
# A sum is worthwhile from `48 * 96 / (48 + 96)` tokens on.
FEW, MANY = 31, 32
KEY = jr.key(0)


def make_layer(**options):
    layer = eqx.nn.Linear(IN, OUT, key=KEY, dtype=options.pop("base", None))
    return trained(lorax.loraify(layer, rank=3, alpha=2.0, key=KEY, **options))


def normal(*shape):
    random = np.random.default_rng(shape)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def on_batch(layer, x):
    return jax.vmap(layer)(x)


def nested(layer, x):
    return jax.vmap(jax.vmap(layer))(x.reshape(2, len(x) // 2, IN))


def by_matmul(layer, x):
    return x @ layer.weight.T


def per_layer(layer, x):
    """With factors of its own for each of two adapters on one base."""
    axes = jax.tree.map(lambda _: None, layer)
    axes = eqx.tree_at(lambda m: m.weight.b, axes, 0, is_leaf=lambda y: y is None)
    two = eqx.tree_at(lambda m: m.weight.b, layer, jnp.stack([layer.weight.b] * 2))
    return eqx.filter_vmap(on_batch, in_axes=(axes, None))(two, x)


def with_dropout(layer, x):
    return jax.vmap(layer)(x, key=jr.split(KEY, len(x)))


def backward(layer, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(on_batch(layer, x))))(x)


def count_sums(fn, layer, x, platform="cpu", rows=OUT):
    """The number of times that the program forms `b · a`."""
    arrays, rest = eqx.partition(layer, eqx.is_array)
    on_arrays = jax.jit(lambda arrays, x: fn(eqx.combine(arrays, rest), x))
    text = on_arrays.trace(arrays, x).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(rf"dot_general.*-> tensor<{rows}x{IN}x", text))


@pytest.mark.parametrize("fn", [on_batch, by_matmul, backward])
def test_the_number_of_tokens_decides(fn):
    layer = make_layer()
    assert count_sums(fn, layer, normal(FEW, IN)) == 0
    assert count_sums(fn, layer, normal(MANY, IN)) == (2 if fn is backward else 1)


def test_what_decides_otherwise():
    x, layer = normal(MANY, IN), make_layer()
    assert count_sums(nested, layer, x) == 1
    # Each of the adapters would need an array of the size of the base.
    assert count_sums(per_layer, layer, x) == 0
    # Other devices may multiply in a precision that loses small updates.
    assert count_sums(on_batch, layer, x, "cuda") == 0
    narrow = x.astype(jnp.bfloat16)
    assert count_sums(on_batch, make_layer(base=jnp.bfloat16), narrow) == 0
    assert count_sums(with_dropout, make_layer(dropout=0.5), x) == 0
    apart = lorax.merged_forward(layer, enabled=False)
    assert count_sums(on_batch, apart, x) == 0
    always = lorax.merged_forward(layer)
    assert count_sums(on_batch, always, normal(1, IN), "cuda") == 1
    small = trained(lorax.loraify(eqx.nn.Linear(IN, 9, key=KEY), rank=3, key=KEY))
    assert count_sums(on_batch, small, x, rows=9) == 0
    again = lorax.merged_forward(always, enabled=None)
    assert [count_sums(on_batch, again, normal(n, IN)) for n in (FEW, MANY)] == [0, 1]


def test_no_gradient_has_the_shape_of_the_base():
    x = normal(MANY, IN)
    loss = lambda layer, x: jnp.sum(jnp.sin(on_batch(layer, x)))  # noqa: E731
    assert_no_dense(lorax.filter_grad(loss), make_layer(), x)
    assert count_sums(lorax.filter_grad(loss), make_layer(), x) == 1


TRANSFORMATIONS = {
    **DERIVATIVES,
    "each example": lambda f: (
        lambda b, a, x: jax.vmap(jax.grad(f, (0, 1, 2)), (None, None, 0))(
            b, a, jnp.stack([x, x[::-1]])
        )
    ),
    "recomputed": lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_derivatives_are_those_of_the_formula(name):
    layer = make_layer()
    transform = TRANSFORMATIONS[name]

    def adapted(b, a, x):
        new = eqx.tree_at(lambda m: (m.weight.b, m.weight.a), layer, (b, a))
        return jnp.sum(jnp.sin(on_batch(new, x)))

    weight, bias = layer.weight, layer.bias

    def dense(b, a, x, w, bias):
        return jnp.sum(jnp.sin(x @ (w + weight.scale * b @ a).T + bias[None]))

    def expected(b, a, x, w, bias):
        return transform(lambda b, a, x: dense(b, a, x, w, bias))(b, a, x)

    args = (weight.b, weight.a, normal(MANY, IN))
    found = jax.jit(transform(adapted))(*args)
    assert_close(found, call64(expected, *args, weight.w, bias), 1e-5)


@pytest.mark.cpu
def test_unrolled_layers_share_one_buffer():
    """XLA would form the sums of all layers first, and keep them."""
    layers = [make_square(key) for key in jr.split(KEY, 6)]

    def measure(layers):
        def loss(params, frozen, x):
            for layer in eqx.combine(params, frozen):
                x = jnp.tanh(on_batch(layer, x))
            return jnp.sum(x)

        params, frozen = lorax.partition(layers)
        step = jax.jit(jax.grad(loss, (0, 2)))
        compiled = step.lower(params, frozen, normal(160, 256)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    apart = measure(lorax.merged_forward(layers, enabled=False))
    assert measure(layers) < apart + 2 * 4 * 256**2


def make_square(key):
    layer = eqx.nn.Linear(256, 256, use_bias=False, key=key)
    return lorax.loraify(layer, rank=4, key=key)

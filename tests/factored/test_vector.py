"""Products of one vector with small matrices, which are sums of entries on a CPU."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, call64, DERIVATIVES, equations, trained

import eqx_lorax as lorax


OUT, IN = 5, 7
KEY = jr.key(0)


def normal(*shape):
    random = np.random.default_rng(shape)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def make_layer(rows=OUT, **options):
    layer = eqx.nn.Linear(IN, rows, key=KEY, **options)
    return trained(lorax.loraify(layer, rank=2, alpha=3.0, key=KEY))


def count(fn, *args, platform="cpu"):
    """The number of matrix products in the lowered program."""
    arrays, rest = eqx.partition(args, eqx.is_array)
    traced = jax.jit(lambda arrays: fn(*eqx.combine(arrays, rest))).trace(arrays)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.dot_general")


def call(layer, x):
    return layer(x)


def backward(layer, x):
    return lorax.filter_grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer)


def test_what_becomes_a_sum():
    layer, x = make_layer(), normal(IN)
    assert count(call, layer, x) == 0
    assert count(call, layer, x, platform="cuda") == 3
    # That with a large base is none, those with its factors are.
    assert count(call, make_layer(rows=600), x) == 1
    assert count(jax.vmap(layer), normal(3, IN)) == 3
    narrow = make_layer(dtype=jnp.bfloat16)
    assert count(call, narrow, x.astype(jnp.bfloat16)) == 1
    # The gradients of the factors sum over nothing.
    assert count(backward, layer, x) == 2


TRANSFORMATIONS = {
    "values": lambda f: f,
    **DERIVATIVES,
    "each of several": lambda f: (
        lambda b, a, x: jax.vmap(jax.grad(f, (0, 1, 2)))(
            jnp.stack([b, 2 * b]), jnp.stack([a, -a]), jnp.stack([x, x])
        )
    ),
    "several vectors": lambda f: (
        lambda b, a, x: jax.vmap(jax.grad(f, (0, 1, 2)), (None, None, 0))(
            b, a, jnp.stack([x, 2 * x])
        )
    ),
    "several matrices": lambda f: (
        lambda b, a, x: jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None))(
            jnp.stack([b, 2 * b]), a, x
        )
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_derivatives_are_those_of_the_formula(name, side):
    layer, transform = make_layer(), TRANSFORMATIONS[name]
    weight = layer.weight
    x = normal(IN if side == "left" else OUT)

    def adapted(b, a, x):
        new = eqx.tree_at(lambda w: (w.b, w.a), weight, (b, a))
        return jnp.sum(jnp.sin(new @ x if side == "left" else x @ new))

    def expected(b, a, x, w):
        def dense(b, a, x):
            new = w + weight.scale * b @ a
            return jnp.sum(jnp.sin(new @ x if side == "left" else x @ new))

        return transform(dense)(b, a, x)

    args = (weight.b, weight.a, x)
    found = jax.jit(transform(adapted))(*args)
    assert_close(found, call64(expected, *args, weight.w), 1e-5)


def test_functions_over_adapted_layers_see_products():
    """The function door, plans and policies know the primitive."""
    layer, x = make_layer(), normal(IN)
    again = lorax.init_lora(layer.weight.a, 2, KEY)

    def run(a, x):
        return eqx.tree_at(lambda m: m.weight.a, layer, a)(x)

    function = lorax.lora(run, on_materialise="error")
    assert_close(function(again, x), layer(x))
    names = {e.primitive.name for e in equations(jax.make_jaxpr(layer)(x).jaxpr)}
    assert "lorax_multiply_vector" in names

    def loss(layer, x):
        return jnp.sum(layer(x))

    plan = lorax.plan(loss, layer, x)
    one = lambda m, n: 2 * m * n  # noqa: E731
    forward = one(OUT, IN) + one(2, IN) + one(OUT, 2)
    assert plan.flops == forward + one(OUT, 2) + one(2, IN) + one(OUT, 2)

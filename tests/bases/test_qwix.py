"""The arrays of qwix as bases: what users write is in `docs/quantised.md`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close

import eqx_lorax as lorax


pytestmark = pytest.mark.interop

X = jr.normal(jr.key(2), (128,))
FORMATS = {
    "nf4": dict(qtype="nf4", channelwise_axes=[0], tiled_axes={1: 64}),
    "int8": dict(qtype="int8", channelwise_axes=[0]),
    "int4": dict(qtype="int4", channelwise_axes=[0], tiled_axes={1: 32}),
}


@pytest.fixture(scope="module")
def qwix():
    import qwix

    lorax.register_base(qwix.QArray)(qwix.dequantize)
    return qwix


def make(qwix, name, seed=0):
    return qwix.quantize(jr.normal(jr.key(seed), (64, 128)), **FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_layers(qwix, name):
    array = make(qwix, name)
    linear = eqx.nn.Linear(128, 64, key=jr.key(0))
    twin = eqx.tree_at(lambda x: x.weight, linear, qwix.dequantize(array))
    adapted, wanted = (
        lorax.loraify(x, rank=4, key=jr.key(1))
        for x in (eqx.tree_at(lambda x: x.weight, linear, array), twin)
    )
    assert_close(adapted(X), wanted(X))

    def gradients(model):
        params, frozen = lorax.partition(model)

        def loss(params, x):
            return jnp.sum(jnp.sin(lorax.combine(params, frozen)(x)))

        found, to_x = jax.grad(loss, (0, 1))(params, X)
        return found.weight.b, found.weight.a, to_x

    jax.tree.map(assert_close, gradients(adapted), gradients(wanted))
    assert type(lorax.unloraify(adapted, merge=False).weight) is qwix.QArray
    assert_close(lorax.unloraify(adapted)(X), wanted(X))
    assert_close(lorax.dequantise(adapted)(X), wanted(X))


def test_stacks_in_a_scan(qwix):
    arrays = [make(qwix, "nf4", seed) for seed in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *arrays)
    weight = lorax.init_lora(stack, lorax.LoraSpec(4, batch=(0,)), jr.key(0))

    @lorax.lora
    def run(w, x):
        return jax.lax.scan(lambda x, w: (x, w @ x), x, w)[1]

    for w in (weight, stack):
        assert_close(run(w, X), jax.vmap(lambda w: w @ X)(qwix.dequantize(stack)))

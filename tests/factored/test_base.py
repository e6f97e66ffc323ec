"""A kind of base that nobody here has heard of registers itself, in this one file."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, wide

import eqx_lorax as lorax
from eqx_lorax._factored import contract_base, dense, map_arrays


class Int8(eqx.Module):
    """A matrix of whole numbers and a scale for each row, with batch axes in front."""

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self):
        return self.codes.shape

    @property
    def ndim(self):
        return self.codes.ndim

    @property
    def dtype(self):
        return self.scales.dtype


@dense.register
def _(base: Int8):
    return base.codes.astype(base.dtype) * base.scales[..., None]


@contract_base.register
def _(base: Int8, x, *, is_frozen=False, **arguments):
    array = jax.lax.stop_gradient(dense(base)) if is_frozen else dense(base)
    return contract_base(array, x, is_frozen=is_frozen, **arguments)


@map_arrays.register
def _(base: Int8, fn, labels, moved=()):
    return Int8(fn(base.codes, labels), fn(base.scales, labels[:-1]))


def make(*batch):
    keys = jr.split(jr.key(0), 4)
    base = Int8(
        jr.randint(keys[0], (*batch, 5, 7), -127, 128).astype(jnp.int8),
        jr.uniform(keys[1], (*batch, 5)) / 100,
    )
    b, a = jr.normal(keys[2], (*batch, 5, 2)), jr.normal(keys[3], (*batch, 2, 7))
    return lorax.LoraWeight(base, b, a, 3.0)


def plain(weight):
    base = wide(weight.w.codes) * wide(weight.w.scales)[..., None]
    return base + weight.scale * wide(weight.b) @ wide(weight.a)


X = jnp.linspace(-1, 1, 7)


def test_layers_and_merging():
    weight = make()
    linear = eqx.nn.Linear(7, 5, key=jr.key(1))
    layer = lorax.LoraLinear(eqx.tree_at(lambda x: x.weight, linear, weight))
    assert_close(layer(X), plain(weight) @ wide(X) + wide(linear.bias))
    assert_close(weight.materialise(), plain(weight))
    assert_close(lorax.unloraify(layer)(X), layer(X))


def test_gradients():
    weight = make()
    params, frozen = eqx.partition(weight, weight.trainable())

    def loss(params, x):
        return jnp.sum(jnp.sin(eqx.combine(params, frozen) @ x))

    to_factors, to_x = jax.grad(loss, (0, 1))(params, X)
    slope = np.cos(plain(weight) @ wide(X))
    assert_close(to_x, plain(weight).T @ slope, 1e-4)
    update = weight.scale * slope[:, None] * wide(X)[None]
    assert_close(to_factors.b, update @ wide(weight.a).T, 1e-4)
    assert_close(to_factors.a, wide(weight.b).T @ update, 1e-4)
    assert to_factors.w.scales is None


def test_functions_and_views():
    weight = make()
    fn = lorax.lora(lambda w, x: x @ w.T, on_materialise="error")
    assert_close(fn(weight, X), plain(weight) @ wide(X))
    assert_close(weight.T.materialise(), plain(weight).T)


def test_stacks_are_sliced():
    weight = make(3)
    _, found = jax.lax.scan(lambda _, w: (None, w @ X), None, weight)
    assert_close(found, plain(weight) @ wide(X))
    assert_close((weight[1:] @ X)[1], plain(weight)[2] @ wide(X))


def test_what_it_cannot_do_is_done_with_the_dense_array():
    weight = make()
    look_up = lorax.lora(lambda w, i: w[i])
    with pytest.warns(lorax.MaterialiseWarning, match="a Int8 has no `gather`"):
        found = look_up(weight, jnp.array([2, 0]))
    assert_close(found, plain(weight)[[2, 0]])

"""Convolutions with the sum of kernel and update, chosen where images are large."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close, trained

import eqx_lorax as lorax


def make(**options):
    layer = eqx.nn.Conv2d(4, 8, 3, padding=1, key=jr.key(0), **options)
    return trained(lorax.loraify(layer, rank=2, key=jr.key(1)))


def count_convolutions(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return text.count(" convolution(")


pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_sum_changes_neither_values_nor_gradients(groups):
    adapted = make(groups=groups)
    apart = lorax.merged_forward(adapted, enabled=False)
    x = jr.normal(jr.key(2), (2, 4, 8, 9))

    def loss(params, frozen, x):
        y = jax.vmap(lorax.combine(params, frozen))(x)
        return (jnp.sin(y) ** 2).sum(), y

    def step(model):
        params, frozen = lorax.partition(model)
        step = jax.grad(loss, (0, 2), has_aux=True)
        return jax.jit(lambda params, x: step(params, frozen, x))(params, x)

    got, expected = (jax.tree.leaves(step(model)) for model in (adapted, apart))
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_large_images_meet_the_sum(groups):
    """One convolution in the forward pass, and one for the gradient of the images."""
    adapted = make(groups=groups)
    total = lambda x: (jax.vmap(adapted)(x) ** 2).sum()  # noqa: E731
    for size, count in ((16, 1), (1, 2)):
        x = jr.normal(jr.key(2), (1, 4, size, size))
        assert count_convolutions(jax.vmap(adapted), x) == count
    # The forward pass too.
    assert count_convolutions(jax.grad(total), jnp.ones((2, 4, 16, 16))) == 2


def test_a_batch_counts_as_one_large_image():
    adapted = make()
    for images, count in ((1, 2), (64, 1)):
        x = jr.normal(jr.key(2), (images, 4, 1, 1))
        assert count_convolutions(jax.vmap(adapted), x) == count


def test_kernels_of_many_adapters_are_not_formed():
    """Below `vmap` every example would need a sum of its own."""
    adapted = make()
    params, frozen = lorax.partition(adapted)
    stacked = lorax.stack([params, lorax.scale(params, 2.0)])
    x = jr.normal(jr.key(2), (2, 4, 16, 16))

    def one(params, x):
        return lorax.combine(params, frozen)(x)

    assert count_convolutions(jax.vmap(one), stacked, x) == 2
    got = jax.vmap(one)(stacked, x)
    assert_close(got[0], adapted(x[0]), 1e-5)

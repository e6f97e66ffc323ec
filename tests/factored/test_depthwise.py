"""Depthwise convolutions, which are sums of shifted images on the CPU."""

import functools

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, equations, trained

import eqx_lorax as lorax
from eqx_lorax._factored.primitives import convolve_depthwise, is_depthwise


FIRST, LAST = (0, 1, 2, 3), (0, 3, 1, 2)
GEOMETRIES = {
    "plain": ((3, 3), dict(padding=((1, 1), (1, 1)))),
    "SAME": ((2, 3), dict(padding="SAME", window_strides=(2, 1))),
    "cut": ((1, 2), dict(padding=((-1, 2), (0, -2)))),
    "strided": (
        (3, 2),
        dict(window_strides=(2, 3), padding=((1, 0), (2, 2)), rhs_dilation=(2, 1)),
    ),
    "transposed": (
        (3, 2),
        dict(lhs_dilation=(2, 3), padding=((1, 2), (0, 1)), rhs_dilation=(1, 2)),
    ),
    "no result": ((3, 3), dict(padding=((0, 0), (-2, -2)))),
}


def make(geometry, lhs=FIRST, rhs=FIRST, out=FIRST, dtype=jnp.float32):
    """Images, a kernel of four channels, and the arguments of the convolution."""
    window, given = GEOMETRIES[geometry]
    ones = (1, 1)
    conv = dict(window_strides=ones, lhs_dilation=ones, rhs_dilation=ones) | given
    conv |= dict(
        dimension_numbers=lax.ConvDimensionNumbers(lhs, rhs, out),
        feature_group_count=4,
        precision=None,
        preferred_element_type=None,
    )
    x = jr.normal(jr.key(0), (2, 4, 6, 5), dtype)
    kernel = jr.normal(jr.key(1), (4, 1, *window), dtype)
    return x.transpose(np.argsort(lhs)), kernel.transpose(np.argsort(rhs)), conv


def twice(convolve, x, kernel):
    return (jnp.sin(convolve(x, kernel)) ** 2).sum()


def gradient(convolve):
    return jax.grad(functools.partial(twice, convolve), (0, 1))


TRANSFORMATIONS = {
    "itself": lambda f: f,
    "jit": jax.jit,
    "gradient": gradient,
    "gradient for each image": lambda f: jax.vmap(gradient(f), (0, None)),
    "below two vmaps": lambda f: jax.vmap(jax.vmap(f, (0, None)), (1, None), 2),
    "kernels": lambda f: jax.vmap(f, (None, 0), 1),
    "images and kernels": lambda f: jax.vmap(f, (1, 2), 3),
    "their gradient": lambda f: jax.vmap(gradient(f)),
    "forward mode": lambda f: jax.jacfwd(gradient(f), 1),
    "reverse mode": lambda f: jax.jacrev(gradient(f), 0),
}
AXES = {
    "gradient for each image": ((0,), ()),
    "below two vmaps": ((0, 1), ()),
    "kernels": ((), (0,)),
    "images and kernels": ((1,), (2,)),
    "their gradient": ((0,), (0,)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_it_is_a_convolution_for_every_transformation(name):
    x, kernel, conv = make("plain")
    x_axes, kernel_axes = AXES.get(name, ((), ()))
    x = functools.reduce(lambda y, i: jnp.stack([y, 2 * y], i), x_axes, x)
    kernel = functools.reduce(lambda y, i: jnp.stack([y, -y], i), kernel_axes, kernel)
    transformed = TRANSFORMATIONS[name]
    got, expected = (
        jax.jit(transformed(functools.partial(product, **conv)))(x, kernel)
        for product in (convolve_depthwise, lax.conv_general_dilated)
    )
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry_and_layout(geometry):
    layouts = (FIRST, FIRST, FIRST), (LAST, (3, 2, 0, 1), LAST), (LAST, FIRST, FIRST)
    x, kernel, conv = make(geometry, *layouts[len(geometry) % 3])
    assert is_depthwise(x, kernel, conv)

    def run(product, x, kernel):
        convolve = functools.partial(product, **conv)
        return convolve(x, kernel), gradient(convolve)(x, kernel)

    got, expected = (
        jax.jit(functools.partial(run, product))(x, kernel)
        for product in (convolve_depthwise, lax.conv_general_dilated)
    )
    assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_rounded_once(dtype):
    x, kernel, conv = make("plain", dtype=dtype)
    exact = lax.conv_general_dilated(
        x.astype(jnp.float32), kernel.astype(jnp.float32), **conv
    )
    got = convolve_depthwise(x, kernel, **conv)
    assert got.dtype == dtype
    assert_close(got, exact.astype(dtype), float(jnp.finfo(dtype).eps))
    conv["preferred_element_type"] = jnp.dtype("float32")
    assert_close(convolve_depthwise(x, kernel, **conv), exact)


def test_a_layer_makes_no_image_for_each_component():
    """The factors are multiplied before they meet the images: no array of a step is
    larger than the images themselves, and on the CPU the compiled program has no
    convolution but for the gradient of the kernel."""
    layer = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=jr.key(0))
    adapted = trained(lorax.loraify(layer, rank=4, key=jr.key(1)))
    x = jnp.ones((8, 12, 12))
    params, frozen = lorax.partition(adapted)

    def loss(params, x):
        return (lorax.combine(params, frozen)(x) ** 2).sum()

    step = jax.grad(loss, (0, 1))
    jaxpr = jax.make_jaxpr(step)(params, x)
    sizes = [v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars]
    assert max(sizes) == x.size
    if jax.default_backend() == "cpu":
        text = jax.jit(jax.grad(loss, 1)).lower(params, x).compile().as_text()
        assert " convolution(" not in text

"""Products with quantised arrays equal those with the arrays they stand for, under
every transformation, and keep no dense array from the forward to the backward pass."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close

import eqx_lorax as lorax
from eqx_lorax._bases import quantise_array


W = jr.normal(jr.key(0), (8, 16))
X = jr.normal(jr.key(1), (3, 16))
ARRAY = lorax.quantise({"w": W}, block=16)["w"]
DEEP = jax.tree.map(lambda *x: jnp.stack(x), ARRAY, ARRAY, ARRAY)
IMAGE = jr.normal(jr.key(2), (2, 5, 5))
KERNEL = quantise_array(jr.normal(jr.key(3), (4, 2, 3, 3)), block=6)


class Halves(eqx.Module):
    """A kind of base of another package: two arrays that are added."""

    first: jax.Array
    second: jax.Array

    @property
    def shape(self):
        return self.first.shape

    @property
    def ndim(self):
        return self.first.ndim

    @property
    def dtype(self):
        return self.first.dtype


@lorax.register_base(Halves)
def add_halves(x):
    return x.first + x.second


def to_array(w):
    return add_halves(w) if isinstance(w, Halves) else w.dequantise()


HALVES = Halves(W, 2 * W)
DEEP_HALVES = jax.tree.map(lambda x: jnp.stack([x, x, x]), HALVES)


def product(w, x):
    return lorax.lora(lambda w, x: jnp.sin(x @ w.T), on_materialise="error")(w, x)


def score(w, x):
    return jnp.sum(product(w, x) ** 2)


ONE = {
    "value": product,
    "jit": jax.jit(product),
    "grad": jax.grad(score, 1),
    "jitted grad": jax.jit(jax.grad(score, 1)),
    "jvp": lambda w, x: jax.jvp(lambda x: product(w, x), (x,), (x[::-1],)),
    "linearize": lambda w, x: jax.linearize(lambda x: product(w, x), x)[1](x),
    "jacrev": lambda w, x: jax.jacrev(lambda x: product(w, x))(x[0]),
    "jacfwd": lambda w, x: jax.jacfwd(lambda x: product(w, x))(x[0]),
    "hessian": lambda w, x: jax.hessian(lambda x: score(w, x))(x[0]),
    "grad of grad": lambda w, x: jax.grad(
        lambda x: jnp.sum(jax.grad(score, 1)(w, x) ** 2)
    )(x),
    "checkpoint": lambda w, x: jax.grad(jax.checkpoint(score), 1)(w, x),
    "vmap": lambda w, x: jax.vmap(lambda x: product(w, x))(x),
    "vmap of a later axis": lambda w, x: jax.vmap(lambda x: product(w, x), 1, 1)(x.T),
    "grad below vmap": lambda w, x: jax.vmap(lambda x: jax.grad(score, 1)(w, x))(x),
    "nothing": lambda w, x: product(w, x[:0]),
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("array", [ARRAY, HALVES], ids=["quantised", "registered"])
def test_transformations(array, name):
    found, wanted = ONE[name](array, X), ONE[name](to_array(array), X)
    jax.tree.map(lambda x, y: assert_close(x, y, 1e-4), found, wanted)


def along(ws, x):
    return lax.scan(lambda x, w: (jnp.tanh(jnp.tile(product(w, x), 2)), None), x, ws)[0]


DEEPER = {
    "scan": along,
    "grad of scan": jax.grad(lambda ws, x: jnp.sum(along(ws, x) ** 2), 1),
    "vmap": jax.vmap(product),
    "vmap of both": jax.vmap(jax.vmap(product, (None, 0)), (0, None)),
    "grad of vmap": jax.grad(lambda w, x: jnp.sum(jax.vmap(product)(w, x) ** 2), 1),
    "grad below vmap": jax.vmap(jax.grad(score, 1)),
    "one of them": lambda ws, x: product(jax.tree.map(lambda w: w[1], ws), x),
}


@pytest.mark.parametrize("name", DEEPER)
@pytest.mark.parametrize("arrays", [DEEP, DEEP_HALVES], ids=["quantised", "registered"])
def test_transformations_of_stacks(arrays, name):
    found, wanted = DEEPER[name](arrays, X), DEEPER[name](to_array(arrays), X)
    assert_close(found, wanted, 1e-4)


def convolve(w, x):
    return lax.conv_general_dilated(x[None], w, (1, 1), [(1, 1), (0, 0)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolutions(dtype):
    kernel, image = KERNEL.astype(dtype), IMAGE.astype(dtype)

    def loss(w, x):
        y = lorax.lora(convolve, on_materialise="error")(w, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    found, wanted = (jax.grad(loss, 1)(w, image) for w in (kernel, to_array(kernel)))
    assert found.dtype == dtype
    assert_close(found, wanted, 1e-5 if dtype == jnp.float32 else 2e-2)


def test_narrow_products_are_rounded_once():
    array, x = ARRAY.astype(jnp.bfloat16), X.astype(jnp.bfloat16)
    found, wanted = (x @ w.T for w in (array, array.dequantise()))
    assert found.dtype == jnp.bfloat16
    assert (found == wanted).all()


@pytest.mark.parametrize("array", [ARRAY, HALVES], ids=["quantised", "registered"])
def test_the_dense_array_is_not_kept(array):
    def count_kept(w):
        """How many floats the backward pass holds, beside what is in `w`."""
        _, pull = jax.vjp(lambda x: product(w, x), X)
        own = [x.size for x in jax.tree.leaves(w) if x.dtype == jnp.float32]
        held = [x.size for x in jax.tree.leaves(pull) if x.dtype == jnp.float32]
        return sum(held) - sum(own)

    # The sines' derivatives, and no weight.
    assert count_kept(array) == len(X) * len(W)


def inner_jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from inner_jaxprs(value.jaxpr)


def test_a_scan_forms_one_array_at_a_time_and_copies_no_codes():
    model = lorax.init_lora(DEEP, lorax.LoraSpec(2, batch=(0,)), jr.key(1))
    params, frozen = eqx.partition(model, model.trainable())

    def loss(params, x):
        return jnp.sum(along(eqx.combine(params, frozen), x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, X).jaxpr
    for inner in inner_jaxprs(jaxpr):
        for equation in inner.eqns:
            made = [x.aval for x in equation.outvars]
            assert not any(x.shape == DEEP.shape for x in made)
            if equation.primitive.name == "scan":
                assert not any(x.dtype == jnp.uint8 for x in made)


@pytest.mark.cpu
@pytest.mark.parametrize("array", ["dense", "quantised"])
def test_unrolled_layers_share_one_buffer(array):
    layers, width = 6, 128
    ws = jr.normal(jr.key(0), (layers, width, width)) / width**0.5
    packed = [lorax.quantise({"w": w})["w"] for w in ws]
    x = jnp.ones((4, width))

    def loss(x, packed):
        for w in packed:
            w = w if array == "quantised" else w.dequantise()
            x = jnp.tanh(x @ w.T)
        return jnp.sum(x)

    memory = jax.jit(jax.grad(loss)).lower(x, packed).compile().memory_analysis()
    dense = width * width * 4
    held = memory.temp_size_in_bytes / dense
    assert held < 2.5 if array == "quantised" else held > layers - 1


def test_slices_along_another_axis_are_noticed():
    with pytest.raises(ValueError, match="do not belong together.* another axis"):
        jax.vmap(lambda w: w @ X[0], 1)(ARRAY)

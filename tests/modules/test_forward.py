"""`merged_forward`: the same results and gradients, with the weight formed for it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import few_cases
from helpers import (
    assert_close,
    assert_identical,
    assert_no_dense,
    equations,
    filled,
    run,
    trained,
    weights,
)

import eqx_lorax as lorax


def total(model, *inputs):
    return jnp.sum(jnp.sin(model(*inputs)).real)


@eqx.filter_jit
def gradients(model, *inputs):
    """With respect to the factors and the inputs."""
    params, frozen = lorax.partition(model)

    def loss(moving):
        params, inputs = moving
        return total(eqx.combine(params, frozen), *inputs)

    return eqx.filter_grad(loss)((params, inputs))


def sizes_of_a_base(fn, model, *inputs):
    """The number of times that `fn` computes an array with the shape of a base."""
    shapes = {weight.w.shape for weight in weights(model)}
    jaxpr = eqx.filter_make_jaxpr(fn)(model, *inputs)[0].jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return sum(e.outvars[0].aval.shape in shapes for e in products)


@few_cases
def test_same_results_and_gradients(case, getkey):
    model = filled(case.make, jnp.float32, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, alpha=3.0, key=getkey())
    adapted = trained(adapted)
    merged = lorax.merged_forward(adapted)
    assert all(map(lambda x, y: x is y, *map(jax.tree.leaves, (merged, adapted))))
    inputs = case.inputs(jnp.float32)
    assert_close(run(merged, *inputs), run(adapted, *inputs))
    assert_close(gradients(merged, *inputs), gradients(adapted, *inputs), 1e-4)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
    one_by_one = jax.vmap(gradients, in_axes=(None, *[0] * len(batch)))
    found = jax.tree.map(lambda x: x[1], one_by_one(merged, *batch))
    assert_close(found, gradients(adapted, *inputs), 1e-4)
    apart, again = (
        lorax.merged_forward(model, enabled=False) for model in (adapted, merged)
    )
    assert_identical(run(again, *inputs), run(apart, *inputs))


def make(getkey, dtype=None, **options):
    keys = jr.split(getkey(), 3)
    model = [eqx.nn.Linear(9, 7, dtype=dtype, key=keys[0])]
    model.append(eqx.nn.Linear(7, 8, dtype=dtype, key=keys[1]))
    model = trained(lorax.loraify(model, rank=2, key=keys[2], **options))

    def call(model, x):
        for layer in model:
            x = jnp.tanh(jax.vmap(layer)(x))
        return x

    return model, call, jr.normal(getkey(), (6, 9), dtype)


def test_the_whole_weight_is_formed_for_each_product_and_for_no_gradient_of_it(getkey):
    adapted, call, x = make(getkey)
    merged = lorax.merged_forward(adapted)
    gradient = lorax.filter_grad(lambda model, x: jnp.sum(call(model, x)))
    assert sizes_of_a_base(call, adapted, x) == 0
    assert sizes_of_a_base(call, merged, x) == 2
    # Once more for the gradient of the activation between the layers.
    assert sizes_of_a_base(gradient, merged, x) == 3
    assert_no_dense(gradient, adapted, x)


@pytest.mark.heavy
def test_second_derivatives(getkey):
    adapted, call, x = make(getkey)

    def curvature(model):
        along = lambda t: jnp.sum(call(model, x + t * jnp.ones_like(x)) ** 2)  # noqa: E731
        return jax.hessian(along)(0.1), jax.jvp(jax.grad(along), (0.1,), (1.0,))

    assert_close(curvature(lorax.merged_forward(adapted)), curvature(adapted), 1e-4)


def fuses(model):
    return [weight.factored().fuses for weight in weights(model)]


def test_some_layers_alone(getkey):
    adapted, call, x = make(getkey)
    of_second = lorax.merged_forward(adapted, "1")
    assert fuses(of_second) == [None, True]
    assert sizes_of_a_base(call, of_second, x) == 1
    with pytest.raises(ValueError, match="'third'.*Available"):
        lorax.merged_forward(adapted, ["1", "third"])
    with pytest.raises(ValueError, match="'bias'.* names no adapter"):
        lorax.merged_forward(adapted, "bias")
    but_second = lorax.merged_forward(adapted, exclude="1")
    assert fuses(but_second) == [True, None]
    with pytest.raises(ValueError, match="`exclude='bias'` excludes nothing"):
        lorax.merged_forward(adapted, exclude="bias")


def test_by_the_function_door(getkey):
    weight, x = jr.normal(getkey(), (9, 7)), jr.normal(getkey(), (6, 9))
    params = lorax.init_lora({"w": weight}, {"w": 2}, getkey())
    params = trained(params)
    merged = lorax.merged_forward(params)
    function = lorax.lora(lambda params, x: x @ params["w"])
    assert sizes_of_a_base(function, merged, x) == 1
    assert_close(function(merged, x), function(params, x))


@pytest.mark.heavy
def test_within_a_stack(getkey):
    make_layer = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))
    stack = make_layer(jr.split(getkey(), 3))
    adapted = trained(lorax.loraify(stack, rank=2, key=getkey()))
    x = jr.normal(getkey(), (5, 8))

    @eqx.filter_jit
    def scanned(model, x):
        arrays, rest = eqx.partition(model, eqx.is_array)
        body = lambda x, layer: (jax.vmap(eqx.combine(layer, rest))(x), None)  # noqa: E731
        return jax.lax.scan(body, x, arrays)[0]

    @eqx.filter_jit
    def each(model, x):
        return eqx.filter_vmap(lambda layer, x: jax.vmap(layer)(x), in_axes=(0, None))(
            model, x
        )

    merged = lorax.merged_forward(adapted)
    for fn in (scanned, each):
        assert_close(fn(merged, x), fn(adapted, x))
        loss = lambda model, fn=fn: jnp.sum(jnp.sin(fn(model, x)))  # noqa: E731
        assert_close(
            lorax.filter_grad(loss)(merged), lorax.filter_grad(loss)(adapted), 1e-4
        )


def test_branches_with_dropout_stay_apart(getkey):
    adapted, _, x = make(getkey, dropout=0.5)
    merged, key = lorax.merged_forward(adapted), getkey()
    assert_identical(merged[0](x[0], key=key), adapted[0](x[0], key=key))
    assert_no_dense(lambda model, x: model[0](x, key=key), merged, x[0])


def test_narrow_weights_are_not_merged(getkey):
    adapted, _, _ = make(getkey, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"0\.weight is of dtype bfloat16.*small"):
        lorax.merged_forward(adapted)
    lorax.merged_forward(adapted, enabled=False)
    # Nor weights that the model itself casts.
    adapted, call, x = make(getkey)
    half = lorax.lora(lambda w, x: x @ w.astype(jnp.bfloat16).T)
    merged = lorax.merged_forward(adapted)[0].weight
    assert_no_dense(half, merged, x.astype(jnp.bfloat16))


def test_without_adapters(getkey):
    with pytest.raises(ValueError, match="no adapters.*loraify"):
        lorax.merged_forward(eqx.nn.Linear(3, 4, key=getkey()))

"""Every layer × every property that an adapted layer has."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import by_name, LAYERS, MODELS
from helpers import (
    assert_close,
    assert_identical,
    assert_no_dense,
    call64,
    dense64,
    is_weight,
    run,
    trained,
    weights,
)

import eqx_lorax as lorax


every_layer = pytest.mark.parametrize("case", LAYERS, ids=by_name)
every_case = pytest.mark.parametrize("case", LAYERS + MODELS, ids=by_name)
narrow = pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))


def make(case, getkey, dtype=jnp.float32):
    model = case.make(dtype, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, alpha=3.0, key=getkey())
    return model, trained(adapted, getkey()), case.inputs(dtype, getkey())


def total(model, *inputs):
    return jnp.sum(jnp.sin(model(*inputs)).real).astype(jnp.float32)


def total64(model, *inputs):
    return jnp.sum(jnp.sin(model(*inputs)).real)


gradient = eqx.filter_jit(lorax.filter_grad(total))


@every_layer
def test_is_the_layer_it_should_be(case, getkey):
    model, adapted, _ = make(case, getkey)
    assert type(adapted).__name__ == case.layer
    assert isinstance(adapted, type(model))


@every_case
def test_fresh_adapter_adds_nothing(case, getkey):
    model = case.make(jnp.float32, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    inputs = case.inputs(jnp.float32, getkey())
    assert_close(run(adapted, *inputs), run(model, *inputs), 1e-6)
    assert_identical(lorax.unloraify(adapted), model)


@every_case
def test_values_are_those_of_the_dense_model(case, getkey):
    model, adapted, inputs = make(case, getkey)
    dense = call64(lambda model, *x: model(*x), dense64(adapted), *inputs)
    out = run(adapted, *inputs)
    assert_close(out, dense)
    assert np.abs(np.asarray(out - run(model, *inputs))).max() > 1e-2


@every_case
def test_gradients_are_those_of_the_dense_model(case, getkey):
    _, adapted, inputs = make(case, getkey)
    found = gradient(adapted, *inputs)
    assert all(weight.w is None for weight in weights(found))

    def dense_total(factors, model, *inputs):
        """The loss through `w + s b a`, formed."""
        found = iter(factors)

        def form(weight):
            b, a = next(found)
            flat = b @ a.reshape(a.shape[0], -1)
            return weight.w + weight.scale * flat.reshape(weight.w.shape)

        dense = jax.tree.map(
            lambda x: form(x) if is_weight(x) else x, model, is_leaf=is_weight
        )
        return total64(lorax.unloraify(dense), *inputs)

    factors = [(weight.b, weight.a) for weight in weights(adapted)]
    expected = call64(jax.grad(dense_total), factors, adapted, *inputs)
    assert_close([(weight.b, weight.a) for weight in weights(found)], expected, 1e-4)


@every_case
def test_input_gradient_is_that_of_the_dense_model(case, getkey):
    if case.integer:
        return
    _, adapted, inputs = make(case, getkey)
    to_inputs = eqx.filter_grad(lambda inputs, model: total(model, *inputs))
    to_inputs64 = eqx.filter_grad(lambda inputs, model: total64(model, *inputs))
    found = eqx.filter_jit(to_inputs)(inputs, adapted)
    assert_close(found, call64(to_inputs64, inputs, dense64(adapted)), 1e-4)


@every_case
def test_merged_is_unmerged(case, getkey):
    model, adapted, inputs = make(case, getkey)
    merged = lorax.unloraify(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(run(merged, *inputs), run(adapted, *inputs))
    like = [x.dtype for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
    assert like == [x.dtype for x in jax.tree.leaves(eqx.filter(merged, eqx.is_array))]


@every_case
def test_dropping_the_adapter_gives_the_base(case, getkey):
    model, adapted, _ = make(case, getkey)
    dropped = lorax.unloraify(adapted, merge=False)
    assert_identical(dropped, model)
    arrays = zip(*(jax.tree.leaves(x) for x in (dropped, model)))
    assert all(x is y for x, y in arrays)


@every_case
def test_no_dense_delta(case, getkey):
    _, adapted, inputs = make(case, getkey)
    if "scalar" in case.name:
        return  # the factors have the shape of the weight
    assert_no_dense(lambda m, *x: m(*x), adapted, *inputs)
    assert_no_dense(lorax.filter_grad(total), adapted, *inputs)
    if not case.integer:
        to_input = eqx.filter_grad(lambda x, m: total(m, x, *inputs[1:]))
        assert_no_dense(lambda m, x: to_input(x, m), adapted, inputs[0])


@every_case
def test_transformations_agree(case, getkey):
    _, adapted, inputs = make(case, getkey)
    eager = adapted(*inputs)
    batch = jax.tree.map(lambda x: jnp.stack([x, x, x]), inputs)

    @eqx.filter_jit
    def transformed(adapted, inputs, batch):
        return (
            eqx.filter_checkpoint(adapted)(*inputs)[None],
            jax.vmap(adapted)(*batch),
            jax.lax.map(lambda inputs: adapted(*inputs), batch),
        )

    for out in transformed(adapted, inputs, batch):
        for one in out:
            assert_close(one, eager)
    remat = lorax.filter_grad(lambda m, *x: eqx.filter_checkpoint(total)(m, *x))
    each = lorax.filter_grad(lambda m, *x: total(jax.vmap(m), *x) / 3)
    for other in (remat(adapted, *inputs), eqx.filter_jit(each)(adapted, *batch)):
        assert_close(other, gradient(adapted, *inputs), 1e-4)


@every_case
def test_stacked_by_vmap(case, getkey):
    """Layers stacked on one and on two leading axes."""
    make_one = lambda key: case.make(jnp.float32, key)  # noqa: E731
    make_all = eqx.filter_jit(eqx.filter_vmap(eqx.filter_vmap(make_one)))
    model = make_all(jax.random.split(getkey(), (2, 3)))
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    adapted = trained(adapted, getkey())
    inputs = case.inputs(jnp.float32, getkey())

    @eqx.filter_jit
    def each(model):
        arrays, rest = eqx.partition(model, eqx.is_array)
        call = lambda arrays: eqx.combine(arrays, rest)(*inputs)  # noqa: E731
        picked = jax.tree.map(lambda x: x[1, 2], arrays)
        looped = jax.lax.map(call, jax.tree.map(lambda x: x[1], arrays))
        return jax.vmap(jax.vmap(call))(arrays), looped, call(picked)

    out, looped, picked = each(adapted)
    assert_close(out, each(lorax.unloraify(adapted))[0])
    assert_close(out[1], looped)
    assert_close(out[1, 2], picked)
    assert jax.tree.structure(lorax.unloraify(adapted)) == jax.tree.structure(model)


@every_case
@narrow
def test_narrow_dtypes(case, dtype, getkey):
    """Wide factors, the plain layer's output dtype, and one rounding from float32."""
    model, adapted, inputs = make(case, getkey, dtype)
    for weight in weights(adapted):
        assert weight.dtype == dtype
        assert weight.a.dtype == weight.b.dtype == jnp.float32
    out = run(adapted, *inputs)
    assert out.dtype == run(model, *inputs).dtype == dtype
    merged = lorax.unloraify(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    found = gradient(adapted, *inputs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    dense = call64(lambda model, *x: model(*x), dense64(adapted), *inputs)
    # Half a unit in the last place if it is a layer of one product.
    one_rounding = case.layer in ("LoraLinear", "LoraConv", "LoraEmbedding")
    unit = float(jnp.finfo(dtype).eps)
    if one_rounding and case in LAYERS:
        error = np.abs(np.asarray(out, np.float64) - dense)
        assert (error <= 0.5 * unit * np.abs(dense) + 1e-5).all()
    else:
        assert_close(out, dense, 8 * unit)
    if "scalar" not in case.name:
        assert_no_dense(lorax.filter_grad(total), adapted, *inputs)


@every_layer
def test_complex(case, getkey):
    if not case.complex:
        return
    model, adapted, inputs = make(case, getkey, jnp.complex64)
    out = run(adapted, *inputs)
    assert out.dtype == jnp.complex64
    assert_close(out, call64(lambda model, *x: model(*x), dense64(adapted), *inputs))
    assert_close(run(lorax.unloraify(adapted), *inputs), out)
    assert all(
        x.dtype == jnp.complex64 for x in jax.tree.leaves(gradient(adapted, *inputs))
    )


@every_case
def test_training_changes_what_it_should(case, getkey):
    """Three steps of AdamW with strong weight decay."""
    model = case.make(jnp.float32, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    inputs = case.inputs(jnp.float32, getkey())
    optimizer = optax.adamw(1e-2, weight_decay=0.5)
    before, frozen = lorax.partition(adapted)
    state = optimizer.init(before)
    count = len(jax.tree.leaves(before))
    assert count == 2 * len(weights(adapted))
    moments = [x for x in jax.tree.leaves(state) if jnp.ndim(x) > 0]
    assert sum(x.size for x in moments) == 2 * sum(
        x.size for x in jax.tree.leaves(before)
    )

    @eqx.filter_jit
    def step(params, state):
        model = eqx.combine(params, frozen)
        gradient = lorax.filter_grad(total)(model, *inputs)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes them
            updates, state = optimizer.update(gradient, state, params)
        return eqx.apply_updates(params, updates), state

    params = before
    for _ in range(3):
        params, state = step(params, state)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(params)):
        assert (old != new).any()
    after = eqx.combine(params, frozen)
    assert_identical(lorax.unloraify(after, merge=False), model)
    assert_identical(eqx.filter(after, _inverse(lorax.trainable(after))), frozen)


def _inverse(spec):
    return jax.tree.map(lambda x: not x, spec)


@every_case
def test_compiles_once(case, getkey):
    _, adapted, inputs = make(case, getkey)
    traces = 0

    @eqx.filter_jit
    def run(params, frozen, *inputs):
        nonlocal traces
        traces += 1
        model = eqx.combine(params, frozen)
        return lorax.filter_value_and_grad(total)(model, *inputs)

    params, frozen = lorax.partition(adapted)
    for scale in (1, 2, 3):
        run(jax.tree.map(lambda x: scale * x, params), frozen, *inputs)
    assert traces == 1


@every_case
def test_stacked_adapters(case, getkey):
    """A second adapter on top of the first, which is frozen."""
    model, adapted, inputs = make(case, getkey)
    twice = lorax.loraify(
        adapted, case.filter, rank=1, alpha=0.5, stack=True, key=getkey()
    )
    assert_close(run(twice, *inputs), run(adapted, *inputs))
    twice = trained(twice, getkey())
    dense = call64(lambda model, *x: model(*x), dense64(twice), *inputs)
    assert_close(run(twice, *inputs), dense)
    assert_close(run(lorax.unloraify(twice), *inputs), dense)
    assert_identical(lorax.unloraify(twice, merge=False), model)
    if "scalar" not in case.name:
        assert_no_dense(lorax.filter_grad(total), twice, *inputs)
    params, _ = lorax.partition(twice)
    assert len(jax.tree.leaves(params)) == 2 * len(weights(twice))
    assert not any(
        is_weight(weight.w) and weight.w.a is not None for weight in weights(params)
    )

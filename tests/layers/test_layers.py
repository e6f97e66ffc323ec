"""Every layer × every property that an adapted layer has."""

import os
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from cases import every_case, few_cases, LAYERS
from helpers import (
    assert_close,
    assert_identical,
    assert_no_dense,
    call64,
    dense64,
    filled,
    is_weight,
    run,
    trained,
    weights,
)

import eqx_lorax as lorax


def make(case, getkey, dtype=jnp.float32):
    """A model, the adapted model as if trained, and inputs."""
    model = filled(case.make, dtype, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, alpha=3.0, key=getkey())
    return model, trained(adapted), case.inputs(dtype)


def total(model, *inputs):
    out = jnp.sum(jnp.sin(model(*inputs)).real)
    return out if out.dtype == jnp.float64 else out.astype(jnp.float32)


gradient = eqx.filter_jit(lorax.filter_grad(total))


def dense_total(factors, model, *inputs):
    """`total` of the plain model with `w + s b a` as its weight, formed by NumPy."""
    factors = iter(factors)

    def form(weight):
        b, a = next(factors)
        flat = b @ a.reshape(a.shape[0], -1)
        return weight.w + weight.scale * flat.reshape(weight.w.shape)

    dense = jax.tree.map(
        lambda x: form(x) if is_weight(x) else x, model, is_leaf=is_weight
    )
    return total(lorax.unloraify(dense, merge=False), *inputs)


@every_case
def test_fresh_adapter_adds_nothing(case, getkey):
    model = filled(case.make, jnp.float32, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    inputs = case.inputs(jnp.float32)
    assert_close(run(adapted, *inputs), run(model, *inputs), 1e-6)
    assert_identical(lorax.unloraify(adapted), model)
    if case in LAYERS:
        assert type(adapted).__name__ == case.layer
        assert isinstance(adapted, type(model))


@every_case
def test_agrees_with_the_dense_model(case, getkey):
    """Outputs and gradients in float64, the merged model, and the dropped adapter."""
    model, adapted, inputs = make(case, getkey)
    out = run(adapted, *inputs)
    assert_close(out, call64(lambda model, *x: model(*x), dense64(adapted), *inputs))
    assert np.abs(np.asarray(out - run(model, *inputs))).max() > 1e-4

    def both(model, inputs):
        to_inputs = eqx.filter_grad(lambda inputs: total(model, *inputs))
        return lorax.filter_grad(total)(model, *inputs), to_inputs(inputs)

    to_factors, to_inputs = eqx.filter_jit(both)(adapted, inputs)
    assert all(weight.w is None for weight in weights(to_factors))
    factors = [(weight.b, weight.a) for weight in weights(adapted)]

    def both64(factors, model, inputs):
        to_inputs = eqx.filter_grad(lambda x: dense_total(factors, model, *x))
        return jax.grad(dense_total)(factors, model, *inputs), to_inputs(inputs)

    found = [(weight.b, weight.a) for weight in weights(to_factors)], to_inputs
    assert_close(found, call64(both64, factors, adapted, inputs), 1e-4)

    merged = lorax.unloraify(adapted)
    assert_close(run(merged, *inputs), out)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    dropped = lorax.unloraify(adapted, merge=False)
    assert_identical(dropped, model)
    assert all(map(lambda x, y: x is y, *map(jax.tree.leaves, (dropped, model))))


@every_case
def test_no_dense_delta(case, getkey):
    if "scalar" in case.name or case.name == "conv depthwise":
        return  # here the weight is no larger than the factors
    _, adapted, inputs = make(case, getkey)
    assert_no_dense(lambda m, *x: m(*x), adapted, *inputs)
    assert_no_dense(lorax.filter_grad(total), adapted, *inputs)
    to_inputs = eqx.filter_grad(lambda inputs, m: total(m, *inputs))
    if not case.integer:
        assert_no_dense(lambda m, *inputs: to_inputs(inputs, m), adapted, *inputs)


@few_cases
def test_transformations_agree(case, getkey):
    _, adapted, inputs = make(case, getkey)
    eager = adapted(*inputs)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)

    @eqx.filter_jit
    def transformed(adapted, inputs, batch):
        remat = lambda m, *x: eqx.filter_checkpoint(total)(m, *x)  # noqa: E731
        mean = lambda m, *x: total(jax.vmap(m), *x) / 2  # noqa: E731
        outs = (
            eqx.filter_checkpoint(adapted)(*inputs)[None],
            jax.vmap(adapted)(*batch),
            jax.lax.map(lambda inputs: adapted(*inputs), batch),
        )
        gradients = (
            lorax.filter_grad(remat)(adapted, *inputs),
            lorax.filter_grad(mean)(adapted, *batch),
        )
        return outs, gradients

    outs, gradients = transformed(adapted, inputs, batch)
    for out in (one for out in outs for one in out):
        assert_close(out, eager)
    for found in gradients:
        assert_close(found, gradient(adapted, *inputs), 1e-4)


@few_cases
def test_stacked_by_vmap(case, getkey):
    """Layers stacked on one and on two leading axes."""
    make_one = lambda dtype, key: case.make(dtype, key)  # noqa: E731
    vmap = lambda fn: eqx.filter_vmap(fn, in_axes=(None, 0))  # noqa: E731
    keys = jax.random.split(getkey(), (2, 3))
    model = filled(vmap(vmap(make_one)), jnp.float32, keys)
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    adapted = trained(adapted)
    inputs = case.inputs(jnp.float32)

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


@few_cases
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_narrow_dtypes(case, dtype, getkey):
    """Wide factors, output in the plain layer's dtype, and one rounding from
    float32."""
    model, adapted, inputs = make(case, getkey, dtype)
    for weight in weights(adapted):
        assert weight.dtype == dtype
        assert weight.a.dtype == weight.b.dtype == jnp.float32
    out = run(adapted, *inputs)
    assert out.dtype == run(model, *inputs).dtype == dtype
    dtypes = [
        [x.dtype for x in jax.tree.leaves(eqx.filter(m, eqx.is_array))]
        for m in (lorax.unloraify(adapted), model)
    ]
    assert dtypes[0] == dtypes[1]
    found = gradient(adapted, *inputs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    dense = call64(lambda model, *x: model(*x), dense64(adapted), *inputs)
    unit = float(jnp.finfo(dtype).eps)
    if case in LAYERS and case.layer != "LoraModule":
        error = np.abs(np.asarray(out, np.float64) - dense)
        assert (error <= 0.5 * unit * np.abs(dense) + 1e-5).all()
    else:
        # Several products, each rounded once, with the model's own operations in
        # between.
        assert_close(out, dense, 8 * unit)
    if "scalar" not in case.name:
        assert_no_dense(lorax.filter_grad(total), adapted, *inputs)


@few_cases
def test_complex(case, getkey):
    if not case.complex:
        return
    _, adapted, inputs = make(case, getkey, jnp.complex64)
    out = run(adapted, *inputs)
    assert out.dtype == jnp.complex64
    assert_close(out, call64(lambda model, *x: model(*x), dense64(adapted), *inputs))
    assert_close(run(lorax.unloraify(adapted), *inputs), out)
    factors = [(weight.b, weight.a) for weight in weights(adapted)]
    found = [(w.b, w.a) for w in weights(gradient(adapted, *inputs))]
    expected = call64(jax.grad(dense_total), factors, adapted, *inputs)
    assert_close(found, expected, 1e-4)


@few_cases
def test_training_changes_what_it_should(case, getkey):
    """Three steps of AdamW with strong weight decay, compiled once."""
    model = filled(case.make, jnp.float32, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    inputs = case.inputs(jnp.float32)
    optimizer = optax.adamw(1e-2, weight_decay=0.5)
    before, frozen = lorax.partition(adapted)
    state = optimizer.init(before)
    factors = jax.tree.leaves(before)
    assert len(factors) == 2 * len(weights(adapted))
    moments = [x for x in jax.tree.leaves(state) if jnp.ndim(x) > 0]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in factors)
    traces = 0

    @eqx.filter_jit
    def step(params, state):
        nonlocal traces
        traces += 1
        found = lorax.filter_grad(total)(eqx.combine(params, frozen), *inputs)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, state = optimizer.update(found, state, params)
        return eqx.apply_updates(params, updates), state

    params = before
    for _ in range(3):
        params, state = step(params, state)
    assert traces == 1
    for old, new in zip(factors, jax.tree.leaves(params)):
        assert (old != new).any()
    after = eqx.combine(params, frozen)
    assert_identical(lorax.unloraify(after, merge=False), model)
    assert_identical(lorax.partition(after)[1], frozen)


@few_cases
def test_stacked_adapters(case, getkey):
    """A second adapter on top of the first, which is frozen."""
    model, adapted, inputs = make(case, getkey)
    twice = lorax.loraify(
        adapted, case.filter, rank=1, alpha=0.5, nested=True, key=getkey()
    )
    assert_close(run(twice, *inputs), run(adapted, *inputs))
    twice = trained(twice)
    dense = call64(lambda model, *x: model(*x), dense64(twice), *inputs)
    assert_close(run(twice, *inputs), dense)
    assert_close(run(lorax.unloraify(twice), *inputs), dense)
    assert_identical(lorax.unloraify(twice, merge=False), model)
    if "scalar" not in case.name:
        assert_no_dense(lorax.filter_grad(total), twice, *inputs)
    params, _ = lorax.partition(twice)
    assert len(jax.tree.leaves(params)) == 2 * len(weights(twice))
    whole = eqx.filter_jit(eqx.filter_grad(total))(twice, *inputs)
    for weight in weights(whole):
        assert not any(leaf.any() for leaf in jax.tree.leaves(weight.w))
        assert weight.b.any()


def test_the_way_to_the_products_is_short(monkeypatch):
    """`LoraLinear.__call__` reaches the three products of the formula in few calls."""
    # Products with smaller matrices have a primitive of their own.
    layer = eqx.nn.Linear(700, 600, key=jr.key(0))
    layer = lorax.loraify(layer, rank=8, key=jr.key(1))
    dot_general, ways = jax.lax.dot_general, []

    def noted(*args, **kwargs):
        frames = [
            (frame.filename, frame.name)
            for frame in traceback.extract_stack()
            if f"eqx_lorax{os.sep}_" in frame.filename
        ]
        ways.append(frames)
        return dot_general(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "dot_general", noted)
    layer(jnp.ones(700))
    # Once for the shape of the result, once for the program.
    assert len(ways) == 6
    for way in ways:
        assert len({file for file, _ in way}) == 4
        assert len(way) <= 12

"""A method in one file of another package works in every part of the library."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_identical, assert_no_dense, is_weight, wide
from vera import VeraWeight

import eqx_lorax as lorax
from eqx_lorax._methods import find_method


METHOD = VeraWeight.method


class Model(eqx.Module):
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    layers: eqx.nn.Linear
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.linear = eqx.nn.Linear(7, 5, key=keys[0])
        self.conv = eqx.nn.Conv1d(1, 3, 3, padding=1, key=keys[1])
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 5, key=key))(
            jr.split(keys[2], 2)
        )
        self.cell = eqx.nn.GRUCell(5, 5, key=keys[3])

    def __call__(self, x):
        x = self.linear(x)
        x = jnp.sum(self.conv(x[None]), 0)
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        step = lambda x, arrays: (eqx.combine(arrays, rest)(x), None)  # noqa: E731
        x, _ = jax.lax.scan(step, x, arrays)
        return self.cell(x, x)


TARGETS = ["linear", "conv", "layers", "cell.weight_hh"]


def adapt(model, key=jr.key(1), **options):
    return lorax.loraify(model, TARGETS, method=METHOD, rank=2, key=key, **options)


def train(adapted, seed=0):
    """The model with random numbers in its trained arrays."""
    random = np.random.default_rng(seed)
    params, frozen = lorax.partition(adapted)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params
    )
    return lorax.combine(params, frozen)


@pytest.fixture
def model():
    return Model(jr.key(0))


@pytest.fixture
def trained(model):
    return train(adapt(model))


X = jnp.linspace(-1, 1, 7)


def find_weights(model):
    return [x for x in jax.tree.leaves(model, is_leaf=is_weight) if is_weight(x)]


def form_dense(weight):
    """The dense array in float64, from the definition of the method."""
    rank_gain = wide(weight.rank_gain).reshape(
        (*weight.rank_gain.shape, *(1 for _ in weight.columns))
    )
    b, a = wide(weight.row_gain)[..., None] * wide(weight.b), rank_gain * wide(weight.a)
    flat = a.reshape(*a.shape[: a.ndim - len(weight.columns)], -1)
    return wide(weight.w) + (b @ flat).reshape(weight.w.shape)


def test_is_selected_by_name(model):
    adapted = adapt(model)
    assert [type(x) for x in find_weights(adapted)] == [VeraWeight] * 4
    assert_close(adapted(X), model(X), 1e-6)
    by_class = lorax.loraify(model, "linear", method=VeraWeight, key=jr.key(1))
    assert isinstance(by_class.linear.weight, VeraWeight)
    mixed = lorax.loraify(
        model, ["linear", "conv"], method={"linear": METHOD}, key=jr.key(1)
    )
    kinds = [type(x) for x in (mixed.linear.weight, mixed.conv.weight)]
    assert kinds == [VeraWeight, lorax.LoraWeight]
    with pytest.raises(ValueError, match="`method='lorra'` is unknown.*'lora'"):
        lorax.loraify(model, method="lorra", key=jr.key(1))


@pytest.mark.own_errors
def test_what_is_no_method(model):
    with pytest.raises(TypeError, match="must be the name of a method"):
        lorax.loraify(model, method=3, key=jr.key(1))


def test_names_are_unique():
    name = "a name for two"
    made = [type("First", (lorax.AbstractLoraWeight,), {"method": name})]
    try:
        # Defined again, as in a notebook.
        made += [type("First", (lorax.AbstractLoraWeight,), {"method": name})]
        assert find_method(name) is made[1]
        made += [type("Second", (lorax.AbstractLoraWeight,), {"method": name})]
        with pytest.raises(ValueError, match="Two classes have.*First and .*Second"):
            find_method(name)
    finally:
        for i, kind in enumerate(made):
            kind.method = f"no longer {name} {i}"


def test_trees_of_parameters():
    params = {"w": jr.normal(jr.key(0), (4, 3))}
    params = lorax.init_lora(params, 2, jr.key(1), method=METHOD)
    assert isinstance(params["w"], VeraWeight)
    weight = eqx.tree_at(lambda x: x.row_gain, params["w"], jnp.arange(4.0))
    y = lorax.lora(lambda p, x: x @ p["w"])({"w": weight}, jnp.ones(4))
    assert_close(y, np.ones(4) @ form_dense(weight))


def test_gradients_are_those_of_its_vectors(trained):
    gradient = lorax.filter_grad(lambda m: jnp.sum(m(X) ** 2))
    found = gradient(trained)
    assert len(jax.tree.leaves(found)) == 8
    assert_no_dense(gradient, trained)
    vectors = [(x.row_gain, x.rank_gain) for x in find_weights(trained)]

    def loss(vectors, model):
        new = iter(vectors)

        def form(x):
            row_gain, rank_gain = next(new)
            x = eqx.tree_at(
                lambda x: (x.row_gain, x.rank_gain), x, (row_gain, rank_gain)
            )
            return x.materialise()

        dense = jax.tree.map(
            lambda x: form(x) if is_weight(x) else x, model, is_leaf=is_weight
        )
        return jnp.sum(lorax.unloraify(dense, merge=False)(X) ** 2)

    expected = jax.grad(loss)(vectors, trained)
    assert_close(
        [(x.row_gain, x.rank_gain) for x in find_weights(found)], expected, 1e-4
    )


def test_merges(model, trained):
    merged = lorax.unloraify(trained)
    assert_close(merged(X), trained(X))
    assert_close(merged.layers.weight, form_dense(trained.layers.weight))
    assert_identical(lorax.unloraify(trained, merge=False), model)


def test_files(model, trained, tmp_path):
    lorax.save_adapter(tmp_path / "a.safetensors", trained)
    loaded = lorax.load_adapter(tmp_path / "a.safetensors", model)
    assert_identical(loaded, trained)


def test_summary_and_plan(trained):
    found = lorax.summary(trained)
    assert [target.rank for target in found.targets] == [2] * 4
    assert found.trained == sum(
        x.size for x in jax.tree.leaves(lorax.partition(trained)[0])
    )
    plan = lorax.plan(lambda model, x: jnp.sum(jax.vmap(model)(x)), trained, X[None])
    assert plan.adapters == found.trained_bytes


def test_scales(trained):
    for model in (trained, lorax.partition(trained)[0]):
        half = lorax.scale(model, 0.5)
        assert all(isinstance(x, VeraWeight) for x in find_weights(half))
    half = lorax.scale(trained, 0.5)
    for x, y in zip(find_weights(half), find_weights(trained)):
        assert_close(form_dense(x) - wide(x.w), 0.5 * (form_dense(y) - wide(y.w)))


def test_stacks_and_banks(trained):
    other = train(trained, seed=1)
    params = [lorax.partition(x)[0] for x in (trained, other)]
    _, frozen = lorax.partition(trained)
    expected = jnp.stack(
        [trained(X), other(X), lorax.unloraify(trained, merge=False)(X)]
    )
    stacked = lorax.stack([*params, None])

    def one(i):
        picked = jax.tree.map(lambda x: x[i], stacked)
        return lorax.combine(picked, frozen)(X)

    assert_close(eqx.filter_vmap(one)(jnp.arange(3)), expected)
    bank = lorax.AdapterBank([*params, None])
    run = eqx.filter_vmap(lambda i: lorax.combine(bank[i], frozen)(X))
    assert_close(run(jnp.arange(3)), expected)
    assert_close(lorax.combine(bank[1], frozen)(X), expected[1])
    with pytest.raises(TypeError, match="A VeraWeight cannot be mixed"):
        bank.mix([0.5, 0.5, 0.0])


def test_adds_up(model, trained):
    other = train(trained, seed=1)
    total = lorax.weighted_sum([trained, other], [0.5, -2.0])
    for x, *parts in zip(*map(find_weights, (total, trained, other))):
        expected = sum(
            factor * (form_dense(part) - wide(part.w))
            for factor, part in zip([0.5, -2.0], parts)
        )
        assert_close(wide(x.materialise()) - wide(x.w), expected, 1e-4)
    with pytest.raises(ValueError, match="linear.weight is a VeraWeight.*whole models"):
        lorax.weighted_sum([lorax.partition(x)[0] for x in (trained, other)], [1, 1])


def test_fuses_the_forward_pass(trained):
    fused = lorax.merged_forward(trained)
    assert_close(fused(X), trained(X))
    gradient = lorax.filter_grad(lambda m: jnp.sum(m(X) ** 2))
    assert_close(jax.tree.leaves(gradient(fused)), jax.tree.leaves(gradient(trained)))


def test_peft_refuses_it_by_name(trained, tmp_path):
    with pytest.raises(ValueError, match=f"method '{METHOD}'.*save_adapter"):
        lorax.peft.save(tmp_path, trained, names={"linear": "linear"})


def test_peft_has_what_says_it_is_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(VeraWeight, "is_plain_lora", True)
    plain = {"linear": eqx.nn.Linear(7, 5, key=jr.key(0))}
    adapted = train(lorax.loraify(plain, method=METHOD, rank=2, key=jr.key(1)))
    names = {"linear": "linear"}
    lorax.peft.save(tmp_path, adapted, names=names)
    loaded = lorax.peft.load(tmp_path, plain, names=names)
    assert isinstance(loaded["linear"].weight, lorax.LoraWeight)
    assert_close(loaded["linear"](X), adapted["linear"](X))


def test_nests(model, trained):
    twice = lorax.loraify(trained, "linear", nested=True, rank=1, key=jr.key(5))
    assert_close(twice(X), trained(X))
    beneath = lorax.loraify(model, "linear", rank=1, key=jr.key(5))
    again = lorax.loraify(beneath, "linear", nested=True, method=METHOD, key=jr.key(6))
    assert_close(again(X), model(X), 1e-6)

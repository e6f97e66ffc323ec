"""`params` is the adapter: attaching it to models, and combining it with frozen
parts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, run, trained, weights

import eqx_lorax as lorax


class Net(eqx.Module):
    layers: list
    table: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.layers = [eqx.nn.Linear(6, 6, key=k) for k in keys[:2]]
        self.table = eqx.nn.Embedding(5, 6, key=keys[2])
        self.cell = eqx.nn.GRUCell(6, 6, key=keys[3])
        self.head = eqx.nn.Linear(6, 2, key=keys[4])

    def __call__(self, i):
        x = self.table(i)
        for layer in self.layers:
            x = jax.nn.tanh(layer(x))
        return self.head(self.cell(x, jnp.ones(6)))


class VeraWeight(lorax.AbstractLoraWeight):
    """A method with frozen arrays besides the base."""

    w: Any
    b: jax.Array
    a: jax.Array
    gain: jax.Array

    frozen = ("w", "b", "a")
    method = "vera of adapters to attach"

    def factored(self):
        b = self.gain[:, None] * self.b
        return lorax.Factored(self.w, b, self.a, 1 / b.shape[-1])

    def array_axes(self):
        return {"b": (-2, "rank"), "a": ("rank", -1), "gain": (-2,)}


KEY = jax.random.key(0)
MODEL = Net(jax.random.key(1))
MANY = ["layers", "table", "cell.weight_hh"]


def adapted(filter="layers", seed=0, also=None, **options):
    """An adapter as if trained, its frozen part, and the model."""
    options = {"rank": 2, "key": jax.random.key(seed)} | options
    model = trained(lorax.loraify(MODEL, filter, **options))
    if also is not None:
        new = jax.tree.map(lambda x: x + 1, model.head)
        model = eqx.tree_at(lambda m: m.head, model, new)
    return *lorax.partition(model, also), model


OTHERS = {
    "plain": lambda: MODEL,
    "same targets": lambda: adapted(MANY, 1)[2],
    "other rank and alpha": lambda: adapted(MANY, 1, rank=3, alpha=9)[2],
    "other targets": lambda: adapted(["head", "cell.weight_ih", "layers.1"], 1)[2],
    "nested": lambda: lorax.loraify(
        adapted("layers", 1)[2], "layers", rank=1, nested=True, key=KEY
    ),
    "bfloat16": lambda: adapted(MANY, 1, dtype=jnp.bfloat16)[2],
}
ADAPTERS = {
    "plain": dict(filter=MANY),
    "settings": dict(
        filter=["layers.0", "table"], rank=1, alpha=7, rank_stabilised=True
    ),
    "a head too": dict(also="head"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_are_those_of_its_own_model(adapter, other):
    params, frozen, own = adapted(**ADAPTERS[adapter])
    model = OTHERS[other]()
    attached = lorax.attach(model, params)
    assert_close(run(attached, 2), run(own, 2), 1e-6)
    # The result has the same structure, settings and bits.
    assert_identical(attached, own)
    assert_identical(lorax.attach(attached, params), own)
    for weight, there in zip(weights(attached), weights(own)):
        assert weight.w is there.w and weight.b is there.b
    also = ADAPTERS[adapter].get("also")
    assert_identical(lorax.partition(attached, also)[0], params)


def test_attach_inside_jit_and_on_shapes():
    params, _, own = adapted(MANY, also="head")
    model = OTHERS["other targets"]()
    inside = eqx.filter_jit(lambda model, params: lorax.attach(model, params)(2))
    assert_close(inside(model, params), run(own, 2), 1e-6)
    abstract = eqx.filter_eval_shape(lorax.attach, model, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(own)
    shapes = eqx.filter_eval_shape(lambda x: x, (model, params))
    assert eqx.tree_equal(lorax.attach(*shapes), abstract)
    gradient = eqx.filter_grad(lambda p: lorax.attach(model, p)(2).sum())(params)
    expected = lorax.filter_grad(lambda m: m(2).sum(), also="head")(own)
    assert_close(gradient, expected)


def test_nested_adapters():
    inner, *_, first = adapted()
    second = trained(lorax.loraify(first, "layers", rank=1, nested=True, key=KEY))
    params, _ = lorax.partition(second)
    other = lorax.attach(MODEL, inner)
    assert_identical(lorax.attach(other, params), second)
    third = lorax.loraify(second, "layers", rank=1, nested=True, key=jax.random.key(5))
    # `params` has one adapter below its own: the innermost one of the model.
    assert_identical(lorax.attach(third, params), second)
    assert_identical(lorax.attach(third, inner), first)
    with pytest.raises(ValueError, match="on top of 1 others.*of which `model` has 0"):
        lorax.attach(MODEL, params)


def test_dropout_is_no_part_of_an_adapter():
    params, _, own = adapted(dropout=0.3)
    plain = lorax.attach(MODEL, params)
    assert jax.tree.structure(lorax.partition(plain)[0]) == jax.tree.structure(params)
    assert_close(run(plain, 1), run(eqx.nn.inference_mode(own), 1))
    other = adapted(seed=3, dropout=0.6)[2]
    assert [x.dropout.p for x in lorax.attach(other, params).layers] == [0.6, 0.6]
    keyed = lorax.attach(lorax.dropout_key(other, KEY), params)
    assert_close(
        run(keyed, 1), run(lorax.dropout_key(lorax.attach(other, params), KEY), 1)
    )
    no_dropout = lorax.attach(other, adapted()[0])
    assert [layer.dropout for layer in no_dropout.layers] == [None, None]


def test_bare_weights():
    tree = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    model = trained(lorax.init_lora(tree, {"w": 2, "b": 0}, KEY, alpha=3.0))
    params, _ = lorax.partition(model)
    assert_identical(lorax.attach(tree, params), model)
    params = lorax.split_lora_params(model, {"w": 2, "b": lorax.LORA_FULL})
    assert_identical(lorax.attach(tree, params), model)


def test_methods_of_others():
    linear = eqx.nn.Linear(6, 5, key=KEY)
    b, a = jnp.ones((5, 2)), jnp.ones((2, 6))

    def of(gain):
        weight = VeraWeight(linear.weight, b, a, jnp.full(5, gain))
        return lorax.LoraLinear(eqx.tree_at(lambda x: x.weight, linear, weight))

    params, frozen = lorax.partition(of(2.0))
    # The frozen arrays of the method come from the model.
    assert_identical(lorax.attach(of(1.0), params), of(2.0))
    assert_identical(lorax.combine(params, frozen), of(2.0))
    with pytest.raises(ValueError, match=r"`b`, `a` of a VeraWeight are frozen"):
        lorax.attach(linear, params)
    short = eqx.tree_at(lambda m: m.wrapped.weight.gain, params, jnp.ones(4))
    with pytest.raises(ValueError, match=r"weight: `gain` has shape \(4,\).*\(5,\)"):
        lorax.attach(of(1.0), short)


def test_all_that_does_not_fit_is_named():
    params, frozen, whole = adapted(MANY, also="head")
    small = eqx.tree_at(
        lambda m: (m.layers[0], m.head),
        MODEL,
        (eqx.nn.Linear(6, 4, key=KEY), eqx.nn.Linear(6, 3, key=KEY)),
    )
    with pytest.raises(ValueError) as error:
        lorax.attach(small, params)
    for part in (
        r"layers.0.weight: `b` has shape (6, 2); upon the base (4, 6) it is (4, 2)",
        "head.weight: (3, 6) in `model`, (2, 6) in `params`",
        "head.bias: (3,) in `model`, (2,) in `params`",
        "Pass the model that the adapter was made for",
    ):
        assert part in str(error.value)
    bank = lorax.AdapterBank([params, params])
    stacked = lorax.stack([params, params])
    for args, message in [
        ((MODEL, {"x": params}), r"x\.table\.weight: there is no such array"),
        ((MODEL, bank), "no such array"),
        ((MODEL, None), "NoneType without any array"),
        ((MODEL, whole), r"`lorax\.attach\(model, lorax\.partition\(params\)\[0\]\)`"),
        ((MODEL, frozen), "the `frozen` of `lorax.partition`"),
        ((params, params), "`model` is an adapter without its base"),
        ((frozen, params), r"call `lorax\.combine\(params, frozen\)`"),
        ((MODEL, stacked), r"Attach one of them, `jax\.tree\.map"),
    ]:
        with pytest.raises(ValueError, match=message):
            lorax.attach(*args)
    conv = eqx.tree_at(lambda m: m.layers[0], MODEL, eqx.nn.Conv1d(6, 6, 1, key=KEY))
    with pytest.raises(ValueError, match="a Conv1d in `model`, a Linear in `params`"):
        lorax.attach(conv, params)


# combine


def test_combine():
    params, frozen, model = adapted(MANY, also="head")
    assert_identical(lorax.combine(params, frozen), model)
    # Another rank with the same static settings.
    other = adapted(MANY, 3, rank=3, alpha=2, also="head")
    assert_identical(
        lorax.combine(other[0], lorax.partition(model, "head")[1]),
        eqx.combine(other[0], frozen),
    )
    shapes = eqx.filter_eval_shape(lambda x: x, (params, frozen))
    assert eqx.tree_equal(lorax.combine(*shapes), eqx.combine(*shapes))

    @eqx.filter_jit
    def gradients(params, frozen):
        loss = lambda params: lorax.combine(params, frozen)(2).sum()  # noqa: E731
        return eqx.filter_grad(loss)(params)

    gradient = gradients(params, frozen)
    assert_identical(lorax.combine(gradient, frozen), eqx.combine(gradient, frozen))
    stacked = lorax.stack([params, other[0]])
    batch = eqx.filter_vmap(lambda p: lorax.combine(p, frozen)(2))(stacked)
    assert_close(batch[0], run(model, 2))
    bank = lorax.AdapterBank([params, params])
    assert_close(run(lorax.combine(bank[1], frozen), 2), run(model, 2))
    second = lorax.loraify(model, "layers", rank=1, nested=True, key=KEY)
    assert_identical(lorax.combine(*lorax.partition(second)), second)


def test_what_does_not_belong_together():
    params, frozen, model = adapted()
    other = adapted(alpha=16, rank_stabilised=True)
    more, with_head = adapted(MANY), adapted(also="head")
    wide = eqx.tree_at(lambda m: m.layers[0].wrapped.weight.a, params, jnp.ones((2, 7)))
    for args, message in [
        (
            (params, other[1]),
            r"layers\.0\.weight: `alpha` is 2\.0 in `params` and 16\.0 in `frozen`"
            r"(.|\n)*rank_stabilised(.|\n)*lorax\.attach\(model, params\)",
        ),
        ((more[0], frozen), r"table: a LoraEmbedding in `params`, a Embedding in"),
        ((params, MODEL), r"layers\.0: a LoraLinear in `params`, a Linear in `frozen`"),
        ((params, model), r"overlap:(.|\n)*layers\.0\.weight\.b is in both"),
        ((params, with_head[1]), r"head: its arrays are in neither"),
        ((frozen, frozen), r"overlap"),
        ((params, params), r"overlap"),
        ((frozen, params), r"the arguments are exchanged"),
        ((wide, frozen), r"`a` has shape \(2, 7\); upon the base \(6, 6\) it is"),
        ((params, None), r"in `params`, nothing in `frozen`"),
        ((params, frozen.layers), "a Net in `params`, a list in `frozen`"),
        ((lorax.stack([params]), frozen), r"`b` has shape \(1, 6, 2\)"),
        (
            (jax.tree.map(lambda _: None, params), frozen),
            r"layers\.0\.weight: `b`, `a` in neither",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            lorax.combine(*args)
    for numbers in ([0.5, 0.5], np.ones(2), [jnp.ones(())] * 2):
        with pytest.raises(TypeError, match=r"`lorax\.weighted_sum\(adapters, weights"):
            lorax.combine([params, params], numbers)


# Each function that takes a model, called with one of its parts

MEANT = r"lorax\.combine\(params, frozen\)|lorax\.attach\(model, params\)"
REFUSED = {
    "loraify": lambda part: lorax.loraify(part, key=KEY),
    "loraify nested": lambda part: lorax.loraify(part, nested=True, key=KEY),
    "unloraify": lambda part: lorax.unloraify(part),
    "unloraify without merging": lambda part: lorax.unloraify(part, merge=False),
    "merged_forward": lambda part: lorax.merged_forward(part),
    "save_adapter": lambda part: lorax.save_adapter("x.safetensors", part),
    "load_adapter": lambda part: lorax.load_adapter("x.safetensors", part),
    "peft.save": lambda part: lorax.peft.save("x", part, names={}),
    "peft.load": lambda part: lorax.peft.load("x", part, names={}),
    "plan": lambda part: lorax.plan(lambda m, x: m(x).sum(), part, jnp.int32(1)),
    "init_lora": lambda part: lorax.init_lora(part, 2, KEY),
    "merge_params": lambda part: lorax.merge_params(part),
    "filter_grad": lambda part: lorax.filter_grad(lambda m: m(1).sum())(part),
    "lora": lambda part: lorax.lora(part)(1),
    "lora of a function": lambda part: lorax.lora(lambda m: m(1))(part),
    "the call of the model": lambda part: part(1),
    "the call of a layer": lambda part: part.layers[0](jnp.ones(6)),
    "jit": lambda part: run(part, 1),
    "@": lambda part: part.layers[0].weight @ jnp.ones(6),
    "@ on the other side": lambda part: jnp.ones(6) @ part.layers[0].weight,
    "T": lambda part: jnp.ones(6) @ part.layers[0].weight.T,
    "[]": lambda part: part.table.weight[1],
    "materialise": lambda part: part.layers[0].weight.materialise(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_where_the_model_is_meant(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params, frozen, _ = adapted(MANY, also="head")
    for part in (params, frozen):
        with pytest.raises((ValueError, TypeError), match=MEANT):
            REFUSED[name](part)
    assert not list(tmp_path.iterdir())


ACCEPTED = {
    "scale": lambda params: lorax.scale(params, 1.0),
    "weighted_sum": lambda params: lorax.weighted_sum([params], [1.0]),
    "trainable": lambda params: eqx.filter(params, lorax.trainable(params, "head")),
    "partition": lambda params: lorax.partition(params, "head")[0],
    "AdapterBank": lambda params: lorax.AdapterBank([params, params])[1],
    "stack": lambda params: jax.tree.map(lambda x: x[0], lorax.stack([params])),
    "split_lora_params": lambda params: lorax.split_lora_params(params, -1),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_takes_an_adapter(name):
    params, frozen, model = adapted(MANY, also="head")
    found = ACCEPTED[name](params)
    assert_close(run(lorax.combine(found, frozen), 2), run(model, 2))


def test_the_summary_of_an_adapter():
    params, frozen, model = adapted(MANY, also="head")
    whole = lorax.summary(model, also="head")
    for also in (None, "head"):
        alone = lorax.summary(params, also)
        for mine, theirs in zip(alone.targets, whole.targets, strict=True):
            names = ("path", "kind", "shape", "rank", "scale", "trained")
            assert all(getattr(mine, n) == getattr(theirs, n) for n in names)
            assert mine.frozen == 0 and mine.dtype == ""
        assert "layers.0.weight" in alone.table(full=True)
        assert "(? for full" in str(alone)
    assert alone.trained == whole.trained and alone.adam_bytes == whole.adam_bytes
    with pytest.raises(ValueError, match=r"`lorax\.summary\(lorax\.combine\(params"):
        lorax.summary(frozen)
    stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(3, 4, key=k))(jax.random.split(KEY))
    stack = lorax.loraify(stack, rank=1, key=KEY)
    assert lorax.summary(lorax.partition(stack)[0]).targets[0].shape == (2, 4, 3)


def test_frozen_where_it_is_meant(tmp_path):
    params, frozen, _ = adapted()
    for call in (lorax.partition, lorax.trainable):
        with pytest.raises(ValueError, match="without its adapters.*" + MEANT):
            call(frozen)
    with pytest.raises(ValueError, match="`frozen` is an adapter.*its second result"):
        lorax.Checkpoints(tmp_path, params)


def test_an_adapter_part_of_which_is_frozen():
    """Arrays that `exclude` left out of `params` are not part of the adapter."""
    model = adapted()[2]
    params, frozen = lorax.partition(model, exclude="layers.0")
    assert_identical(lorax.combine(params, frozen), model)
    assert_identical(lorax.attach(model, params), model)
    (target,) = lorax.summary(params).targets
    assert target.path == "layers.1.weight"
    taken = jax.tree.map(lambda x: x[0], lorax.stack([params, None]))
    assert_close(run(lorax.combine(taken, frozen), 1), run(model, 1))
    with pytest.raises(
        ValueError, match=r"layers\.0\.weight: `b`, `a` of a LoraWeight"
    ):
        lorax.attach(MODEL, params)

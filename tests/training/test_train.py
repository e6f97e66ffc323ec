"""Frozen means not in the tree that is differentiated."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from helpers import assert_identical, trained, weights

import eqx_lorax as lorax


class Classifier(eqx.Module):
    body: eqx.nn.MLP
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    count: jax.Array
    label: str = "x"

    def __init__(self, key):
        keys = jr.split(key, 2)
        self.body = eqx.nn.MLP(4, 4, 8, 1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.head = eqx.nn.Linear(4, 2, key=keys[1])
        self.count = jnp.array(3)

    def __call__(self, x):
        return self.head(self.norm(self.body(x)))


@pytest.fixture
def model(getkey):
    return lorax.loraify(Classifier(getkey()), "body", rank=2, key=getkey())


def loss(model, x):
    return jnp.sum((model(x) - 10) ** 2)


def paths(spec):
    leaves = jax.tree_util.tree_leaves_with_path(spec)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if leaf is True]


ADAPTERS = 4


def test_trainable(model):
    spec = lorax.trainable(model)
    assert jax.tree.structure(spec) == jax.tree.structure(model)
    assert all(type(leaf) is bool for leaf in jax.tree.leaves(spec))
    assert len(paths(spec)) == ADAPTERS
    assert all(path.endswith((".a", ".b")) for path in paths(spec))


ALSO = {
    "name": ("head", [".head.weight", ".head.bias"]),
    "list": (
        ["head.bias", "norm"],
        [".norm.weight", ".norm.bias", ".head.bias"],
    ),
    "predicate": (
        lambda x: isinstance(x, eqx.nn.LayerNorm),
        [".norm.weight", ".norm.bias"],
    ),
    "type": (eqx.nn.LayerNorm, [".norm.weight", ".norm.bias"]),
    "biases of adapted layers": (
        "body",
        [
            ".body.layers[0].wrapped.bias",
            ".body.layers[1].wrapped.bias",
        ],
    ),
    "path through an adapted layer": (
        "body.layers.0.bias",
        [".body.layers[0].wrapped.bias"],
    ),
}


@pytest.mark.parametrize("name", ALSO)
def test_also(name, model):
    also, expected = ALSO[name]
    spec = lorax.trainable(model, also)
    found = [path for path in paths(spec) if not path.endswith((".a", ".b"))]
    assert found == expected
    assert len(paths(spec)) == len(expected) + ADAPTERS
    params, frozen = lorax.partition(model, also)
    assert len(jax.tree.leaves(params)) == len(expected) + ADAPTERS
    assert_identical(eqx.combine(params, frozen), model)


EXCLUDED = {
    "an adapter": (None, "body.layers.0", [".body.layers[1]"]),
    "an array": ("head", "head.bias", [".body.layers[0]", ".body.layers[1]", ".head"]),
    "what is in both": (["head", "body"], "body", [".head"]),
    "regex": ("norm", re.compile(r"norm\.bias|.*\.0"), [".body.layers[1]", ".norm"]),
    "type": ("norm", eqx.nn.Linear, [".norm"]),
    "list": (
        ["norm", "head"],
        ["head", "body.layers.1"],
        [".body.layers[0]", ".norm"],
    ),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_exclude(name, model):
    also, exclude, expected = EXCLUDED[name]
    spec = lorax.trainable(model, also, exclude=exclude)
    assert jax.tree.structure(spec) == jax.tree.structure(model)
    found = dict.fromkeys(
        re.split(r"\.(?=w|b(?!ody))", path)[0] for path in paths(spec)
    )
    assert list(found) == expected
    if name == "an array":
        assert ".head.weight" in paths(spec) and ".head.bias" not in paths(spec)
    params, frozen = lorax.partition(model, also, exclude=exclude)
    assert len(jax.tree.leaves(params)) == len(paths(spec))
    assert_identical(lorax.combine(params, frozen), model)
    gradient = lorax.filter_grad(loss, also=also, exclude=exclude)(model, jnp.ones(4))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    _, gradient = lorax.filter_value_and_grad(also=also, exclude=exclude)(loss)(
        model, jnp.ones(4)
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


@pytest.mark.own_errors
def test_exclude_that_excludes_nothing(model):
    with pytest.raises(ValueError, match="`exclude='head'` excludes nothing.*layers.0"):
        lorax.partition(model, exclude="head")
    with pytest.raises(ValueError, match="`exclude='hed'` matched.*mean 'head'"):
        lorax.partition(model, exclude="hed")
    with pytest.raises(ValueError, match="`exclude='norm'` excludes nothing"):
        lorax.partition(model, "head", exclude=["head", "norm"])
    with pytest.raises(ValueError, match="leaves nothing"):
        lorax.partition(model, exclude="body")


@pytest.mark.own_errors
@pytest.mark.parametrize(
    "also",
    (
        "head",
        ["norm", "head"],
        re.compile("head"),
        lambda x: isinstance(x, eqx.nn.Linear),
        lambda model: eqx.tree_at(
            lambda m: m.head, jax.tree.map(lambda _: False, model), True
        ),
    ),
)
def test_also_that_names_an_adapted_layer(also, getkey):
    """Only its bias would be trained."""
    plain = Classifier(getkey())
    model = lorax.loraify(plain, exclude="body", rank=2, key=getkey())
    if callable(also) and not isinstance(also(model), bool):
        also = also(model)
    with pytest.raises(ValueError, match="names head, which.*exclude='head'") as error:
        lorax.partition(model, also)
    assert "name ['head.bias']" in str(error.value)
    # The fixes that the message suggests.
    assert len(paths(lorax.trainable(model, ["head.bias"]))) == 3
    model = lorax.loraify(plain, exclude="head", rank=2, key=getkey())
    assert len(paths(lorax.trainable(model, "head"))) == ADAPTERS + 2


def test_also_around_adapted_layers(getkey):
    """It still means all other arrays in the container, also in a module with some
    adapted arrays."""

    class Body(eqx.Module):
        gate: jax.Array
        norm: eqx.nn.LayerNorm

    model = {"body": Body(jnp.ones((4, 4)), eqx.nn.LayerNorm(4))}
    model = lorax.loraify(model, "gate", rank=2, key=getkey())
    assert len(paths(lorax.trainable(model, "body"))) == 2 + 2


def test_also_as_spec(model):
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: m.head.bias, spec, True)
    assert len(paths(lorax.trainable(model, spec))) == ADAPTERS + 1


def test_also_everything_never_thaws_a_base(model):
    params, _ = lorax.partition(model, True)
    assert all(weight.w is None for weight in weights(params))
    assert params.count is None


@pytest.mark.own_errors
def test_also_that_names_nothing(model):
    with pytest.raises(ValueError, match="`also='heads'`.*'head'"):
        lorax.trainable(model, "heads")
    with pytest.raises(ValueError, match="names no array that could be trained"):
        lorax.trainable(model, "body.layers.0.weight")
    with pytest.raises(ValueError, match="names no array that could be trained"):
        lorax.trainable(model, "count")
    plain = lorax.unloraify(model)
    with pytest.raises(ValueError, match="no adapters"):
        lorax.partition(plain)
    assert len(paths(lorax.trainable(plain, "head"))) == 2


@pytest.mark.parametrize("has_aux", (False, True))
def test_gradients_have_the_signatures_of_equinox(has_aux, model):
    def fun(model, x, *, shift):
        value = loss(model, x) + shift
        return (value, "aux") if has_aux else value

    x = jnp.ones(4)
    params, frozen = lorax.partition(model, "head")
    of_params = lambda params: fun(eqx.combine(params, frozen), x, shift=1.0)  # noqa: E731
    ours = lorax.filter_value_and_grad(fun, also="head", has_aux=has_aux)
    theirs = eqx.filter_value_and_grad(of_params, has_aux=has_aux)
    assert_identical(ours(model, x, shift=1.0), theirs(params))
    ours = lorax.filter_grad(fun, also="head", has_aux=has_aux)
    theirs = eqx.filter_grad(of_params, has_aux=has_aux)
    assert_identical(ours(model, x, shift=1.0), theirs(params))


def test_gradients_as_decorators(model):
    @eqx.filter_jit
    @lorax.filter_value_and_grad(also="head")
    def step(model, x):
        """Its docstring."""
        return loss(model, x)

    @lorax.filter_grad
    def grad(model, x):
        return loss(model, x)

    value, gradient = step(model, jnp.ones(4))
    assert jnp.allclose(value, loss(model, jnp.ones(4)))
    assert gradient.head.weight.any()
    assert grad(model, jnp.ones(4)).head.weight is None
    assert grad.__name__ == "grad"


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.5),
    "sgd with momentum": optax.sgd(1e-2, momentum=0.9),
    "lion": optax.lion(1e-2, weight_decay=0.5),
    "adafactor": optax.adafactor(1e-2, weight_decay_rate=0.5),
    "clipped lamb": optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_leaves_the_base_alone(name, model):
    optimizer = OPTIMIZERS[name]
    x = jnp.ones(4)
    params, frozen = lorax.partition(model, "head")
    state = optimizer.init(params)
    adapter_size = sum(leaf.size for leaf in jax.tree.leaves(params))
    state_size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(state))
    assert state_size <= 4 * adapter_size

    @eqx.filter_jit
    def step(params, state):
        gradient = lorax.filter_grad(loss, also="head")(eqx.combine(params, frozen), x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        return eqx.apply_updates(params, updates), state

    first = loss(model, x)
    for _ in range(3):
        params, state = step(params, state)
    after = eqx.combine(params, frozen)
    assert loss(after, x) != first
    untrained = lambda model: eqx.tree_at(  # noqa: E731
        lambda m: m.head, lorax.unloraify(model, merge=False), None
    )
    assert_identical(untrained(after), untrained(model))
    assert (after.head.weight != model.head.weight).all()


def test_params_are_the_adapter(model, getkey):
    """To switch adapters, combine another one; nothing is compiled."""
    params, frozen = lorax.partition(model)
    other, _ = lorax.partition(trained(model))
    traces = 0

    @eqx.filter_jit
    def run(params, frozen, x):
        nonlocal traces
        traces += 1
        return eqx.combine(params, frozen)(x)

    x = jnp.ones(4)
    outs = [run(p, frozen, x) for p in (params, other, params)]
    assert (outs[0] == outs[2]).all() and (outs[0] != outs[1]).any()
    assert traces == 1


def test_vmap_over_adapters(model, getkey):
    adapters = [lorax.partition(trained(model))[0] for _ in range(3)]
    _, frozen = lorax.partition(model)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    x = jnp.ones(4)
    out = jax.vmap(lambda params: eqx.combine(params, frozen)(x))(stacked)
    for one, params in zip(out, adapters):
        assert jnp.allclose(one, eqx.combine(params, frozen)(x), atol=1e-5)

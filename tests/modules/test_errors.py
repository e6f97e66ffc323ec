"""Bad input is an error that names the argument, shows its value, and ends with the
fix. The model stays unchanged."""

import inspect
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import WideLinear
from helpers import assert_close, trained, weights

import eqx_lorax as lorax


pytestmark = pytest.mark.own_errors


@pytest.fixture
def model(getkey):
    return eqx.nn.MLP(4, 3, 16, 1, key=getkey())


ARGUMENTS = {
    "rank 0": (dict(rank=0), "`rank=0` must be at least 1"),
    "rank negative": (dict(rank=-2), "`rank=-2` must be at least 1"),
    "rank too large": (
        dict(rank=8),
        r"`rank=8` exceeds the smaller side, 4, of layers.0.weight \(16, 4\).*"
        r"rank=\{'layers.0.weight': 4, 'layers.1.weight': 3\}",
    ),
    "rank too large for one": (dict(rank={"layers.1": 4, "*": 2}), "side, 3, of layer"),
    "rank a float": (dict(rank=2.0), "`rank=2.0` must be an integer"),
    "rank a bool": (dict(rank=True), "must be an integer"),
    "alpha 0": (dict(alpha=0), "`alpha=0` for layers.0.weight must be positive"),
    "alpha negative": (dict(alpha=-1.0), "must be positive"),
    "alpha nan": (dict(alpha=float("nan")), "must be positive and finite"),
    "alpha an array": (dict(alpha=jnp.ones(())), "must be a Python number"),
    "dropout 1": (dict(dropout=1.0), "`dropout=1.0` must be a probability"),
    "dropout negative": (dict(dropout=-0.1), "must be a probability"),
    "dropout a string": (dict(dropout="0.1"), "must be a probability"),
    "key none": (dict(key=None), r"`key=None` is not a key. Pass `key=jax.random.key"),
    "key a seed": (dict(key=0), "`key=0` is not a key"),
    "keys": (dict(key=jr.split(jr.key(0))), r"shape \(2,\): one key is needed"),
    "legacy keys": (dict(key=jr.split(jr.PRNGKey(0))), "one key is needed"),
    "init": (
        dict(init="guassian"),
        "`init='guassian'` is unknown. Did you mean 'gaussian'",
    ),
    "dtype integer": (dict(dtype=jnp.int32), "`dtype=int32` cannot be that of the fac"),
    "dtype complex": (dict(dtype=jnp.complex64), "pass a real floating dtype"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name, model, getkey):
    arguments, message = ARGUMENTS[name]
    before = jax.tree.leaves(model)
    with pytest.raises((ValueError, TypeError), match=message):
        lorax.loraify(model, **{"rank": 2, "key": getkey(), **arguments})
    assert all(x is y for x, y in zip(before, jax.tree.leaves(model)))


KEYWORDS = {
    "r": "`rank`",
    "rank_stabilized": "`rank_stabilised`",
    "ranks": "`rank`",
    "lora_alpha": "`alpha`",
    "target_modules": "`filter`",
    "exclude_modules": "`exclude`",
    "lora_dropout": "`dropout`",
    "use_rslora": "`rank_stabilised`",
    "rank_pattern": "a mapping as `rank`",
    "modules_to_save": "`also` of `lorax.partition`",
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_of_others(name, model, getkey):
    message = f"`lorax.loraify` has no argument `{name}`: here it is {KEYWORDS[name]}."
    with pytest.raises(TypeError, match=re.escape(message)):
        lorax.loraify(model, key=getkey(), **{name: 2})


def test_keywords_of_nobody(model, getkey):
    with pytest.raises(TypeError, match="no argument `xyz`: there are model, filter, "):
        lorax.loraify(model, key=getkey(), **{"xyz": 2})
    assert "rank" in inspect.signature(lorax.loraify).parameters


def test_a_class_is_no_model(getkey):
    with pytest.raises(TypeError, match=r"is the class Linear itself.*`Linear\(...\)`"):
        lorax.loraify(eqx.nn.Linear, rank=2, key=getkey())


def test_key_is_required(model):
    with pytest.raises(TypeError, match="key"):
        lorax.loraify(model, rank=2)  # pyright: ignore[reportCallIssue]


def test_key_used_twice(model):
    once = lorax.loraify(model, rank=2, key=jr.key(0))
    with pytest.raises(ValueError, match="`key` was used before.*fresh one"):
        lorax.loraify(once, rank=2, nested=True, key=jr.key(0))


def test_adapting_twice(model, getkey):
    once = lorax.loraify(model, "layers.0", rank=2, key=getkey())
    with pytest.raises(ValueError, match="has adapters at layers.0.*nested=True"):
        lorax.loraify(once, rank=2, key=getkey())
    lorax.loraify(once, "layers.1", rank=2, key=getkey())


def test_integer_weights(model, getkey):
    where = lambda m: m.layers[0].weight  # noqa: E731
    integers = eqx.tree_at(where, model, jnp.ones((16, 4), jnp.int8))
    with pytest.raises(ValueError, match="layers.0.weight has dtype int8.*Cast it"):
        lorax.loraify(integers, rank=2, key=getkey())
    lorax.loraify(integers, "layers.1", rank=2, key=getkey())


def test_dropout_where_there_is_none(getkey):
    model = [eqx.nn.Linear(4, 4, key=getkey()), eqx.nn.Embedding(4, 4, key=getkey())]
    with pytest.raises(ValueError, match="cannot be applied in 1, a Embedding"):
        lorax.loraify(model, ["0", "1"], rank=2, dropout=0.1, key=getkey())
    lorax.loraify(model, ["0", "1"], rank=2, dropout={"0": 0.1}, key=getkey())


def test_missing_key_for_dropout(model, getkey):
    adapted = lorax.loraify(model, rank=2, dropout=0.1, key=getkey())
    with pytest.raises(ValueError, match="`key=None`.*`dropout=0.1`.*inference_mode"):
        adapted.layers[0](jnp.ones(4))
    eqx.nn.inference_mode(adapted)(jnp.ones(4))


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda key: eqx.nn.Linear(4, 4, key=key), jnp.ones(4)),
        (lambda key: eqx.nn.Conv1d(4, 4, 3, key=key), jnp.ones((4, 5))),
        (lambda key: eqx.nn.Embedding(4, 4, key=key), jnp.array(1)),
    ],
)
def test_stacks_called_as_one_layer(make, x, getkey):
    stack = {"layer": eqx.filter_vmap(make)(jr.split(getkey(), 3))}
    adapted = lorax.loraify(stack, "layer", rank=2, key=getkey())["layer"]
    with pytest.raises(ValueError, match=r"stack of layers.*shape \(3, .*filter_vmap"):
        adapted(x)


def test_a_batch_without_vmap(model, getkey):
    adapted = lorax.loraify(model, rank=2, key=getkey())
    message = r"`x` has shape \(7, 4\), but a Linear takes one.*shape \(4,\).*jax.vmap"
    with pytest.raises(ValueError, match=message):
        adapted(jnp.ones((7, 4)))
    layer = lorax.loraify(WideLinear(4, None, key=getkey()), rank=2, key=getkey())
    with pytest.raises(ValueError, match=r"shape \(2, 7, 5\), but a WideLinear takes"):
        layer(jnp.ones((2, 7, 5)))
    # Where the plain layer works, the adapted one does too.
    plain = eqx.nn.Linear(4, 3, use_bias=False, key=getkey())
    layer = lorax.loraify(plain, rank=2, key=getkey())
    assert_close(layer(jnp.ones((4, 7))), plain(jnp.ones((4, 7))))


def test_wrong_inputs(getkey):
    linear = lorax.loraify(eqx.nn.Linear(4, 5, key=getkey()), rank=2, key=getkey())
    with pytest.raises(ValueError, match=r"shapes \(5, 4\) @ \(3,\)"):
        linear(jnp.ones(3))
    scalar = lorax.loraify(
        eqx.nn.Linear("scalar", 5, key=getkey()), rank=1, key=getkey()
    )
    with pytest.raises(ValueError, match=r"must have shape \(\), not \(1,\)"):
        scalar(jnp.ones(1))
    conv = lorax.loraify(eqx.nn.Conv2d(3, 4, 3, key=getkey()), rank=2, key=getkey())
    with pytest.raises(ValueError, match=r"must have 3 axes.*\(2, 3, 5, 5\).*vmap"):
        conv(jnp.ones((2, 3, 5, 5)))


@pytest.mark.parametrize("where", ("a", "b", "w"))
def test_merging_what_is_not_finite(where, model, getkey):
    adapted = trained(lorax.loraify(model, rank=2, key=getkey()))
    poisoned = eqx.tree_at(
        lambda m: getattr(m.layers[1].weight, where),
        adapted,
        replace_fn=lambda x: x.at[0, 0].set(jnp.nan),
    )
    with pytest.raises(ValueError, match="not finite in layers.1.weight; nothing was"):
        lorax.unloraify(poisoned)
    lorax.unloraify(poisoned, merge=False)
    with pytest.raises(Exception, match="not finite in layers.1.weight"):
        jax.block_until_ready(eqx.filter_jit(lorax.unloraify)(poisoned))


def test_merging_what_overflows(getkey):
    model = eqx.nn.Linear(4, 4, dtype=jnp.float16, key=getkey())
    adapted = trained(lorax.loraify(model, rank=2, key=getkey()))
    huge = eqx.tree_at(lambda m: m.weight.a, adapted, jnp.full((2, 4), 1e30))
    with pytest.raises(ValueError, match="overflow of the base's dtype"):
        lorax.unloraify(huge)


def test_merging_what_has_no_adapters(model):
    with pytest.raises(ValueError, match="no adapters to take out"):
        lorax.unloraify(model)


def test_messages_stay_short(getkey):
    many = [eqx.nn.Linear(3, 3, key=jr.key(i)) for i in range(50)]
    with pytest.raises(ValueError, match=r"\*\.weight \(3, 3\) × 50") as error:
        lorax.loraify(many, rank=8, key=getkey())
    assert len(str(error.value)) < 1000
    adapted = trained(lorax.loraify(many, rank=1, key=getkey()))
    nan = jax.tree.map(lambda x: np.nan * x if eqx.is_inexact_array(x) else x, adapted)
    with pytest.raises(ValueError) as error:
        lorax.unloraify(nan)
    assert len(str(error.value)) < 1000
    assert len(weights(nan)) == 50

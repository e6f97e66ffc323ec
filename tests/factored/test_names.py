"""What `jax.checkpoint` keeps of adapted layers under `lorax.checkpoint_policy`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close, equations

import eqx_lorax as lorax


TOKENS, WIDTH, RANK = 5, 8, 2
KEY = jr.key(0)
X = jr.normal(KEY, (TOKENS, WIDTH))


def by_module(layers, x):
    for layer in layers:
        x = jnp.tanh(jax.vmap(layer)(x))
    return x


def by_function(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def make_module():
    layers = [eqx.nn.Linear(WIDTH, WIDTH, key=KEY) for _ in range(2)]
    return by_module, lorax.loraify(layers, rank=RANK, key=KEY)


def make_function():
    weights = [jr.normal(KEY, (WIDTH, WIDTH)) for _ in range(2)]
    return lorax.lora(by_function), lorax.init_lora(weights, [RANK] * 2, KEY)


def make_quantised():
    layers = [eqx.nn.Linear(WIDTH, WIDTH, key=KEY) for _ in range(2)]
    # The second is not adapted.
    return by_module, lorax.loraify(lorax.quantise(layers), "0", rank=RANK, key=KEY)


def saved(fn, *args, given=()):
    """The shapes of what is kept for the backward pass, beside what is given."""
    _, pull = jax.vjp(fn, *args)
    known = {x.unsafe_buffer_pointer() for x in jax.tree.leaves((args, given))}
    kept = [x for x in jax.tree.leaves(pull) if eqx.is_array(x)]
    return sorted(x.shape for x in kept if x.unsafe_buffer_pointer() not in known)


def kept_by(policy, make):
    fn, model = make()
    params, frozen = lorax.partition(model)
    run = lambda params, x: fn(eqx.combine(params, frozen), x)  # noqa: E731
    given = [x for x in jax.tree.leaves(frozen) if eqx.is_array(x)]
    return saved(jax.checkpoint(run, policy=policy), params, X, given=given)


@pytest.mark.parametrize("make", [make_module, make_function])
def test_the_sum_and_the_hidden_activation_are_kept_once(make):
    hidden, output = (TOKENS, RANK), (TOKENS, WIDTH)
    found = kept_by(lorax.checkpoint_policy(), make)
    assert found.count(hidden) == 2
    outputs = [shape for shape in found if shape in (output, output[::-1])]
    # The inputs of both layers are known or cheap to compute again.
    assert len(outputs) <= 2 + 1
    assert len(found) == 2 + len(outputs)
    assert kept_by(jax.checkpoint_policies.nothing_saveable, make) == []


@pytest.mark.parametrize("make", [make_module, make_function, make_quantised])
def test_gradients_do_not_depend_on_the_policy(make):
    fn, model = make()
    params, frozen = lorax.partition(model)

    def loss(params, x, transform=lambda f: f):
        return jnp.sum(transform(fn)(eqx.combine(params, frozen), x))

    def remat(f):
        return eqx.filter_checkpoint(f, policy=lorax.checkpoint_policy())

    expected = jax.jit(jax.grad(loss, (0, 1)))(params, X)
    found = jax.jit(jax.grad(lambda *args: loss(*args, remat), (0, 1)))(params, X)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("make", [make_module, make_function, make_quantised])
def test_products_are_named_once(make):
    fn, model = make()
    jaxpr = eqx.filter_make_jaxpr(fn)(model, X)[0].jaxpr
    names = [e.params["name"] for e in equations(jaxpr) if e.primitive.name == "name"]
    assert names.count("lorax_product") == 2
    assert names.count("lorax_hidden") == (1 if make is make_quantised else 2)


def test_attention_and_more_names():
    def attend(x):
        scores = jnp.einsum("hsd,htd->hst", x, x)
        named = jax.ad_checkpoint.checkpoint_name(jnp.sin(scores), "mine")
        return jnp.sum(jnp.cos(named * 2) ** 2)

    def count(policy):
        x = jr.normal(KEY, (2, 3, 4))
        return saved(jax.checkpoint(attend, policy=policy), x).count((2, 3, 3))

    assert count(lorax.checkpoint_policy()) == 1
    assert count(lorax.checkpoint_policy(attention=False)) == 0
    assert count(lorax.checkpoint_policy("mine", attention=False)) == 1


def test_policies_compare_by_what_they_keep():
    policy = lorax.checkpoint_policy("mine")
    assert policy == lorax.checkpoint_policy("mine") != lorax.checkpoint_policy()
    assert hash(policy) == hash(lorax.checkpoint_policy("mine"))


@pytest.mark.own_errors
def test_a_function_is_no_name():
    with pytest.raises(TypeError, match=r"is no name.*policy=lorax\.checkpoint_policy"):
        lorax.checkpoint_policy(by_module)  # pyright: ignore

"""Dropout keys in the model, for modules that call their layers without a key."""

import io
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, filled, trained, weights
from safetensors import safe_open

import eqx_lorax as lorax


class Block(eqx.Module):
    """Passes no keys to its layers."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        self.up = eqx.nn.Linear(8, 6, key=key)
        self.down = eqx.nn.Linear(6, 8, key=key)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


X = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)


def make_block(dtype, key):
    return Block(key)


@pytest.fixture(scope="module")
def adapted():
    """A list of two blocks."""
    model = [filled(make_block, None, jr.PRNGKey(i)) for i in range(2)]
    return trained(lorax.loraify(model, rank=2, dropout=0.5, key=jr.key(1)))


@eqx.filter_jit
def run(model, x=X):
    for block in model:
        x = block(x)
    return x


def dropout_keys(model):
    """The key of each layer that has one, by the layer's path in the plain model."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(model):
        names = [str(entry).strip(".[]") for entry in path]
        if names and names[-1] == "key":
            found[".".join(name for name in names[:-1] if name != "wrapped")] = leaf
    return found


def bits(key):
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(key) if typed else key)


every_kind = pytest.mark.parametrize("make_key", (jr.key, jr.PRNGKey))


def test_each_layer_has_a_key_of_its_own(adapted):
    key = jr.key(2)
    keyed = lorax.dropout_key(adapted, key)
    keys = dropout_keys(keyed)
    assert len(keys) == len(weights(adapted)) == 4
    assert "1.up" in keys
    assert len({bits(x).tobytes() for x in keys.values()}) == 4
    # A key depends neither on the container nor on other targets.
    few = lorax.loraify(lorax.unloraify(adapted), "up", rank=2, dropout=0.5, key=key)
    few = dropout_keys(lorax.dropout_key(few, key))
    assert len(few) == 2
    assert all((bits(few[path]) == bits(keys[path])).all() for path in few)


@every_kind
def test_what_a_layer_computes(make_key, getkey):
    """The mask comes from its key; an explicit key has precedence."""
    model = {"layer": eqx.nn.Linear(8, 5, key=getkey())}
    adapted = trained(lorax.loraify(model, rank=2, dropout=0.5, key=getkey()))
    keyed = lorax.dropout_key(adapted, make_key(3))["layer"]
    plain, other = adapted["layer"], make_key(4)
    assert_close(keyed(X), plain(X, key=keyed.key))
    assert_close(keyed(X, key=other), plain(X, key=other))
    kept = eqx.nn.Dropout(0.5)(X, key=keyed.key)
    assert 0 < (kept == 0).sum() < 8
    weight = plain.weight
    update = weight.scale * weight.b @ (weight.a @ kept)
    assert_close(keyed(X), model["layer"](X) + update)


def test_gradients_are_those_with_that_mask(getkey):
    model = trained(
        lorax.loraify(
            eqx.nn.Linear(8, 5, key=getkey()), rank=2, dropout=0.5, key=getkey()
        )
    )
    keyed = lorax.dropout_key(model, getkey())

    def loss(model, x, **kwargs):
        return jnp.sum(jnp.sin(model(x, **kwargs)))

    found = lorax.filter_grad(loss)(keyed, X)
    assert_identical(found, lorax.filter_grad(loss)(model, X, key=keyed.key))
    whole = eqx.filter_grad(loss)(keyed, X)
    assert whole.key is None

    def dense(b, a, w, bias, kept):
        y = w @ X + model.weight.scale * b @ (a @ kept) + bias
        return jnp.sum(jnp.sin(y))

    kept = eqx.nn.Dropout(0.5)(X, key=keyed.key)
    w = model.weight
    b, a = jax.grad(dense, (0, 1))(w.b, w.a, w.w, model.bias, kept)
    assert_close((found.weight.b, found.weight.a), (b, a))


def test_another_key_another_mask_and_no_compilation(adapted):
    traces = 0

    @eqx.filter_jit
    def call(model):
        nonlocal traces
        traces += 1
        return run(model)

    @eqx.filter_jit
    def keyed_inside(model, key):
        return run(lorax.dropout_key(model, key))

    outs = [call(lorax.dropout_key(adapted, jr.key(i))) for i in (5, 6, 5)]
    assert traces == 1
    assert (outs[0] == outs[2]).all() and abs(outs[0] - outs[1]).max() > 1e-3
    assert_close(keyed_inside(adapted, jr.key(5)), outs[0])


def test_one_key_an_example(adapted):
    keys = jr.split(jr.key(7), 4)

    @jax.vmap
    def each(key):
        return run(lorax.dropout_key(adapted, key))

    outs = each(keys)
    for key, out in zip(keys, outs):
        assert_close(out, run(lorax.dropout_key(adapted, key)))
    assert len({np.asarray(out).tobytes() for out in outs}) == 4


@every_kind
def test_one_key_a_layer_of_a_stack(make_key):
    """`scan` over blocks with one leading axis, and layers with two."""
    make = lambda dtype, keys: eqx.filter_vmap(Block)(keys)  # noqa: E731
    blocks = filled(make, None, jr.split(jr.PRNGKey(0), 3))
    adapted = trained(lorax.loraify(blocks, rank=2, dropout=0.5, key=jr.key(1)))
    keyed = lorax.dropout_key(adapted, make_key(2))
    keys = keyed.up.key
    words = (2,) if make_key is jr.PRNGKey else ()
    assert keys.shape == (3, *words)
    assert len(np.unique(bits(keys), axis=0)) == 3

    @jax.jit
    def scanned(x):
        arrays, rest = eqx.partition(keyed, eqx.is_array)

        def step(x, arrays):
            return eqx.combine(arrays, rest)(x), None

        return jax.lax.scan(step, x, arrays)[0]

    x = X
    for i in range(3):
        block = jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, keyed)
        x = eqx.filter_jit(block)(x)
    assert_close(scanned(X), x)


def test_one_key_a_layer_of_two_axes():
    def make(dtype, keys):
        conv = lambda key: eqx.nn.Conv1d(2, 3, 3, key=key)  # noqa: E731
        return eqx.filter_vmap(eqx.filter_vmap(conv))(keys)

    stack = filled(make, None, jr.split(jr.PRNGKey(0), (2, 4)))
    stack = lorax.loraify(stack, rank=2, dropout=0.5, key=jr.key(1))
    keys = lorax.dropout_key(stack, jr.key(2)).key
    assert keys.shape == (2, 4)
    assert len(np.unique(bits(keys).reshape(8, -1), axis=0)) == 8


def test_attention():
    """Its own `key` is for its own dropout."""
    model = eqx.nn.MultiheadAttention(2, 8, key=jr.key(0))
    adapted = trained(
        lorax.loraify(model, "query_proj", rank=2, dropout=0.5, key=jr.key(1))
    )
    x = jnp.stack([X, -X, 2 * X])
    keyed = lorax.dropout_key(adapted, jr.key(2))
    kept = eqx.nn.Dropout(0.5)(jnp.ones(8), key=keyed.query_proj.key)
    a = adapted.query_proj.weight.a * kept[None]
    weight = eqx.tree_at(lambda weight: weight.a, adapted.query_proj.weight, a)
    dense = eqx.tree_at(lambda m: m.query_proj.weight, model, weight.materialise())
    assert_close(keyed(x, x, x), dense(x, x, x))


def test_a_key_of_a_stack_that_was_not_sliced():
    make = lambda key: eqx.nn.Linear(4, 4, key=key)  # noqa: E731
    keys = jr.split(jr.PRNGKey(0), 3)
    stack = filled(lambda _, keys: eqx.filter_vmap(make)(keys), None, keys)
    stack = lorax.loraify(stack, rank=2, dropout=0.5, key=jr.key(1))
    keyed = lorax.dropout_key(stack, jr.key(2))
    arrays, rest = eqx.partition(keyed, eqx.is_inexact_array)
    layer = eqx.combine(jax.tree.map(lambda x: x[0], arrays), rest)
    with pytest.raises(ValueError, match=r"shape \(3,\).*eqx.is_array"):
        layer(jnp.ones(4))


def test_keys_are_no_adapter(adapted, tmp_path):
    keyed = lorax.dropout_key(adapted, jr.key(2))
    assert jax.tree.structure(keyed) != jax.tree.structure(adapted)
    params, frozen = lorax.partition(adapted)
    keyed_params, keyed_frozen = lorax.partition(keyed)
    assert_identical(keyed_params, params)
    assert len(dropout_keys(keyed_frozen)) == 4
    assert not any(dropout_keys(lorax.trainable(keyed)).values())
    # Both parts can be combined with both.
    assert eqx.tree_equal(lorax.combine(params, keyed_frozen), keyed)
    assert eqx.tree_equal(lorax.combine(keyed_params, frozen), adapted)
    assert eqx.tree_equal(
        lorax.combine(params, lorax.dropout_key(frozen, jr.key(2))), keyed
    )
    state = optax.adam(1e-3).init(keyed_params)
    assert not any("key" in str(path) for path, _ in jax.tree.leaves_with_path(state))
    assert lorax.summary(keyed) == lorax.summary(adapted)
    assert str(lorax.summary(keyed, also="bias")) == str(
        lorax.summary(adapted, also="bias")
    )
    plain = lorax.unloraify(adapted, merge=False)
    assert_identical(lorax.unloraify(keyed, merge=False), plain)
    assert jax.tree.structure(lorax.unloraify(keyed)) == jax.tree.structure(plain)

    for name, model in (("keyed", keyed), ("adapted", adapted)):
        lorax.save_adapter(tmp_path / name, model, also="bias")
    written = []
    for name in ("keyed", "adapted"):
        with safe_open(tmp_path / name, "numpy") as file:
            arrays = {key: file.get_tensor(key).tolist() for key in file.keys()}
            written.append((arrays, file.metadata()))  # with the digests of the base
    assert written[0] == written[1]
    # They have the same base, and load into models with keys.
    lorax.load_adapter(tmp_path / "adapted", keyed)
    assert dropout_keys(lorax.load_adapter(tmp_path / "adapted", plain)) == {}


def test_keys_have_no_name_in_filters(adapted):
    keyed = lorax.dropout_key(adapted, jr.PRNGKey(2))
    for name in ("key", "dropout", eqx.nn.Dropout):
        with pytest.raises(ValueError, match="matched nothing"):
            lorax.partition(keyed, also=name)
    with pytest.raises(ValueError, match="Available") as error:
        lorax.partition(keyed, also="nothing")
    assert "key" not in str(error.value)
    # A second adapter has its own dropout, and so its own key.
    twice = lorax.loraify(keyed, rank=1, nested=True, dropout=0.5, key=jr.key(5))
    assert dropout_keys(twice) == {}


def test_a_plan_has_no_keys(adapted):
    def loss(model, x):
        return jnp.sum(run(model, x))

    keyed = lorax.dropout_key(adapted, jr.key(2))
    assert lorax.plan(loss, keyed, X).base == lorax.summary(adapted).frozen_bytes


def test_a_training_loop(adapted):
    """Only factors change, and new keys in each step cause no recompilation."""
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    params, frozen = lorax.partition(adapted)
    state = optimizer.init(params)
    traces = 0

    @eqx.filter_jit
    def step(params, state, key):
        nonlocal traces
        traces += 1

        @lorax.filter_value_and_grad
        def loss(model):
            def predict(x, key):
                return run(lorax.dropout_key(model, key), x)

            out = jax.vmap(predict)(jnp.stack([X, -X]), jr.split(key))
            return jnp.mean(jnp.square(out - 1))

        value, grads = loss(eqx.combine(params, frozen))
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes
            updates, state = optimizer.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    values = []
    for key in jr.split(jr.key(3), 30):
        params, state, value = step(params, state, key)
        values.append(float(value))
    assert traces == 1
    assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5])
    after = eqx.combine(params, frozen)
    assert_identical(lorax.partition(after)[1], frozen)


def test_through_the_function_door(adapted):
    keyed = lorax.dropout_key(adapted, jr.key(2))
    expected = run(keyed)
    assert_close(lorax.lora(run)(keyed, X), expected)
    assert_close(lorax.lora(keyed[1])(lorax.lora(keyed[0])(X)), expected)

    def each(key):
        return lorax.lora(run)(lorax.dropout_key(adapted, key), X)

    keys = jr.split(jr.key(7), 2)
    for key, out in zip(keys, jax.vmap(each)(keys)):
        assert_close(out, run(lorax.dropout_key(adapted, key)))

    def total(model, through):
        return jnp.sum(jnp.sin(through(run)(model, X)))

    assert_close(
        lorax.filter_grad(total)(keyed, lorax.lora),
        lorax.filter_grad(total)(keyed, lambda fn: fn),
        1e-4,
    )


class Gate(eqx.Module):
    """Has an array and a layer."""

    kernel: jax.Array
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.out(jnp.tanh(self.kernel @ x))


def test_inside_a_module_of_another_kind():
    model = [Gate(jr.normal(jr.key(0), (6, 8)), eqx.nn.Linear(6, 5, key=jr.key(1)))]
    adapted = lorax.loraify(
        model, ["kernel", "out"], rank=2, dropout={"out": 0.5}, key=jr.key(2)
    )
    adapted = trained(adapted)
    keyed = lorax.dropout_key(adapted, jr.key(3))[0]
    assert list(dropout_keys([keyed])) == ["0.out"]
    y = lorax.unloraify(adapted)[0].kernel @ X
    assert_close(keyed(X), keyed.out(jnp.tanh(y)))


@every_kind
def test_survives(make_key, adapted):
    """Equinox's serialisation, abstract models, pickles, and arguments of `jit`."""
    keyed = lorax.dropout_key(adapted, make_key(2))
    abstract = eqx.filter_eval_shape(lorax.dropout_key, adapted, make_key(2))
    assert jax.tree.structure(abstract) == jax.tree.structure(
        eqx.filter_eval_shape(lambda model: model, keyed)
    )
    shapes = eqx.filter_eval_shape(lambda: adapted)
    assert len(dropout_keys(lorax.dropout_key(shapes, make_key(2)))) == 4
    assert eqx.tree_equal(pickle.loads(pickle.dumps(keyed)), keyed)
    assert eqx.tree_equal(eqx.filter_jit(lambda model: model)(keyed), keyed)
    # JAX cannot serialise typed keys.
    kept = keyed if make_key is jr.PRNGKey else lorax.dropout_key(keyed, None)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, kept)
    file.seek(0)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, kept), kept)


def test_evaluation(adapted):
    """The same code runs in evaluation, where keys have no effect."""
    evaluated = eqx.nn.inference_mode(adapted)
    assert lorax.dropout_key(evaluated, jr.key(2)) is evaluated
    keyed = lorax.dropout_key(adapted, jr.key(2))
    without = run(lorax.unloraify(adapted))
    assert_close(run(eqx.nn.inference_mode(keyed)), without)
    assert_identical(lorax.dropout_key(keyed, None), adapted)
    no_dropout = lorax.loraify(lorax.unloraify(adapted), rank=2, key=jr.key(1))
    assert lorax.dropout_key(no_dropout, jr.key(2)) is no_dropout
    # Only some layers; the others stay unchanged.
    some = lorax.loraify(
        lorax.unloraify(adapted), rank=2, dropout={"up": 0.1}, key=jr.key(1)
    )
    assert len(dropout_keys(lorax.dropout_key(some, jr.key(2)))) == 2


def test_one_layer_twice_has_one_mask():
    class Twice(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x):
            return self.layer(x) - self.layer(x)

    model = Twice(eqx.nn.Linear(8, 8, key=jr.key(0)))
    adapted = trained(lorax.loraify(model, rank=2, dropout=0.5, key=jr.key(1)))
    assert not lorax.dropout_key(adapted, jr.key(2))(X).any()


def test_errors(adapted):
    with pytest.raises(ValueError, match="`key=None`.*`lorax.dropout_key"):
        run(adapted)
    with pytest.raises(ValueError, match="no adapters.*`lorax.loraify"):
        lorax.dropout_key(lorax.unloraify(adapted), jr.key(0))
    params, _ = lorax.partition(adapted)
    with pytest.raises(ValueError, match="`params`.*`lorax.combine"):
        lorax.dropout_key(params, jr.key(0))


@pytest.mark.own_errors
def test_not_one_key(adapted):
    with pytest.raises(ValueError, match=r"shape \(4,\).*jax.vmap"):
        lorax.dropout_key(adapted, jr.split(jr.key(0), 4))
    with pytest.raises(TypeError, match="`key=0` is not a key"):
        lorax.dropout_key(adapted, 0)

"""What `loraify` and `unloraify` must replace, and what they must leave unchanged."""

import copy
import pickle
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import Attention, OwnLinear, SubLinear, WideLinear
from helpers import assert_close, assert_identical, run, trained, weights

import eqx_lorax as lorax


def mlp(key, **kwargs):
    return eqx.nn.MLP(4, 4, 8, 2, key=key, **kwargs)


def test_the_input_is_not_changed(getkey):
    model = eqx.filter(mlp(getkey()), eqx.is_array)
    saved = copy.deepcopy(model)
    adapted = trained(lorax.loraify(model, rank=2, key=getkey()))
    adapted_saved = copy.deepcopy(adapted)
    lorax.unloraify(adapted)
    assert_identical(adapted, adapted_saved)
    assert_identical(model, saved)


def test_bases_are_shared_by_pointer(getkey):
    model = mlp(getkey())
    adapted = lorax.loraify(model, rank=2, key=getkey())
    for layer, plain in zip(adapted.layers, model.layers):
        assert layer.weight.w is plain.weight
        assert layer.bias is plain.bias


def test_keys_depend_on_the_path_alone(getkey):
    model, key = mlp(getkey()), getkey()
    every = weights(lorax.loraify(model, rank=2, key=key))
    (one,) = weights(lorax.loraify(model, "layers.1", rank=2, key=key))
    assert (every[1].a == one.a).all()
    assert not (every[0].a[:, :4] == every[1].a[:, :4]).any()
    other = weights(lorax.loraify(model, rank=2, key=getkey()))
    assert not (every[1].a == other[1].a).any()
    legacy = lorax.loraify(model, rank=2, key=jr.PRNGKey(0))
    assert (weights(legacy)[0].b == 0).all()


def test_keys_are_not_reused(getkey):
    """JAX's own checker agrees."""
    model = mlp(getkey())
    with jax.debug_key_reuse(True):
        lorax.loraify(model, rank=2, key=jr.key(3))


@pytest.mark.parametrize("init", ("uniform", "gaussian"))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.complex64))
def test_initial_factors(init, dtype, getkey):
    layer = eqx.nn.Linear(400, 300, dtype=dtype, key=getkey())
    adapted = lorax.loraify(layer, rank=16, init=init, key=getkey())
    weight = adapted.weight
    bound, deviation = 1 / np.sqrt(400), 1 / 16
    a = np.asarray(weight.a)
    assert not weight.b.any()
    if init == "uniform":
        assert abs(a).max() <= bound * 1.001
        deviation = bound / np.sqrt(3)
    assert abs(a.std() / deviation - 1) < 0.05
    assert abs(a.mean()) < 0.1 * deviation


def test_initial_factors_elsewhere(getkey):
    table = eqx.nn.Embedding(50, 40, key=getkey())
    adapted = lorax.loraify({"table": table}, "table", rank=16, key=getkey())["table"]
    assert abs(float(adapted.weight.a.std()) - 1) < 0.1
    assert adapted.weight.a.shape == (16, 40)
    conv = eqx.nn.Conv2d(8, 32, 3, key=getkey())
    a = lorax.loraify(conv, rank=16, key=getkey()).weight.a
    assert a.shape == (16, 8, 3, 3)
    assert abs(float(abs(a).max()) - 1 / np.sqrt(72)) < 0.005
    init = jax.nn.initializers.constant(2.0)
    a = lorax.loraify(conv, rank=16, init=init, key=getkey()).weight.a
    assert (a == 2).all()


def test_dtype_of_factors(getkey):
    layer = eqx.nn.Linear(4, 4, dtype=jnp.bfloat16, key=getkey())
    for given, found in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        adapted = lorax.loraify(layer, rank=2, dtype=given, key=getkey())
        assert adapted.weight.a.dtype == adapted.weight.b.dtype == found
        assert adapted(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def test_rank_stabilised(getkey):
    model = mlp(getkey())
    adapted = lorax.loraify(model, rank=4, alpha=6, rank_stabilised=True, key=getkey())
    assert [weight.scale for weight in weights(adapted)] == [3.0] * 3


class Reads(eqx.Module):
    """Reads the attributes of a layer instead of calling it."""

    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    embedding: eqx.nn.Embedding

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.linear = eqx.nn.Linear(4, 4, key=keys[0])
        self.conv = eqx.nn.Conv2d(2, 4, 1, key=keys[1])
        self.embedding = eqx.nn.Embedding(5, 4, key=keys[2])

    def __call__(self, i):
        x = self.embedding.weight[i]
        if isinstance(self.linear, eqx.nn.Linear):
            x = self.linear.weight @ x + self.linear.bias
        x = _apply(self.linear.weight, x)
        return x @ self.embedding.weight.T


def _apply(weight, x):
    return x @ weight.T


def test_models_that_read_attributes(getkey):
    model = Reads(getkey())
    filter = ["linear", "conv", "embedding"]
    adapted = lorax.loraify(model, filter, rank=2, key=getkey())
    assert_close(adapted(2), model(2))
    assert adapted.linear.in_features == 4 and adapted.linear.use_bias
    assert adapted.conv.kernel_size == (1, 1) and adapted.conv.padding_mode == "ZEROS"
    assert adapted.embedding.embedding_size == 4
    assert adapted.embedding.num_embeddings == 5
    assert adapted.linear.weight.shape == (4, 4)
    adapted = trained(adapted)
    assert_close(adapted(2), lorax.unloraify(adapted)(2))
    with pytest.raises(AttributeError, match="nonsense"):
        adapted.linear.nonsense  # noqa: B018


def test_layers_pass_for_what_they_stand_for(getkey):
    model = Reads(getkey())
    adapted = lorax.loraify(model, rank=2, key=getkey())
    assert isinstance(adapted.linear, eqx.nn.Linear)
    assert isinstance(adapted.linear, lorax.LoraLinear)
    assert isinstance(adapted.linear, eqx.Module)
    assert not isinstance(adapted.linear, eqx.nn.Conv)
    assert isinstance(adapted.conv, eqx.nn.Conv2d)
    assert type(adapted.linear) is lorax.LoraLinear


@pytest.mark.parametrize("through", (copy.copy, copy.deepcopy))
def test_copies(through, getkey):
    adapted = lorax.loraify(Reads(getkey()), rank=2, key=getkey())
    assert_identical(through(adapted), adapted)


def test_pickles(getkey):
    adapted = lorax.loraify(
        Attention(eqx.nn.MultiheadAttention(2, 4, key=getkey())), rank=2, key=getkey()
    )
    assert_identical(pickle.loads(pickle.dumps(adapted)), adapted)


def test_serialises_with_equinox(getkey, tmp_path):
    adapted = trained(lorax.loraify(mlp(getkey()), rank=2, key=getkey()))
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", adapted)
    like = lorax.loraify(mlp(getkey()), rank=2, key=getkey())
    assert_identical(eqx.tree_deserialise_leaves(tmp_path / "model.eqx", like), adapted)


def test_a_plain_array_put_in_place_of_the_weight_works(getkey):
    model = mlp(getkey())
    adapted = lorax.loraify(model, rank=2, key=getkey())
    where = lambda m: m.layers[0].weight  # noqa: E731
    plain = eqx.tree_at(where, adapted, 2 * model.layers[0].weight)
    doubled = eqx.tree_at(where, model, 2 * model.layers[0].weight)
    assert_close(plain(jnp.ones(4)), doubled(jnp.ones(4)))
    assert_identical(lorax.unloraify(plain, merge=False), doubled)
    conv = lorax.loraify(Reads(getkey()), rank=2, key=getkey()).conv
    conv = eqx.tree_at(lambda c: c.weight, conv, jnp.ones((4, 2, 1, 1)))
    assert conv(jnp.ones((2, 3, 3))).shape == (4, 3, 3)


class Encoder(eqx.Module):
    mlp: eqx.nn.MLP

    def encode(self, x, shift=0.0):
        return self.mlp(x) + shift


def test_reaches_inside_partials_and_bound_methods(getkey):
    model = Encoder(mlp(getkey()))
    x = jnp.ones(4)
    for holder in (
        model.encode,
        jax.tree_util.Partial(lambda m, x: m.encode(x), model),
        eqx.Partial(model.encode, shift=1.0),
    ):
        adapted = lorax.loraify(holder, rank=2, key=getkey())
        assert len(weights(adapted)) == 3
        assert_close(adapted(x), holder(x))
        adapted = trained(adapted)
        assert abs(adapted(x) - holder(x)).max() > 1e-3
        assert_close(lorax.unloraify(adapted)(x), adapted(x))
        assert_identical(lorax.unloraify(adapted, merge=False), holder)
    holder = {"f": [model, (Encoder(mlp(getkey())).encode, None)], "n": 3, "s": "x"}
    adapted = lorax.loraify(holder, "layers", rank=2, key=getkey())
    assert len(weights(adapted)) == 6
    assert adapted["n"] == 3 and adapted["s"] == "x"


@pytest.mark.own_errors
def test_jitted_models_are_opaque(getkey):
    jitted = eqx.filter_jit(mlp(getkey()))
    with pytest.raises(ValueError, match="filter_jit.*adapt"):
        lorax.loraify(jitted, key=getkey())


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key):
        keys = jr.split(key, 2)
        embedding = eqx.nn.Embedding(7, 4, key=keys[0])
        head = eqx.nn.Linear(4, 7, use_bias=False, key=keys[1])
        self.shared = eqx.nn.Shared(
            (embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )

    def __call__(self, i):
        embedding, head = self.shared()
        return head(embedding(i))


def test_shared_weights_stay_shared(getkey):
    model = Tied(getkey())
    adapted = lorax.loraify(
        {"model": model, "other": eqx.nn.Linear(4, 4, key=getkey())},
        [eqx.nn.Embedding, "other"],
        rank=2,
        key=getkey(),
    )["model"]
    assert len(weights(adapted)) == 1
    assert_close(adapted(3), model(3))
    adapted = trained(adapted)
    embedding, head = adapted.shared()
    assert head.weight.b is embedding.weight.b
    assert head.weight.w is embedding.weight.w
    merged = lorax.unloraify(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(merged(3), adapted(3))
    gradient = lorax.filter_grad(lambda m: m(3).sum())(adapted)
    (found,) = weights(gradient)
    assert found.a.any() and found.b.any()


@pytest.mark.own_errors
def test_naming_a_placeholder_names_its_owner(getkey):
    model = Tied(getkey())
    with pytest.raises(ValueError, match="owner: 'shared.pytree.0.weight'"):
        lorax.loraify(model, eqx.nn.Linear, rank=2, key=getkey())
    with pytest.raises(ValueError, match="and there is none"):
        lorax.loraify(model, rank=2, key=getkey())


def test_one_object_in_two_places(getkey):
    linear = eqx.nn.Linear(4, 4, key=getkey())
    model = [linear, eqx.nn.Linear(4, 4, key=getkey()), linear]
    with pytest.warns(UserWarning, match=r"2\.weight is also 0\.weight.*Shared"):
        adapted = lorax.loraify(model, rank=2, key=getkey())
    assert (adapted[0].weight.a == adapted[2].weight.a).all()
    assert not (adapted[0].weight.a == adapted[1].weight.a).any()
    assert adapted[0].weight.w is adapted[2].weight.w is linear.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorax.loraify(model, "0", rank=2, key=getkey())


@pytest.mark.parametrize(
    "make",
    (
        lambda key: eqx.nn.Linear(5, 7, key=key),
        lambda key: eqx.nn.Conv2d(3, 5, 3, key=key),
    ),
)
def test_weight_norm(make, getkey):
    model = {"layer": eqx.nn.WeightNorm(make(getkey()))}
    x = (
        jnp.ones(5)
        if isinstance(model["layer"].layer, eqx.nn.Linear)
        else jnp.ones((3, 4, 4))
    )
    for filter in (None, "layer", eqx.nn.WeightNorm):
        adapted = lorax.loraify(model, filter, rank=2, key=getkey())
        assert type(adapted["layer"]) is lorax.LoraModule
        assert isinstance(adapted["layer"].layer.weight, lorax.LoraWeight)
        assert_close(run(adapted["layer"], x), run(model["layer"], x))
    adapted = trained(adapted)
    merged = lorax.unloraify(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(run(adapted["layer"], x), run(merged["layer"], x))
    assert abs(run(adapted["layer"], x) - run(model["layer"], x)).max() > 1e-3
    assert_identical(lorax.unloraify(adapted, merge=False), model)


def test_spectral_norm(getkey):
    model, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        eqx.nn.Linear(5, 7, key=getkey()), "weight", key=getkey()
    )
    adapted = trained(lorax.loraify(model, rank=2, key=getkey()))
    assert type(adapted) is lorax.LoraModule
    call = eqx.filter_jit(lambda model, x, state: model(x, state)[0])
    x = jnp.ones(5)
    assert_close(call(adapted, x, state), call(lorax.unloraify(adapted), x, state))
    assert eqx.nn.inference_mode(adapted).inference is True
    assert adapted.inference is False


class Named(eqx.nn.Linear):
    name: str = "layer"


class Doubled(eqx.nn.Linear):
    """Overrides the weight that its parent reads."""

    half: jax.Array

    def __init__(self, *, key):
        plain = eqx.nn.Linear(4, 3, key=key)
        self.half = plain.weight
        self.bias = plain.bias
        self.in_features, self.out_features, self.use_bias = 4, 3, True

    @property
    def weight(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return 2 * self.half


class WithDropout(eqx.nn.Linear):
    dropout: eqx.nn.Dropout

    def __init__(self, *, key):
        super().__init__(4, 3, key=key)
        self.dropout = eqx.nn.Dropout(0.5, inference=True)


class Padded(eqx.nn.Conv1d):
    """Overrides a method that its parent calls."""

    def _nonzero_pad(self, x):
        return jnp.pad(x, ((0, 0), (1, 1)), constant_values=1.0)


class Shouting(eqx.nn.Embedding):
    pass


class Scaled(eqx.nn.Embedding):
    def __call__(self, x, *, key=None):
        return 3 * self.weight[x]


SUBCLASSES = {
    "with a field": (lambda key: Named(4, 3, key=key), None, lorax.LoraLinear),
    "with arrays": (lambda key: WideLinear(4, None, key=key), None, lorax.LoraLinear),
    "its own arrays": (
        lambda key: WideLinear(4, None, key=key),
        "layer.extra",
        lorax.LoraModule,
    ),
    "arrays of both": (
        lambda key: WideLinear(4, None, key=key),
        ["weight", "extra"],
        lorax.LoraLinear,
    ),
    "with a weight that is computed": (
        lambda key: Doubled(key=key),
        "layer.half",
        lorax.LoraModule,
    ),
    "with dropout of its own": (
        lambda key: WithDropout(key=key),
        None,
        lorax.LoraModule,
    ),
    "with its own call": (lambda key: SubLinear(4, 3, key=key), None, lorax.LoraModule),
    "with its own padding": (
        lambda key: Padded(4, 3, 3, padding_mode="REFLECT", key=key),
        None,
        lorax.LoraModule,
    ),
    "of a transposed convolution": (
        lambda key: type("Up", (eqx.nn.ConvTranspose1d,), {})(4, 3, 3, key=key),
        None,
        lorax.LoraConv,
    ),
    "of an embedding": (
        lambda key: Shouting(5, 4, key=key),
        "layer",
        lorax.LoraEmbedding,
    ),
    "of an embedding, with its own call": (
        lambda key: Scaled(5, 4, key=key),
        "layer",
        lorax.LoraModule,
    ),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses(name, getkey, tmp_path):
    make, filter, layer = SUBCLASSES[name]
    model = {"layer": make(getkey())}
    adapted = lorax.loraify(model, filter, rank=2, key=getkey())
    assert type(adapted["layer"]) is layer
    assert isinstance(adapted["layer"], type(model["layer"]))
    x = jnp.ones(4)
    if isinstance(model["layer"], eqx.nn.Embedding):
        x = jnp.array(3)
    elif not isinstance(model["layer"], eqx.nn.Linear):
        x = jnp.arange(20.0).reshape(4, 5)
    assert_close(run(adapted["layer"], x), run(model["layer"], x))
    assert_identical(lorax.unloraify(adapted, merge=False), model)

    adapted = trained(adapted)
    merged = lorax.unloraify(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert type(merged["layer"]) is type(model["layer"])
    assert_close(run(adapted["layer"], x), run(merged["layer"], x))
    if "weight" in (filter or "weight"):
        assert abs(run(adapted["layer"], x) - run(model["layer"], x)).max() > 1e-3
    if hasattr(model["layer"], "expanded"):
        assert adapted["layer"].double == 8 and adapted["layer"].width == 4
        assert_close(adapted["layer"].expanded(x), merged["layer"].expanded(x))
    if name == "with dropout of its own":
        assert adapted["layer"].dropout.p == 0.5
    lorax.save_adapter(tmp_path / "a", adapted)
    loaded = lorax.load_adapter(tmp_path / "a", model)
    assert_identical(loaded, adapted)


@pytest.mark.own_errors
def test_a_weight_that_is_computed_is_passed_over(getkey):
    model = [Doubled(key=getkey()), eqx.nn.Linear(4, 4, key=getkey())]
    with pytest.warns(UserWarning, match="0 has no `weight`.*it has 0.half, to be n"):
        assert len(weights(lorax.loraify(model, rank=2, key=getkey()))) == 1
    with pytest.raises(ValueError, match="0 has no `weight`.*it has 0.half"):
        lorax.loraify(model, "0", rank=2, key=getkey())


class Rectified(eqx.Module):
    """Uses its weight in a way that a factored one does not support."""

    weight: jax.Array

    def __call__(self, x):
        return jnp.maximum(self.weight, 0) @ x


@pytest.mark.own_errors
def test_materialises_with_a_warning(getkey):
    adapted = lorax.loraify(
        [Rectified(jr.normal(getkey(), (5, 4)))], Rectified, rank=2, key=getkey()
    )
    adapted = trained(adapted)[0]
    x = jnp.ones(4)
    with pytest.warns(lorax.MaterialiseWarning, match=r"`max`.*\(5, 4\)") as caught:
        out = adapted(x)
    assert caught[0].filename == __file__
    assert_close(out, lorax.unloraify(adapted)(x))
    with pytest.raises(TypeError):
        lorax.loraify([SubLinear(4, 4, key=getkey())], SubLinear, rank=2, key=getkey())[
            0
        ](x, "an argument too many")


def test_scan_over_stacked_layers(getkey):
    """Plain `lax.scan` works over the layers of a stack, as over plain ones."""

    class Layer(eqx.Module):
        linear: eqx.nn.Linear
        own: OwnLinear

        def __call__(self, x):
            return jnp.tanh(self.own(self.linear(x)))

    def make(key):
        return Layer(eqx.nn.Linear(4, 4, key=key), OwnLinear(4, 4, key=key))

    layers = eqx.filter_vmap(make)(jr.split(getkey(), 3))
    rank = {"kernel": lorax.LoraSpec(2, (1,), (2,), (0,)), "*": 2}
    adapted = lorax.loraify(layers, ["linear", "kernel"], rank=rank, key=getkey())
    adapted = trained(adapted)
    assert adapted.linear.weight.a.shape == (3, 2, 4)

    def through(layers, x):
        return jax.lax.scan(lambda x, layer: (layer(x), None), x, layers)[0]

    x = jnp.ones(4)
    assert_close(through(adapted, x), through(lorax.unloraify(adapted), x))
    gradient = lorax.filter_grad(lambda layers, x: through(layers, x).sum())
    found = gradient(adapted, x)
    assert found.linear.weight.a.shape == (3, 2, 4)

    unrolled = x
    for i in range(3):
        unrolled = jax.tree.map(lambda x: x[i], adapted)(unrolled)  # noqa: B023
    assert_close(through(adapted, x), unrolled)


def test_scan_does_not_save_the_frozen_weights(getkey):
    """The residuals of the backward pass are activations only. With `x @ w.T` they
    would have a transposed copy of every frozen weight."""
    n, layers = 64, 6
    model = eqx.filter_vmap(lambda key: eqx.nn.Linear(n, n, key=key))(
        jr.split(getkey(), layers)
    )
    adapted = lorax.loraify(model, rank=2, key=getkey())
    params, frozen = lorax.partition(adapted)

    def loss(params, frozen, xs):
        stack = eqx.combine(params, frozen)
        step = lambda xs, layer: (jnp.tanh(jax.vmap(layer)(xs)), None)  # noqa: E731
        return jax.lax.scan(step, xs, stack)[0].sum()

    grad = jax.jit(jax.grad(loss))
    compiled = grad.lower(params, frozen, jnp.ones((4, n))).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 0.5 * layers * n * n * 4


def test_model_of_many_layers(getkey):
    model = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(3)] * 100
    with pytest.warns(UserWarning, match="and 2|Shared"):
        adapted = lorax.loraify(model, rank=2, key=getkey())
    assert len(weights(adapted)) == 300


def test_traced(getkey):
    """Inside `jit`, and on abstract models."""
    model = mlp(getkey())
    key = getkey()
    make = lambda model, key: lorax.loraify(model, rank=2, key=key)  # noqa: E731
    assert_close(
        jax.tree.leaves(eqx.filter(eqx.filter_jit(make)(model, key), eqx.is_array)),
        jax.tree.leaves(eqx.filter(make(model, key), eqx.is_array)),
    )
    abstract = eqx.filter_eval_shape(make, model, key)
    assert abstract.layers[0].weight.a.shape == (2, 4)
    adapted = trained(make(model, key))
    merged = eqx.filter_jit(lorax.unloraify)(adapted)
    assert_close(merged(jnp.ones(4)), adapted(jnp.ones(4)))


def test_dropout(getkey):
    model = eqx.nn.Linear(64, 8, key=getkey())
    adapted = trained(lorax.loraify(model, rank=4, dropout=0.5, key=getkey()))
    x, key = jnp.ones(64), getkey()
    inference = eqx.nn.inference_mode(adapted)
    without = lorax.unloraify(adapted)(x)
    assert_close(inference(x), without)
    dropped = adapted(x, key=key)
    assert_close(eqx.nn.inference_mode(inference, False)(x, key=key), dropped)
    assert abs(dropped - without).max() > 1e-3
    assert (dropped == adapted(x, key=key)).all()
    assert (dropped != adapted(x, key=getkey())).any()
    # Only the low-rank branch has dropout, scaled to the same mean.
    many = jax.vmap(lambda key: adapted(x, key=key))(jr.split(getkey(), 4000))
    deviation = many.std(0) / np.sqrt(4000)
    assert (abs(many.mean(0) - without) < 5 * deviation).all()
    kept = eqx.nn.Dropout(0.5)(x, key=key)
    weight = adapted.weight
    expected = model(x) + weight.scale * weight.b @ (weight.a @ kept)
    assert_close(dropped, expected)
    assert type(lorax.unloraify(adapted)) is eqx.nn.Linear


def test_dropout_in_a_convolution(getkey):
    model = eqx.nn.Conv2d(3, 5, 3, padding=1, padding_mode="REFLECT", key=getkey())
    adapted = trained(lorax.loraify(model, rank=2, dropout=0.5, key=getkey()))
    x, key = jr.normal(getkey(), (3, 6, 6)), getkey()
    kept = eqx.nn.Dropout(0.5)(x, key=key)
    delta = lorax.unloraify(adapted)
    expected = model(x) + delta(kept) - model(kept)
    assert_close(adapted(x, key=key), expected)
    with pytest.raises(ValueError, match="`key=None`.*inference_mode"):
        adapted(x)


def test_replacing_dropout_on_stacking(getkey):
    model = eqx.nn.Linear(8, 8, key=getkey())
    once = lorax.loraify(model, rank=2, dropout=0.5, key=getkey())
    twice = lorax.loraify(once, rank=2, nested=True, key=getkey())
    assert twice.dropout is None
    assert_close(twice(jnp.ones(8)), model(jnp.ones(8)))

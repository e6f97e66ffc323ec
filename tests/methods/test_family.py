"""Every method in every kind of layer: one table of methods, many properties."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from definitions import DEFINITIONS, form_dense
from family_table import (
    adapt,
    batched,
    DENSE,
    make_model,
    run_stack,
    TABLE,
    TARGETS,
    train,
    VARIATIONS,
    without_adapters,
    X,
)
from helpers import (
    assert_close,
    assert_identical,
    assert_no_dense,
    call64,
    is_inexact,
    run,
    weights,
    wide,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax
from eqx_lorax._methods import list_methods


def _parametrised(heavy):
    params = [
        pytest.param(name, marks=[pytest.mark.heavy] if name in heavy else [])
        for name in TABLE
    ]
    return pytest.mark.parametrize("name", params)


EVERY = _parametrised(VARIATIONS)
# The README's test command has the definitions for each method, and what follows from
# them for a few: a start that changes the base, a gain, frozen factors, no factors.
FEW = _parametrised([*{*TABLE} - {"lora", "pissa", "dora", "lora_xs", "ia3"}])


def test_the_table_is_whole():
    abstract = eqx.filter_eval_shape(_all_weights)
    own = {kind.method for kind in map(type, abstract)}
    known = {
        method
        for method, (kind,) in list_methods().items()
        if kind.__module__.startswith("eqx_lorax.")
    }
    assert own == known == set(DEFINITIONS)


def _all_weights():
    return [weights(adapt(name, make_model(), "linear"))[0] for name in TABLE]


@FEW
def test_starts_as_its_base(name):
    model = make_model()
    adapted = adapt(name, model)
    assert len(weights(adapted)) == len(TARGETS)
    assert_close(run(batched, adapted, X), run(batched, model, X), 2e-6)
    assert_identical(lorax.unloraify(adapted, merge=False), model)
    trained = train(adapted)
    assert_identical(lorax.unloraify(trained, merge=False), model)
    for weight in weights(trained):
        assert_close(run(lambda x: x.materialise(), weight), form_dense(weight))


@EVERY
def test_values_and_gradients(name):
    """Compiled, over a batch, against the definitions in float64."""
    params, frozen = lorax.partition(train(adapt(name, make_model())))
    assert all(
        not jax.tree.leaves([getattr(x, field) for field in x.frozen])
        for x in weights(params)
    )

    def loss(params, frozen, x):
        return jnp.sum(batched(lorax.combine(params, frozen), x) ** 2)

    def defined(params, frozen, x):
        model = without_adapters(lorax.combine(params, frozen))
        return jnp.sum(batched(model, x) ** 2)

    found = eqx.filter_jit(jax.value_and_grad(loss))(params, frozen, X)
    expected = call64(jax.value_and_grad(defined), params, frozen, X)
    assert_close(found, expected, 2e-5)
    assert all(np.any(x) for x in jax.tree.leaves(found))
    if name not in DENSE:
        assert_no_dense(jax.grad(loss), params, frozen, X, of=frozen)


@FEW
def test_files_and_merging(name, tmp_path):
    model = make_model()
    trained = train(adapt(name, model))
    lorax.save_adapter(tmp_path / "a.safetensors", trained)
    loaded = lorax.load_adapter(tmp_path / "a.safetensors", model)
    assert_identical(loaded, trained)
    merged = lorax.unloraify(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_close(run(batched, merged, X), run(batched, trained, X))


@pytest.mark.heavy
@EVERY
def test_bfloat16(name):
    """Wide factors on a narrow base: the update is not rounded before it is added."""
    model = make_model(jnp.bfloat16)
    adapted = adapt(name, model)
    out, plain = run(batched, adapted, X), run(batched, model, X)
    assert out.dtype == plain.dtype == jnp.bfloat16
    assert_close(out, plain, 2e-2)
    for weight in weights(train(adapted)):
        params = eqx.filter(weight, weight.trainable())
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        exact = wide(call64(form_dense, weight))
        rounded = wide(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
        found = run(lambda x: x.materialise(), weight)
        assert found.dtype == jnp.bfloat16
        # Where the exact sum is halfway between two numbers, either is right.
        assert np.mean(wide(found) == rounded) > 0.95
        assert_close(found, rounded, 1e-2)


@EVERY
def test_trees_of_parameters(name):
    """The function door, with the kernel `(in, out)` of Flax."""
    tree = {"w": np.asarray(jr.normal(jr.key(0), (4, 6)))}
    options = {"method": "lora", **TABLE[name]}
    spec = lorax.LoraSpec(options.pop("rank", 2), alpha=options.pop("alpha", None))
    if options.pop("rank_stabilised", False):
        spec = lorax.LoraSpec(spec.rank, alpha=spec.alpha, rank_stabilised=True)
    params = lorax.init_lora(tree, spec, jr.key(1), **options)
    x = jr.normal(jr.key(2), (3, 4))
    fn = lorax.lora(lambda p, x: x @ p["w"])
    assert_close(fn(params, x), x @ tree["w"])
    trained = train(params)
    assert_close(run(fn, trained, x), wide(x) @ wide(form_dense(trained["w"])))
    back = run(
        lorax.lora(lambda p, x: x @ p["w"].T), trained, x @ jnp.asarray(tree["w"])
    )
    assert_close(back, wide(x @ tree["w"]) @ wide(form_dense(trained["w"])).T)


@pytest.mark.heavy
@pytest.mark.eight_devices
@EVERY
def test_shards(name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = {"linear": P("data", "model"), "layers": P(None, "model")}

    def place(path, x):
        field = path[0].name if hasattr(path[0], "name") else ""
        is_matrix = getattr(x, "ndim", 0) >= 2
        sharding = NamedSharding(mesh, spec.get(field, P()) if is_matrix else P())
        return jax.device_put(x, sharding) if eqx.is_array(x) else x

    model = make_model()
    sharded = jax.tree_util.tree_map_with_path(place, model)
    adapted, single = adapt(name, sharded), adapt(name, model)
    for x, y in zip(jax.tree.leaves(adapted), jax.tree.leaves(single)):
        assert not eqx.is_array(x) or len(x.devices()) == 8
    if "pissa" not in name and name not in ("milora", "lora_xs", "olora"):
        # Decompositions have signs, and small singular values, that may differ.
        assert_close(
            *(jax.tree.leaves(eqx.filter(x, is_inexact)) for x in (adapted, single))
        )
    trained = train(adapted)
    on_one = run(_run_sharded, to_host(trained), X)
    assert_close(run(_run_sharded, trained, X), on_one)


def _run_sharded(model, x):
    # XLA cannot partition the convolution with groups, not even without adapters.
    def of_one(x):
        return run_stack(model.layers, model.linear(model.table(x))[2:])

    return jax.vmap(of_one)(x)


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", ["pissa", "dora", "vera", "loha", "lora_xs", "ia3"])
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, "model")], ids=str)
def test_explicit_axes(name, spec):
    """Shardings in types, which JAX does not complete by itself."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    plain = eqx.nn.Linear(6, 8, use_bias=False, key=jr.key(5))
    x = jnp.linspace(-1, 1, 30).reshape(5, 6)

    @eqx.filter_jit
    @lorax.filter_value_and_grad
    def loss(model, x):
        return jnp.sum(jax.vmap(model)(x) ** 2)

    with jax.set_mesh(mesh):
        w = jax.device_put(plain.weight, NamedSharding(mesh, spec))
        sharded = eqx.tree_at(lambda layer: layer.weight, plain, w)
        trained = train(adapt(name, sharded, None))
        found = loss(trained, jax.device_put(x, NamedSharding(mesh, P())))
        assert_close(trained.weight.materialise(), form_dense(to_host(trained.weight)))
    assert_close(found, loss(to_host(trained), x), 2e-5)


def to_host(model):
    # So that nothing but the numbers is left of the mesh.
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x)) if eqx.is_array(x) else x, model
    )


# Properties of single weights, which nothing has to be compiled for


LINEAR = eqx.nn.Linear(6, 8, key=jr.key(5))
VECTOR = jnp.linspace(-1, 1, 6)

# A difference from the start, or a norm, is not scaled with what is trained.
NOT_SCALED = ("pissa", "randomised pissa", "olora", "milora", "dora", "dora from pissa")


@EVERY
def test_is_scaled_or_says_why_not(name):
    trained = train(adapt(name, LINEAR, None))
    if name in NOT_SCALED:
        with pytest.raises(TypeError, match="as_lora"):
            lorax.scale(trained, 0.5)
        return
    params, frozen = lorax.partition(trained)
    for half in (
        lorax.scale(trained, 0.5),
        lorax.combine(lorax.scale(params, 0.5), frozen),
    ):
        change = wide(form_dense(half.weight)) - wide(LINEAR.weight)
        expected = 0.5 * (wide(form_dense(trained.weight)) - wide(LINEAR.weight))
        assert_close(change, expected, 2e-6)


@EVERY
def test_stacks_with_the_base_alone_or_says_why_not(name):
    one, two = (train(adapt(name, LINEAR, None), seed) for seed in (0, 1))
    (first, frozen), (second, _) = (lorax.partition(x) for x in (one, two))
    picked = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    both = lorax.stack([first, second])
    for i, model in enumerate((one, two)):
        found = lorax.combine(picked(both, i), frozen)
        assert_close(found(VECTOR), model(VECTOR), 1e-6)
    bank = lorax.AdapterBank([first, second])
    assert_close(lorax.combine(bank[1], frozen)(VECTOR), two(VECTOR), 1e-6)
    traced = lorax.combine(bank[jnp.asarray(1)], frozen)
    assert_close(traced(VECTOR), two(VECTOR), 1e-6)
    missing = lorax.combine(bank[jnp.asarray(7)], frozen)(VECTOR)
    if name in NOT_SCALED:
        # There are no numbers that add nothing, so there are none at all.
        assert np.isnan(missing).all()
        with pytest.raises(TypeError, match="base alone.*cannot be stacked"):
            lorax.stack([first, None])
        return
    assert_close(missing, LINEAR(VECTOR), 1e-6)
    third = picked(lorax.stack([first, second, None]), 2)
    assert_close(lorax.combine(third, frozen)(VECTOR), LINEAR(VECTOR), 1e-6)


@EVERY
def test_fuses_nests_and_is_counted(name):
    trained = train(adapt(name, LINEAR, None))
    assert_close(lorax.merged_forward(trained)(VECTOR), trained(VECTOR), 1e-5)
    twice = lorax.loraify(trained, nested=True, rank=2, key=jr.key(7))
    assert_close(twice(VECTOR), trained(VECTOR), 1e-6)
    over = lorax.loraify(LINEAR, rank=1, key=jr.key(8))
    over = eqx.tree_at(lambda x: x.weight.b, over, 0.1 + over.weight.b)
    assert_close(adapt(name, over, None, nested=True)(VECTOR), over(VECTOR), 1e-5)
    params, _ = lorax.partition(trained)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert lorax.summary(trained).trained == lorax.summary(params).trained == count
    assert (
        lorax.summary(trained).targets[0].rank == lorax.summary(params).targets[0].rank
    )
    assert_identical(lorax.attach(adapt(name, LINEAR, None), params), trained)
    abstract = adapt(name, eqx.filter_eval_shape(lambda: LINEAR), None)
    shapes = [
        [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        for tree in (abstract, trained)
    ]
    assert shapes[0] == shapes[1]
    method = weights(trained)[0].method
    assert lorax.summary(trained).targets[0].method == method
    assert (f" {method} " in str(lorax.summary(trained))) == (method != "lora")


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_dropout_of_dora(kind):
    """The base sees every input, and the change of its magnitude is dropped too."""
    layer, x = LINEAR, VECTOR
    if kind == "convolution":
        layer = eqx.nn.Conv1d(2, 6, 3, padding=1, key=jr.key(0))
        x = jr.normal(jr.key(1), (2, 5))
    adapted = lorax.loraify(layer, method="dora", rank=2, dropout=0.5, key=jr.key(1))
    trained = train(adapted)
    found = trained(x, key=jr.key(2))
    dropped = eqx.nn.Dropout(0.5)(x, key=jr.key(2))
    assert np.any(dropped == 0) and np.any(dropped != 0)

    def multiply(weight, x):
        plain = eqx.tree_at(lambda x: x.weight, layer, jnp.asarray(weight))
        return plain(x) - plain(0 * x)

    dense = form_dense(trained.weight)
    expected = layer(x) + multiply(dense, dropped) - multiply(layer.weight, dropped)
    assert_close(found, expected)


# What users get wrong


@pytest.mark.own_errors
@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(method="dorra"), ValueError, "Did you mean 'dora'"),
        (
            dict(method="lokr", decompose_facto=2),
            TypeError,
            "here it is `decompose_factor`",
        ),
        (dict(method="dora", seed=2), TypeError, "'dora' takes none"),
        (dict(decompose_both=True), TypeError, "'lora' takes none"),
        (dict(rnak=2), TypeError, "here it is `rank`"),
        (dict(method="tokens"), TypeError, "needs the option `indices`"),
        (dict(method="tokens", indices=[8]), ValueError, "from 0 to 7.*append them"),
        (dict(method="tokens", indices=[1, 1]), ValueError, "different rows"),
        (dict(method="segments", parts=3, segments=[0]), ValueError, "does not divide"),
        (dict(method="segments", parts=2, segments=[2]), ValueError, "from 0 to 1"),
        (dict(method="ia3"), ValueError, "with a bias.*scale_inputs=True"),
        (dict(init="pisa"), ValueError, "Did you mean 'pissa'"),
        (dict(init="pissa", method="lora_fa"), ValueError, "'lora' and 'dora' can"),
        (dict(init="orthogonal", method="loha"), ValueError, "start for the methods"),
        (dict(init="orthogonal", rank=3), ValueError, "needs an even rank"),
        (dict(method="relative_lora"), ValueError, "pass `init='pissa'`"),
        (dict(lora_alpha=2), TypeError, "here it is `alpha`"),
    ],
)
def test_errors_end_with_the_fix(options, error, message):
    with pytest.raises(error, match=message):
        lorax.loraify(LINEAR, key=jr.key(0), **{"rank": 2, **options})


def test_methods_by_pattern():
    model = make_model()
    adapted = lorax.loraify(
        model,
        ["table", "linear", "layers"],
        method={"table": "tokens", "layers": lorax.DoraWeight},
        rank=2,
        indices=[4],
        key=jr.key(0),
    )
    kinds = [type(x) for x in weights(adapted)]
    assert kinds == [lorax.TokensWeight, lorax.LoraWeight, lorax.DoraWeight]


def test_a_scale_that_is_no_factor_is_not_dropped():
    adapted = adapt("dora", LINEAR, None)
    with pytest.raises(ValueError, match="for LoRA, and there is a DoraWeight"):
        lorax.merge_params(adapted, use_scaling=False)


def test_methods_by_pattern_of_parameters():
    tree = {"down": {"w": jnp.ones((4, 6))}, "up": [jnp.ones((6, 4)), jnp.ones(4)]}
    spec = {"down": {"w": 2}, "up": [2, lorax.LORA_FREEZE]}
    make = lambda method: lorax.init_lora(tree, spec, jr.key(0), method=method)  # noqa: E731
    params = make({"up": "dora"})
    assert [type(x) for x in weights(params)] == [lorax.LoraWeight, lorax.DoraWeight]
    with pytest.raises(ValueError, match="'upp'.*Did you mean 'up'"):
        make({"upp": "dora"})
    with pytest.raises(TypeError, match="here it is `seed`"):
        lorax.init_lora(tree, spec, jr.key(0), method={"up": "vera"}, sed=3)


def test_outputs_without_inputs():
    """DoRA of rows of zeros, whose norm is zero: no NaN, and they can be trained."""
    layer = eqx.tree_at(lambda x: x.weight, LINEAR, LINEAR.weight.at[2].set(0))
    adapted = lorax.loraify(layer, method="dora", rank=2, key=jr.key(0))
    assert_close(adapted(VECTOR), layer(VECTOR), 1e-6)
    gradient = lorax.filter_grad(lambda model: jnp.sum(model(VECTOR) ** 2))(adapted)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_vera_does_not_depend_on_configuration():
    """One seed is one pair of factors: in float64, below `jit`, for all sizes."""
    weight = adapt("vera", LINEAR, None).weight
    expected = [wide(x) for x in weight._random_factors()]
    wider = lorax.loraify(
        eqx.nn.Linear(6, 16, key=jr.key(0)),
        method="vera",
        rank=3,
        seed=3,
        key=jr.key(1),
    ).weight
    beginning = wide(wider._random_factors()[0])[:8, :2] * (3 / 2) ** 0.5
    assert_close(beginning, expected[0], 1e-6)
    with jax.enable_x64(True), jax.threefry_partitionable(False):
        found = jax.jit(lambda: weight._random_factors())()
        for x, y in zip(found, expected):
            assert_identical(wide(x), y)
    bound = (6 / 2) ** 0.5
    assert bound * 0.8 < np.abs(expected[0]).max() <= bound

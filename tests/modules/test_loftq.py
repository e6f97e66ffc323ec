"""Adapters that start from what quantising has rounded away, and what is left of an
adapter in weights that are quantised again."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_identical, trained, weights, wide

import eqx_lorax as lorax


LINEAR = eqx.nn.Linear(48, 32, key=jr.key(0))
SMALL = eqx.nn.Linear(8, 8, key=jr.key(0))
FORMATS = {
    "nf4": dict(format="nf4", block=16),
    "int4": dict(format="int4", block=16, nested=True),
    "int8": dict(format="int8"),
}


def adapt(model, targets=None, **options):
    return lorax.loraify(model, targets, **{"rank": 4, "key": jr.key(1), **options})


def find_error(model, original=LINEAR):
    return lorax.quantisation_error(model, original).worst


def decompose(w, rank):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("format", FORMATS)
def test_steps_are_those_of_the_paper(format):
    """Algorithm 1 of LoftQ, with NumPy but for the quantised arrays themselves."""
    options = FORMATS[format]
    adapted = adapt(LINEAR, alpha=3)
    product = 0
    for steps in (1, 2, 3):
        rest = eqx.tree_at(
            lambda x: x.weight, LINEAR, jnp.asarray(LINEAR.weight - product, "float32")
        )
        base = lorax.quantise(rest, **options).weight.dequantise()
        product = decompose(wide(LINEAR.weight) - wide(base), 4)
        weight = lorax.quantise(adapted, **options, loftq=steps).weight
        assert type(weight) is lorax.LoraWeight and weight.alpha == 3
        # A weight between two codes may go to either.
        is_same = np.isclose(wide(weight.w.dequantise()), wide(base), atol=1e-4)
        assert is_same.mean() > 0.99
        found = weight.scale * wide(weight.b) @ wide(weight.a)
        assert_close(found, product, 2e-2)
        sizes = [np.linalg.norm(wide(x)) for x in (weight.b, weight.a)]
        assert_close(*sizes, 1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_each_step_comes_nearer(format):
    options = FORMATS[format]
    plain = lorax.quantise(LINEAR, **options)
    start = adapt(plain, init=lorax.LoftQ(LINEAR))
    assert_identical(start.weight.w, plain.weight)
    adapted = adapt(LINEAR)
    errors = [find_error(plain)]
    errors += [find_error(lorax.quantise(adapted, **options, loftq=i)) for i in (1, 3)]
    assert errors[0] > 1.1 * errors[1] > errors[1] > 1.02 * errors[2]
    # One step, without a change of the base.
    assert_close(find_error(start), errors[1], 1e-5)


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_factors_that_do_not_start_at_zero(init):
    """QPiSSA: the base has what they leave, and they are trained as they started."""
    adapted = adapt(LINEAR, init=init, alpha=2)
    weight = lorax.quantise(adapted, block=16, loftq=1).weight
    assert type(weight) is lorax.LoraWeight
    assert_identical((weight.b, weight.a), (adapted.weight.b, adapted.weight.a))
    product = weight.scale * weight.b @ weight.a
    rest = eqx.tree_at(lambda x: x.weight, LINEAR, LINEAR.weight - product)
    expected = lorax.quantise(rest, block=16).weight.dequantise()
    is_same = np.isclose(wide(weight.w.dequantise()), wide(expected), atol=1e-5)
    assert is_same.mean() > 0.99
    errors = [
        find_error(lorax.quantise(adapted, block=16, loftq=steps)) for steps in (1, 2)
    ]
    assert errors[0] > errors[1]
    if init == "pissa":
        assert find_error(lorax.quantise(LINEAR, block=16)) > errors[0]
    # Without steps the adapter adds nothing, as ever.
    as_ever = lorax.quantise(adapted, block=16)
    assert type(as_ever.weight) is lorax.RelativeLoraWeight
    plain = lorax.quantise(LINEAR, block=16)
    assert_close(find_error(as_ever), find_error(plain), 1e-4)


class Model(eqx.Module):
    table: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    layers: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.table = eqx.nn.Embedding(24, 16, key=keys[0])
        self.conv = eqx.nn.Conv1d(8, 16, 3, key=keys[1])
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(
            jr.split(keys[2], 3)
        )
        self.head = eqx.nn.Linear(16, 8, key=keys[3])


ADAPTED = ["table", "conv", "layers"]


@pytest.mark.heavy
def test_every_kind_of_layer():
    model = Model(jr.key(0))
    targets = [*ADAPTED, "head"]
    plain = lorax.quantise(model, targets, block=8)
    fitted = lorax.quantise(adapt(model, ADAPTED), targets, block=8, loftq=2)
    start = adapt(plain, ADAPTED, init=lorax.LoftQ(model))
    assert [type(x) for x in weights(fitted)] == [lorax.LoraWeight] * 3
    assert_identical(fitted.head, plain.head)
    before, once, twice = (
        {x.path: x.error for x in lorax.quantisation_error(x, model).targets}
        for x in (plain, start, fitted)
    )
    for path in before:
        if path == "head.weight":
            assert before[path] == once[path] == twice[path]
        else:
            assert before[path] > once[path] > twice[path]
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    abstract = eqx.filter_eval_shape(lambda: adapt(model, ADAPTED))
    planned = lorax.quantise(abstract, targets, block=8, loftq=2)
    arrays = [eqx.filter(x, lambda x: hasattr(x, "dtype")) for x in (planned, fitted)]
    assert shapes(arrays[0]) == shapes(arrays[1])


def test_trees_of_parameters():
    tree = {"w": jr.normal(jr.key(0), (32, 16)), "bias": jnp.ones(16)}
    spec = {"w": 4, "bias": lorax.LORA_FREEZE}
    plain = lorax.quantise(tree, block=16)
    fitted = lorax.quantise(lorax.init_lora(tree, spec, jr.key(1)), block=16, loftq=3)
    start = lorax.init_lora(plain, spec, jr.key(1), init=lorax.LoftQ(tree))
    errors = [find_error(x, tree) for x in (plain, start, fitted)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.heavy
@pytest.mark.eight_devices
def test_sharded_models():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec("data", "model")
    )
    sharded = eqx.tree_at(
        lambda x: x.weight, LINEAR, jax.device_put(LINEAR.weight, sharding)
    )
    found, expected = (
        lorax.quantise(adapt(x), block=8, loftq=2).weight for x in (sharded, LINEAR)
    )
    assert found.w.sharding == sharding
    assert found.b.sharding.spec[0] == "data" and found.a.sharding.spec[1] == "model"
    assert_close(found.materialise(), expected.materialise(), 2e-2)


# Quantising what was merged


@pytest.mark.parametrize("format", FORMATS)
def test_merged_weights_are_quantised_as_their_base_was(format):
    quantised = lorax.quantise(LINEAR, **FORMATS[format])
    again = lorax.unloraify(adapt(quantised), requantise=True)
    assert jax.tree.structure(again) == jax.tree.structure(quantised)
    assert_close(again.weight.dequantise(), quantised.weight.dequantise(), 1e-2)
    adapted = trained(adapt(quantised))
    again = lorax.unloraify(adapted, requantise=True)
    merged = lorax.unloraify(adapted)
    expected = lorax.quantise(merged, **FORMATS[format])
    assert_identical(again, expected)
    (found,) = lorax.quantisation_error(again, adapted).targets
    lost = wide(again.weight.dequantise()) - wide(merged.weight)
    update = adapted.weight.scale * wide(adapted.weight.b) @ wide(adapted.weight.a)
    sizes = [np.linalg.norm(x) for x in (lost, wide(merged.weight), update)]
    assert_close(found.error, sizes[0] / sizes[1], 1e-4)
    assert_close(found.update_error, sizes[0] / sizes[2], 1e-4)
    assert found.format == FORMATS[format]["format"] and found.path == "weight"


def test_other_layers_are_quantised_again():
    model = Model(jr.key(0))
    quantised = lorax.quantise(model, ["table", "conv"], block=8)
    adapted = trained(adapt(quantised, ADAPTED))
    again = eqx.filter_jit(lorax.unloraify)(adapted, requantise=True)
    assert jax.tree.structure(again) == jax.tree.structure(quantised)
    assert eqx.is_array(again.layers.weight)
    table = str(lorax.quantisation_error(again, adapted))
    assert (
        table.splitlines()[0].split() == "target shape format error of update".split()
    )
    assert "layers.weight  3×16×16  float32  0.00%" in table


# What users get wrong


@pytest.mark.own_errors
def test_errors_end_with_the_fix():
    quantised = lorax.quantise(LINEAR, block=16)
    for fn, error, message in [
        (
            lambda: lorax.quantise(LINEAR, block=16, loftq=2),
            ValueError,
            "no array that is named has one. Call `lorax.loraify`",
        ),
        (
            lambda: lorax.quantise(adapt(LINEAR, method="dora"), block=16, loftq=2),
            TypeError,
            "a DoraWeight at weight.*`init=lorax.LoftQ",
        ),
        (
            lambda: lorax.quantise(adapt(LINEAR), block=16, loftq=True),
            ValueError,
            "loftq=True.*such as 5",
        ),
        (
            lambda: adapt(quantised, init=lorax.LoftQ(quantised)),
            ValueError,
            "quantised too. Pass the model from before",
        ),
        (
            lambda: adapt(quantised, init=lorax.LoftQ([LINEAR])),
            ValueError,
            "has no weight, but 0.weight, 0.bias",
        ),
        (
            lambda: adapt(
                quantised, init=lorax.LoftQ(eqx.nn.Linear(8, 8, key=jr.key(0)))
            ),
            ValueError,
            r"shape \(8, 8\) in `model`, and \(32, 48\)",
        ),
        (
            lambda: lorax.unloraify(adapt(LINEAR), requantise=True),
            ValueError,
            "no adapter here has one.*`lorax.quantise`",
        ),
        (
            lambda: lorax.unloraify(adapt(quantised), merge=False, requantise=True),
            ValueError,
            "Leave out one of them",
        ),
        (
            lambda: lorax.quantisation_error(LINEAR, LINEAR),
            ValueError,
            "Call `lorax.quantise` first",
        ),
        (
            lambda: lorax.quantisation_error(quantised, [LINEAR]),
            ValueError,
            r"weight is of shape \(32, 48\) in `model` and none",
        ),
    ]:
        with pytest.raises(error, match=message):
            fn()

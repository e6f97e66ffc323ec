"""Adapters of any method as plain LoRA."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import few_cases
from helpers import (
    assert_close,
    assert_identical,
    equations,
    filled,
    run,
    weights,
    wide,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax


def train(adapted, seed=0, size=0.5):
    """The model with random numbers in its trained arrays."""
    random = np.random.default_rng(seed)
    params, frozen = lorax.partition(adapted)
    params = jax.tree.map(
        lambda x: jnp.asarray(size * random.normal(size=x.shape), x.dtype), params
    )
    return lorax.combine(params, frozen)


def make(case, method, key, **options):
    model = filled(case.make, jnp.float32, key)
    adapted = lorax.loraify(
        model, case.filter, rank=case.rank, method=method, key=key, **options
    )
    return train(adapted)


@few_cases
def test_a_product_of_factors_is_lora(case, getkey):
    adapted = make(case, "adalora", getkey())
    plain = lorax.as_lora(adapted)
    assert all(type(weight) is lorax.LoraWeight for weight in weights(plain))
    for new, old in zip(weights(plain), weights(adapted), strict=True):
        assert new.w is old.w and new.rank == case.rank
        assert_close(new.materialise(), old.materialise())
    inputs = case.inputs(jnp.float32)
    assert_close(run(plain, *inputs), run(adapted, *inputs), 1e-4)


@few_cases
def test_a_gain_at_full_rank(case, getkey):
    adapted = make(case, "dora", getkey())
    plain, errors = lorax.as_lora(adapted, 1000, return_error=True)
    for new, old in zip(weights(plain), weights(adapted), strict=True):
        assert type(new) is lorax.LoraWeight and new.w is old.w
        assert_close(new.materialise(), old.materialise())
    assert len(errors) == len(weights(plain)) and max(errors.values()) < 1e-5


class Stack(eqx.Module):
    layers: eqx.nn.Linear

    def __init__(self, key):
        make = lambda key: eqx.nn.Linear(9, 7, key=key)  # noqa: E731
        self.layers = eqx.filter_vmap(make)(jax.random.split(key, 3))


@pytest.mark.parametrize("method", ("loha", "dora", "lora"))
def test_a_smaller_rank_is_the_best_there_is(method, getkey):
    """Each layer of a stack has its own approximation; the error is that of all."""
    adapted = lorax.loraify(Stack(getkey()), rank=4, method=method, key=getkey())
    adapted = train(adapted)
    plain, errors = lorax.as_lora(adapted, rank=2, return_error=True)
    (new,), (old,) = weights(plain), weights(adapted)
    exact = wide(old.materialise()) - wide(old.w)
    u, sizes, v = np.linalg.svd(exact, full_matrices=False)
    best = (u[..., :2] * sizes[..., None, :2]) @ v[..., :2, :]
    assert new.b.shape == (3, 7, 2) and new.a.shape == (3, 2, 9)
    assert_close(new.scale * wide(new.b) @ wide(new.a), best, 1e-4)
    lost = np.linalg.norm(sizes[:, 2:]) / np.linalg.norm(sizes)
    assert np.isclose(errors["layers.weight"], lost, 1e-3)
    with pytest.warns(UserWarning, match=r"converted.*more than 1 %.*layers\.weight"):
        lorax.as_lora(adapted, rank=2)


@pytest.mark.parametrize("shape, rank", (((11, 13), 9), ((6, 20), 6), ((20, 7), 7)))
def test_the_rank_is_at_most_the_smaller_side(shape, rank, getkey):
    """LoHa of rank 3 is a product of rank 9."""
    linear = eqx.nn.Linear(shape[1], shape[0], key=getkey())
    adapted = lorax.loraify(linear, rank=3, alpha=1.5, method="loha", key=getkey())
    old = train(adapted).weight
    weight, errors = lorax.as_lora(old, return_error=True)
    assert (weight.rank, weight.scale) == (rank, 0.5)
    update = (wide(old.b1) @ wide(old.a1)) * (wide(old.b2) @ wide(old.a2))
    assert_close(weight.materialise(), wide(old.w) + 0.5 * update)
    (error,) = errors.values()
    assert error < 1e-6


def test_lora_stays_as_it_is(getkey):
    model = eqx.nn.MLP(4, 3, 6, 1, key=getkey())
    adapted = train(lorax.loraify(model, rank=2, alpha=3, key=getkey()))
    assert_identical(lorax.as_lora(adapted), adapted)
    assert_identical(lorax.as_lora(adapted, rank=2), adapted)
    fused = lorax.merged_forward(adapted)
    assert_identical(lorax.as_lora(fused), adapted)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_adapters_on_top_of_adapters_become_one(method, getkey):
    linear = eqx.nn.Linear(7, 5, key=getkey())
    inner = train(lorax.loraify(linear, rank=2, alpha=3, method=method, key=getkey()))
    both = lorax.loraify(inner, rank=1, method="adalora", nested=True, key=getkey())
    both = train(both, 1)
    options = {} if method == "lora" else {"rank": 5}
    plain = lorax.as_lora(both, **options)
    assert plain.weight.w is linear.weight
    assert plain.weight.rank == options.get("rank", 3)
    assert_close(plain.weight.materialise(), both.weight.materialise())


def test_a_gain_needs_a_rank(getkey):
    model = eqx.nn.MLP(4, 3, 6, 1, key=getkey())
    options = dict(method="ia3", scale_inputs=True)
    fresh = lorax.loraify(model, "layers.0", key=getkey(), **options)
    # Ones scale nothing, and LoRA has no rank of zero.
    (weight,) = weights(lorax.as_lora(fresh))
    assert weight.rank == 1 and not weight.b.any()
    assert_identical(weight.materialise(), fresh.layers[0].weight.w)
    with pytest.raises(
        ValueError, match=r"layers\.0\.weight is .* 'ia3'.*full rank.*`rank=4`"
    ):
        lorax.as_lora(train(fresh))


def test_parameters_and_views(getkey):
    """Trees of parameters, and weights that show their base in another order."""
    params = {"w": jnp.ones((5, 7)), "bias": jnp.zeros(5)}
    tree = lorax.init_lora(params, {"w": 2, "bias": 0}, getkey(), method="vera")
    tree = jax.tree.map(lambda x: x + 0.5, tree)
    plain = lorax.as_lora(tree)
    assert type(plain["w"]) is lorax.LoraWeight and plain["bias"] is tree["bias"]
    assert_close(plain["w"].materialise(), tree["w"].materialise())
    turned = lorax.as_lora({"w": tree["w"].T})["w"]
    assert type(turned) is lorax.LoraWeight
    assert_close(turned.materialise(), tree["w"].materialise().T)


def test_nothing_dense_is_formed(getkey):
    adapted = lorax.loraify(Stack(getkey()), rank=4, method="lora_xs", key=getkey())
    arrays, static = eqx.partition(adapted, eqx.is_array)

    def factors(arrays):
        plain = lorax.as_lora(eqx.combine(arrays, static), rank=2)
        return plain.layers.weight.b, plain.layers.weight.a

    shapes = {
        variable.aval.shape
        for equation in equations(jax.make_jaxpr(factors)(arrays).jaxpr)
        for variable in equation.outvars
    }
    assert (3, 7, 2) in shapes and (3, 7, 9) not in shapes


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded_factors(kind, getkey):
    """They are gathered for decompositions, one target at a time."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    linear = eqx.nn.Linear(6, 8, use_bias=False, key=getkey())
    single = train(lorax.loraify(linear, rank=2, key=getkey()))
    specs = {(8, 6): P("x", "y"), (8, 2): P("x"), (2, 6): P(None, "y")}
    place = lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.shape]))  # noqa: E731
    sharded = jax.tree.map(place, single)
    found, expected = (
        lorax.as_lora(model, 1, return_error=True) for model in (sharded, single)
    )
    assert_close(found[0].weight.materialise(), expected[0].weight.materialise(), 1e-4)
    assert_close(found[1], expected[1])
    spectra = [lorax.spectra(model).targets[0] for model in (sharded, single)]
    np.testing.assert_allclose(spectra[0].values, spectra[1].values, rtol=1e-5)
    pruned = [
        lorax.weighted_sum([model], [1], "ties", rank=6).weight
        for model in (sharded, single)
    ]
    assert_close(*(weight.materialise() for weight in pruned), 1e-4)


def test_files_of_peft(getkey, tmp_path):
    model = eqx.nn.MLP(4, 3, 6, 1, key=getkey())
    adapted = train(
        lorax.loraify(model, rank=2, method="ia3", scale_inputs=True, key=getkey())
    )
    names = {"layers.*": "layers.{}"}
    lorax.peft.save(tmp_path, lorax.as_lora(adapted, rank=6), names=names)
    loaded = lorax.peft.load(tmp_path, model, names=names)
    assert_close(loaded(jnp.ones(4)), adapted(jnp.ones(4)))


@pytest.mark.own_errors
def test_what_cannot_be_converted(getkey):
    model = eqx.nn.Linear(4, 3, key=getkey())
    adapted = lorax.loraify(model, rank=2, key=getkey())
    params, frozen = lorax.partition(adapted)
    with pytest.raises(ValueError, match=r"`model` has no adapters.*lorax\.loraify"):
        lorax.as_lora(model)
    for part in (params, frozen):
        with pytest.raises(ValueError, match=r"lorax\.as_lora\(lorax\.combine\(params"):
            lorax.as_lora(part)
    with pytest.raises(ValueError, match="`rank=0` must be at least 1"):
        lorax.as_lora(adapted, 0)
    for rank in (True, 1.5, {"weight": 2}):
        with pytest.raises(TypeError, match="must be an integer"):
            lorax.as_lora(adapted, rank)

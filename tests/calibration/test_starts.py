"""Starts and ranks from data, against float64 NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, dense_weight, weights, wide

import eqx_lorax as lorax


KEY = jr.key(0)


class Model(eqx.Module):
    """Two layers, of which the second sees inputs that vary less."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self):
        keys = jr.split(KEY, 2)
        self.first = eqx.nn.Linear(8, 6, key=keys[0])
        self.second = eqx.nn.Linear(6, 7, key=keys[1])

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def loss(model, xs):
    return jnp.mean(jax.vmap(model)(xs) ** 2)


XS = np.float32(np.random.default_rng(0).normal(size=(9, 8)) + 0.5)
XS *= 2.0 ** -np.arange(8, dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def calibration(model):
    return lorax.calibrate(loss, model, [XS], key=KEY, rank=3)


def adapt(model, init, **options):
    options = dict(rank=3) | options
    adapted = lorax.loraify(model, "first", init=init, key=KEY, **options)
    assert_close(jax.vmap(adapted)(XS), wide(jax.vmap(model)(XS)), 1e-5)
    return weights(adapted)[0]


@pytest.mark.parametrize("centred", [False, True])
def test_eva(model, calibration, centred):
    weight = adapt(model, calibration.eva(centred=centred))
    x = wide(XS) - (wide(XS).mean(0) if centred else 0)
    _, _, right = np.linalg.svd(x)
    assert type(weight) is lorax.LoraWeight
    assert_close(np.abs(wide(weight.a) @ right[:3].T), np.eye(3), 1e-4)
    assert not weight.b.any()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(model, calibration, mode):
    weight = adapt(model, calibration.corda(mode), alpha=6)
    w, covariance = wide(model.first.weight), wide(XS).T @ wide(XS) / len(XS)
    mean = np.trace(covariance) / 8
    damped = covariance / mean + 0.01 * np.eye(8)
    u, s, v = np.linalg.svd(w @ damped, full_matrices=False)
    v = v @ np.linalg.inv(damped)
    chosen = slice(0, 3) if mode == "ipm" else slice(3, 6)
    expected = (u[:, chosen] * s[chosen]) @ v[chosen]
    b, a = wide(weight.b), wide(weight.a)
    assert_close(weight.scale * b @ a, expected, 1e-3)
    # Both factors have the same share of the singular values.
    assert_close(weight.scale * np.linalg.norm(b, axis=0) ** 2, s[chosen], 1e-3)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(model, calibration, direction):
    start = calibration.lora_ga(gamma=4.0, direction=direction)
    weight = adapt(model, start)
    gradient = jax.grad(
        lambda w: loss(eqx.tree_at(lambda m: m.first.weight, model, w), XS)
    )
    u, _, v = np.linalg.svd(wide(gradient(model.first.weight)))
    of_a, of_b = {
        "ArB2r": ([0, 1, 2], [3, 4, 5]),
        "A2rBr": ([3, 4, 5], [0, 1, 2]),
        "ArBr": ([1, 3, 5], [0, 2, 4]),
    }[direction]
    size = 6**0.25 / 4**0.5
    assert_close(np.abs(wide(weight.b).T @ u[:, of_b]), size * np.eye(3), 2e-3)
    assert_close(np.abs(wide(weight.a) @ v[of_a].T), size * np.eye(3), 2e-3)


def test_the_inputs_of_a_kernel_are_its_rows():
    """In trees of parameters, and in modules that keep `(in, out)`."""

    class Dense(eqx.Module):
        kernel: jax.Array

        def __call__(self, x):
            return x @ self.kernel

    kernel = jr.normal(KEY, (8, 5))
    x = wide(XS)
    _, _, right = np.linalg.svd(x)

    def run(params, xs):
        return jnp.sum(xs @ params["kernel"])

    found = lorax.calibrate(
        run, {"kernel": kernel}, [XS], spec={"kernel": 2}, gather="inputs"
    )
    params = lorax.init_lora({"kernel": kernel}, 2, KEY, init=found.eva())
    module = Dense(kernel)
    found = lorax.calibrate(
        lambda model, xs: jax.vmap(model)(xs), module, [XS], "kernel", gather="inputs"
    )
    adapted = lorax.loraify(module, "kernel", rank=2, init=found.eva(), key=KEY)
    for weight in (params["kernel"], *weights(adapted)):
        assert not weight.a.any()
        assert_close(np.abs(wide(weight.b).T @ right[:2].T), np.eye(2), 1e-3)
    weight = lorax.init_lora({"kernel": kernel}, 2, KEY, init=found.corda())["kernel"]
    assert_close(dense_weight(weight.w), wide(kernel))


def test_stacks_start_layer_by_layer():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jr.split(KEY))

    def run(layers, xs):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def body(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return jnp.sum(jax.lax.scan(body, xs, arrays)[0] ** 2)

    found = lorax.calibrate(run, layers, [XS], rank=2, key=KEY)
    for start in (found.eva(), found.corda(), found.lora_ga()):
        (weight,) = weights(lorax.loraify(layers, rank=2, init=start, key=KEY))
        assert weight.a.shape == (2, 2, 8) and weight.b.shape == (2, 8, 2)
        assert_close(weight.materialise(), wide(layers.weight), 1e-5)
        assert not jnp.array_equal(weight.a[0], weight.a[1])
    assert found.allocate_ranks(8) == {"weight": 4}
    assert found.allocate_ranks(7) == {"weight": 3}


def ratios(model):
    first, second = wide(XS), np.tanh(jax.vmap(model.first)(XS))
    squares = [np.linalg.svd(wide(x))[1] ** 2 for x in (first, second)]
    return [x / x.sum() for x in squares]


@pytest.mark.parametrize("budget", [2, 5, 9])
def test_ranks_by_explained_variance(model, calibration, budget):
    first, second = ratios(model)
    ranks = calibration.allocate_ranks(budget, max_rank=6)
    assert sum(ranks.values()) == budget
    in_order = np.sort(np.concatenate([first[1:], second[1:]]))[::-1]
    least = in_order[budget - 3] if budget > 2 else np.inf
    expected = [1 + int((x[1:] >= least).sum()) for x in (first, second)]
    assert list(ranks.values()) == expected
    adapted = lorax.loraify(
        model, list(ranks), rank=ranks, init=calibration.eva(), key=KEY
    )
    assert [weight.rank for weight in weights(adapted)] == expected


def test_ranks_have_limits(calibration):
    assert max(calibration.allocate_ranks(4, max_rank=2).values()) == 2
    assert len(calibration.allocate_ranks(1, min_rank=0, max_rank=1)) == 1
    with pytest.raises(ValueError, match="`budget=1` .* 2 layers of at least rank 1"):
        calibration.allocate_ranks(1)
    with pytest.raises(ValueError, match="`min_rank=3` and `max_rank=2` must be in"):
        calibration.allocate_ranks(9, min_rank=3, max_rank=2)


def test_what_was_not_calibrated_is_named(model, calibration):
    found = lorax.calibrate(loss, model, [XS], "first", gather="inputs")
    with pytest.raises(ValueError, match="no inputs of second.weight .*`exclude`"):
        lorax.loraify(model, rank=2, init=found.eva(), key=KEY)
    with pytest.raises(ValueError, match="LoRA-GA needs gradients.*gather='gradients'"):
        found.lora_ga()
    with pytest.raises(ValueError, match="no inputs of 'third'.* 'first.weight'"):
        found.covariance("third")
    with pytest.raises(ValueError, match="needs 8 directions .* a rank of 3 or less"):
        lorax.loraify(model, rank=4, init=calibration.lora_ga(), key=KEY)
    with pytest.raises(ValueError, match="first.weight was calibrated with other axes"):
        other = eqx.nn.Linear(7, 6, key=KEY)
        other = eqx.tree_at(lambda m: m.first, model, other)
        lorax.loraify(other, "first", rank=2, init=found.eva(), key=KEY)


@pytest.mark.own_errors
def test_wrong_options_of_starts(calibration):
    for wrong in (dict(gamma=0.0), dict(direction="up")):
        with pytest.raises(ValueError, match="must be"):
            calibration.lora_ga(**wrong)
    with pytest.raises(ValueError, match="`mode='x'` must be 'ipm' or 'kpm'"):
        calibration.corda("x")


def test_a_sketch_that_is_too_small(model):
    found = lorax.calibrate(loss, model, [XS], gather="inputs", sketch=2, key=KEY)
    with pytest.raises(ValueError, match="rank 3 of first.weight is above the 2"):
        lorax.loraify(model, rank=3, init=found.eva(), key=KEY)

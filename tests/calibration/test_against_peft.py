"""Starts and ranks from data beside those of the real PEFT, on PyTorch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, weights, wide
from peft_helpers import AGAINST_PEFT, numpy, tensor

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT
KEY = jr.key(0)
XS = np.random.default_rng(0).normal(size=(40, 8)) * 1.5 ** -np.arange(8) + 0.3
XS = np.float32(XS)
RANK = 3


class Ours(eqx.Module):
    """Two layers."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def loss(model, xs):
    return jnp.mean(jax.vmap(model)(xs) ** 2)


@pytest.fixture
def ours():
    first, second = jr.split(KEY)
    return Ours(eqx.nn.Linear(8, 7, key=first), eqx.nn.Linear(7, 6, key=second))


@pytest.fixture
def theirs(ours):
    import torch
    from torch import nn

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 7), nn.Linear(7, 6)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    model = Theirs()
    for name in ("first", "second"):
        layer, like = getattr(model, name), getattr(ours, name)
        layer.weight.data, layer.bias.data = tensor(like.weight), tensor(like.bias)
    return model


def configure(**options):
    import peft

    targets = ["first", "second"]
    return peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets, **options)


def factors(theirs, config):
    import peft

    model = peft.get_peft_model(theirs, config)
    layers = [model.base_model.model.first, model.base_model.model.second]
    return [
        [numpy(getattr(x, name)["default"].weight) for name in ("lora_B", "lora_A")]
        for x in layers
    ]


def adapt(ours, start):
    model = lorax.loraify(ours, rank=RANK, alpha=6, init=start, key=KEY)
    return [(wide(weight.b), wide(weight.a)) for weight in weights(model)]


def cosines(x, y):
    """Of each row with the same row, whatever the signs."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    return np.abs(np.sum(x * y, axis=1))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva(ours, theirs, rho):
    """With the mean taken off, as PEFT does, and its ranks."""
    import peft
    from peft.tuners.lora.eva import get_eva_state_dict

    config = configure(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho, tau=0.9999)
    )
    found = get_eva_state_dict(
        theirs,
        [tensor(XS)],
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    calibration = lorax.calibrate(loss, ours, [XS], gather="inputs")
    budget, most = 2 * RANK, round(RANK * rho)
    ranks = calibration.allocate_ranks(budget, max_rank=most, min_rank=0, centred=True)
    assert ranks == {f"{name}.weight": len(a) for name, a in found.items()}
    model = lorax.loraify(ours, rank=ranks, init=calibration.eva(centred=True), key=KEY)
    for weight, name in zip(weights(model), ("first", "second")):
        assert (cosines(wide(weight.a), numpy(found[name])) > 0.999).all()


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(ours, theirs, mode):
    """The products of the factors. Each by itself has another unit: PEFT divides the
    inputs by the largest one."""
    import peft
    from peft.tuners.lora.corda import preprocess_corda

    config = configure(
        init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()
    )
    config.corda_config.corda_method = mode
    preprocess_corda(theirs, config, run_model=lambda: theirs(tensor(XS)))
    calibration = lorax.calibrate(loss, ours, [XS], gather="inputs")
    expected = factors(theirs, config)
    for (b, a), (their_b, their_a) in zip(
        adapt(ours, calibration.corda(mode)), expected
    ):
        assert_close(b @ a, their_b @ their_a, 2e-3)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(ours, theirs, direction):
    """The same directions. PEFT multiplies `b` by the singular values, and leaves `a`
    as it is; the paper scales both."""
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    config = configure(
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(direction=direction),
    )

    def train_step():
        (theirs(tensor(XS)) ** 2).mean().backward()

    preprocess_loraga(theirs, config, train_step)
    calibration = lorax.calibrate(loss, ours, [XS], rank=RANK, key=KEY)
    found = adapt(ours, calibration.lora_ga(direction=direction))
    for name, (b, a), (their_b, their_a) in zip(
        ["first", "second"], found, factors(theirs, config)
    ):
        assert (cosines(a, their_a) > 0.999).all()
        assert (cosines(b.T, their_b.T) > 0.999).all()
        _, s, _ = calibration.gradient(f"{name}.weight")
        chosen = {"ArB2r": s[3:6], "A2rBr": s[:3], "ArBr": s[0:6:2]}[direction]
        sizes = np.linalg.norm(their_b, axis=0) / np.linalg.norm(b, axis=0)
        assert_close(sizes, wide(chosen), 1e-2)
        assert_close(np.linalg.norm(their_a, axis=1), np.ones(3), 1e-3)

"""On meshes of eight devices, whose axes are explicit or not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from steps import arrays_like, take_steps

import eqx_lorax as lorax


def make_weights():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    w, b, a, gate = draw(2, 8, 4), draw(2, 8, 2), draw(2, 2, 4), draw(2, 2)
    kernel = draw(8, 4, 2), draw(8, 2), draw(2, 4, 2)
    axes = dict(rows=(-3,), columns=(-2, -1))
    return {
        "lora": lorax.LoraWeight(w, b, a),
        "lora_fa": lorax.LoraFaWeight(w, b, a),
        "kernel": lorax.LoraFaWeight(*kernel, **axes),
        "adalora": lorax.AdaLoraWeight(w, b, a, gate),
    }


SPECS = {
    (2, 8, 4): P("x", "y"),
    (2, 8, 2): P("x", "y"),
    (2, 2, 4): P("x", None, "y"),
    (2, 2): P("x"),
    (8, 4, 2): P("y", "x"),
    (8, 2): P("y"),
    (2, 4, 2): P(None, "y"),
}


def take_step(place):
    """All of the optimizers around each other, each for its own weights."""
    params, frozen = lorax.partition(jax.tree.map(place, make_weights()))
    gradient = jax.tree.map(place, arrays_like(params))
    steps = dict(total_steps=1, warmup_steps=0, final_steps=0)
    optimizer = lorax.adalora(optax.sgd(0.1), target_rank=1, **steps)
    optimizer = lorax.lora_fa(lorax.lora_pro(optimizer), frozen)
    return take_steps(lorax.lora_plus(optimizer, 2), params, [gradient])[-1]


@pytest.fixture(scope="module")
def expected():
    return take_step(lambda x: x)


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded(kind, expected):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    sharding_of = lambda x: NamedSharding(mesh, SPECS[x.shape])  # noqa: E731
    found = take_step(lambda x: jax.device_put(x, sharding_of(x)))
    assert_close(found, expected, 1e-4)
    for x in jax.tree.leaves(found):
        assert x.sharding.is_equivalent_to(sharding_of(x), x.ndim)

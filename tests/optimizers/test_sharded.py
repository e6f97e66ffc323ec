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


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    place = lambda x: jax.device_put(x, NamedSharding(mesh, SPECS[x.shape]))  # noqa: E731
    found = []
    for placed in (lambda x: x, place):
        model = jax.tree.map(placed, make_weights())
        params, frozen = lorax.partition(model)
        gradient = jax.tree.map(placed, arrays_like(params))
        steps = dict(total_steps=1, warmup_steps=0, final_steps=0)
        optimizer = lorax.adalora(optax.sgd(0.1), target_rank=1, **steps)
        optimizer = lorax.lora_fa(lorax.lora_pro(optimizer), frozen)
        optimizer = lorax.lora_plus(optimizer, 2)
        found += take_steps(optimizer, params, [gradient])
    assert_close(found[1], found[0], 1e-4)
    for x in jax.tree.leaves(found[1]):
        expected = NamedSharding(mesh, SPECS[x.shape])
        assert x.sharding.is_equivalent_to(expected, x.ndim)

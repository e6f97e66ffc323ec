"""LoftQ against the real `peft`, on the arrays of the real `bitsandbytes`."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, wide

import eqx_lorax as lorax


pytestmark = pytest.mark.interop

LINEAR = eqx.nn.Linear(128, 96, use_bias=False, key=jr.key(0))


@pytest.fixture
def loftq_on_the_cpu(monkeypatch):
    """PEFT's functions, which move everything to a GPU."""
    import bitsandbytes.nn.modules as bnb
    import torch
    from peft.utils import loftq_utils

    for kind in (torch.Tensor, bnb.Params4bit):
        move = kind.to

        def to(self, *args, move=move, **kwargs):
            here = ["cpu" if x == "cuda" else x for x in args]
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return move(self, *here, **kwargs)

        monkeypatch.setattr(kind, "to", to)
    return loftq_utils


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_loftq_init(loftq_on_the_cpu, steps):
    import torch

    w = torch.from_numpy(np.array(LINEAR.weight))
    base, a, b = loftq_on_the_cpu.loftq_init(w, 4, 8, num_iter=steps)
    adapted = lorax.loraify(LINEAR, rank=8, key=jr.key(1))
    weight = lorax.quantise(adapted, "weight", loftq=steps).weight
    expected, found = wide(base) + wide(b @ a), wide(weight.materialise())
    # A weight between two codes may go to either.
    assert np.isclose(wide(weight.w.dequantise()), wide(base), atol=1e-3).mean() > 0.99
    sizes = [np.linalg.norm(x - wide(LINEAR.weight)) for x in (expected, found)]
    assert_close(*sizes, 1e-3)
    if steps == 1:
        assert_close(weight.b @ weight.a, wide(b @ a), 1e-4)


def test_the_one_step_on_a_base_that_stays(loftq_on_the_cpu):
    import bitsandbytes.nn.modules as bnb
    import torch

    w = torch.from_numpy(np.array(LINEAR.weight))
    layer = bnb.Linear4bit(128, 96, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": w})
    layer = layer.to("cpu")
    a, b = loftq_on_the_cpu._loftq_init_new(layer.weight, w, 4, 8)
    tensors = {name: x.numpy() for name, x in layer.state_dict().items()}
    array = lorax.quantised.from_bitsandbytes(tensors, "")
    quantised = eqx.tree_at(lambda x: x.weight, LINEAR, array.astype(jnp.float32))
    start = lorax.LoftQ(LINEAR)
    weight = lorax.loraify(quantised, rank=8, init=start, key=jr.key(1)).weight
    assert_close(weight.b @ weight.a, wide(b @ a), 1e-4)

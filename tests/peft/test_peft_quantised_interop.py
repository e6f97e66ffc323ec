"""Folders that the real PEFT has trained on four bits of the real bitsandbytes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, trained
from peft_helpers import AGAINST_PEFT, by_peft, in_peft, numpy, tensor

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT

NAMES = {"layers.*": "layers.{}"}
X = np.asarray(jr.normal(jr.key(9), (5, 128)))


def make_theirs(quant_type, nested):
    import bitsandbytes.nn.modules as bnb
    import torch
    from torch import nn

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            make = lambda: bnb.Linear4bit(  # noqa: E731
                128,
                128,
                compute_dtype=torch.float32,
                quant_type=quant_type,
                compress_statistics=nested,
            )
            self.layers = nn.ModuleList([make() for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    torch.manual_seed(0)
    return Theirs().to("cpu")


class Ours(eqx.Module):
    layers: list

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def make_ours(theirs):
    """The model on the very bits."""
    layers = []
    for theirs_ in theirs.layers:
        tensors = {name: x.numpy() for name, x in theirs_.state_dict().items()}
        array = lorax.quantised.from_bitsandbytes(tensors, "").astype(jnp.float32)
        layer = eqx.nn.Linear(128, 128, key=jr.key(0))
        parts = (array, jnp.asarray(tensors["bias"]))
        layers.append(eqx.tree_at(lambda x: (x.weight, x.bias), layer, parts))
    return Ours(layers)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_there_and_back(quant_type, nested, tmp_path):
    theirs = make_theirs(quant_type, nested)
    ours = make_ours(theirs)
    plain = lorax.dequantise(ours)
    expected = numpy(theirs(tensor(X)))
    assert_close(jax.vmap(ours)(X), expected, 1e-5)
    adapted = by_peft(theirs, tmp_path / "theirs", r=4, target_modules=["0", "1"])
    # In evaluation on the CPU, bitsandbytes may multiply in bfloat16.
    expected = numpy(adapted.train()(tensor(X)))
    for base in (ours, plain):
        loaded = lorax.peft.load(tmp_path / "theirs", base, names=NAMES)
        assert_close(jax.vmap(loaded)(X), expected, 1e-5)
    on_bits = trained(lorax.loraify(ours, rank=4, key=jr.key(1)))
    lorax.peft.save(tmp_path / "ours", on_bits, names=NAMES)
    again = in_peft(make_theirs(quant_type, nested), tmp_path / "ours")
    assert_close(numpy(again.train()(tensor(X))), jax.vmap(on_bits)(X), 1e-5)
    with pytest.raises(lorax.AdapterFileError, match=f"{quant_type} when the adapter"):
        lorax.peft.load(tmp_path / "ours", plain, names=NAMES)
    elsewhere = lorax.peft.load(
        tmp_path / "ours", plain, names=NAMES, allow_other_base=True
    )
    assert_close(jax.vmap(elsewhere)(X), jax.vmap(on_bits)(X), 1e-5)

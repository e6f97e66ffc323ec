"""With only explicit transfers between host and devices allowed."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from functions import normal
from helpers import assert_close, trained

import eqx_lorax as lorax


PLAIN = eqx.nn.MLP(4, 4, 4, 1, key=jr.key(0))
KEY, OTHER = jr.split(jr.key(1))
ADAPTED = trained(lorax.loraify(PLAIN, rank=2, alpha=3.0, key=KEY))
PARAMS, FROZEN = lorax.partition(ADAPTED, also="layers.1.bias")
SMALLER, _ = lorax.partition(
    lorax.loraify(PLAIN, rank=1, key=OTHER), also="layers.1.bias"
)
FACTORS, _ = lorax.partition(ADAPTED)
BANK = lorax.AdapterBank([PARAMS, SMALLER])
TREE = {"w": normal(4, 4), "bias": normal(4)}
X = normal(4)
STACKED = {
    "x": eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jr.split(KEY)),
    "y": eqx.nn.Linear(4, 4, key=OTHER),
}
QUANTISED = lorax.quantise(STACKED, "x", "int8")
names = {"layers.*": "layers.{}"}


def saved(folder) -> Any:
    lorax.save_adapter(folder / "a", ADAPTED, also="layers.1.bias")
    loaded = lorax.load_adapter(folder / "a", PLAIN)
    return loaded, lorax.load_adapter(folder / "a", ADAPTED)


def in_folders_of_peft(folder) -> Any:
    lorax.peft.save(folder, ADAPTED, names=names)
    return lorax.peft.load(folder, PLAIN, names=names)


def as_checkpoints_of_hugging_face(folder) -> Any:
    for written in (QUANTISED, STACKED):
        lorax.peft.save_weights(folder, written, names={"x": "x.{}", "y": "y"})
    options = {"format": "nf4", "filter": "x", "block": 4}
    return [
        lorax.peft.load_weights(
            folder, like, names={"x": "x.{}", "y": "y"}, quantise=quantise
        )
        for like, quantise in [(STACKED, None), (QUANTISED, None), (STACKED, options)]
    ]


def checkpointed(folder) -> Any:
    state = {"params": PARAMS, "key": KEY, "codes": CODES}
    with lorax.Checkpoints(folder, FROZEN) as checkpoints:
        checkpoints.save(1, state)
        found = checkpoints.restore(state)
        assert found is not None
        return found[1]["params"]


def stepped(_) -> Any:
    params = lorax.init_lora(TREE, {"w": 2, "bias": 0}, KEY)
    wrapped = lorax.wrap_optimizer(optax.sgd(0.1), {"w": 2, "bias": 0})
    update = eqx.filter_jit(wrapped.update)
    updates, _ = update(params, wrapped.init(params), params)
    lorax.split_lora_params(params, {"w": 2, "bias": 0})
    return updates


CODES = normal(4, 4).astype(jnp.int4)
CALLS = {
    "loraify": lambda _: lorax.loraify(PLAIN, rank=2, key=KEY),
    "loraify gaussian": lambda _: lorax.loraify(
        PLAIN, rank=2, init="gaussian", dropout=0.1, dtype=jnp.bfloat16, key=KEY
    ),
    "loraify nested": lambda _: lorax.loraify(ADAPTED, rank=1, nested=True, key=OTHER),
    "init_lora": lambda _: lorax.init_lora(TREE, {"w": 2, "bias": 0}, KEY),
    "partition": lambda _: lorax.partition(ADAPTED),
    "partition of a mixture": lambda _: lorax.partition(
        lorax.combine(MIXTURE, FROZEN), also="layers.1.bias"
    ),
    "summary": lambda _: str(lorax.summary(ADAPTED)) and None,
    "scale": lambda _: lorax.scale(PARAMS, 0.5),
    "stack": lambda _: lorax.stack([FACTORS, None, FACTORS]),
    "stack of heads": lambda _: lorax.stack([PARAMS, SMALLER]),
    "weighted_sum": lambda _: lorax.weighted_sum([FACTORS, FACTORS], [0.5, 2]),
    "weighted_sum, svd": lambda _: lorax.weighted_sum(
        [FACTORS, FACTORS], [0.5, 2], "svd", rank=2
    ),
    "a bank": lambda _: lorax.AdapterBank([PARAMS, SMALLER]),
    "a bank with None": lambda _: lorax.AdapterBank([FACTORS, None]),
    "one of a bank": lambda _: [BANK[1], BANK[-1]],
    "mix": lambda _: BANK.mix([0.5, 2]),
    "unloraify": lambda _: lorax.unloraify(ADAPTED),
    "merge=False": lambda _: lorax.unloraify(ADAPTED, merge=False),
    "merged_forward": lambda _: lorax.merged_forward(ADAPTED),
    "a call": lambda _: ADAPTED(X),
    # `X` is an argument: JAX reads back what a compiled function closes over.
    "a gradient": lambda _: eqx.filter_jit(lorax.filter_grad(lambda m, x: m(x).sum()))(
        ADAPTED, X
    ),
    "the function door": lambda _: lorax.lora(lambda m, x: m(x))(ADAPTED, X),
    "an optimizer": stepped,
    "files": saved,
    "folders of PEFT": in_folders_of_peft,
    "whole models": as_checkpoints_of_hugging_face,
    "checkpoints": checkpointed,
}
MIXTURE = BANK.mix([0.5, 2])


@pytest.mark.parametrize("name", CALLS)
def test_no_implicit_transfers(name, tmp_path):
    (tmp_path / "free").mkdir()
    (tmp_path / "guarded").mkdir()
    with jax.transfer_guard("disallow"):
        found = CALLS[name](tmp_path / "guarded")
    expected = CALLS[name](tmp_path / "free")
    arrays = [eqx.filter(x, eqx.is_inexact_array) for x in (found, expected)]
    assert_close(*arrays)

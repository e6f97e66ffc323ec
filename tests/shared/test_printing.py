"""How adapted models are printed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_lorax as lorax


KEY = jax.random.key(0)


def test_a_linear_layer():
    layer = lorax.loraify(eqx.nn.Linear(8, 4, key=KEY), rank=2, alpha=4, key=KEY)
    assert eqx.tree_pformat(layer, width=200) == (
        "LoraLinear(weight=LoraWeight(f32[4,8], rank=2, scale=2.0), bias=f32[4], "
        "in_features=8, out_features=4, use_bias=True)"
    )
    assert str(layer) == repr(layer) == eqx.tree_pformat(layer)
    assert repr(layer).startswith("LoraLinear(\n  weight=LoraWeight(")


def test_dropout_and_its_key():
    layer = eqx.nn.Linear(8, 4, use_bias=False, key=KEY)
    layer = lorax.loraify(layer, rank=2, dropout=0.5, key=KEY)
    text = eqx.tree_pformat(lorax.dropout_key(layer, KEY), width=200)
    assert text.endswith("dropout=Dropout(p=0.5, inference=False), key=key<fry>[])")


@pytest.mark.parametrize(
    "module, filter, text",
    (
        (eqx.nn.Embedding(9, 4, key=KEY), "", "LoraEmbedding(num_embeddings=9, "),
        (eqx.nn.Conv2d(2, 3, 3, key=KEY), "", "LoraConv(Conv2d(num_spatial_dims=2, "),
        (
            eqx.nn.GRUCell(4, 3, key=KEY),
            "weight_*",
            "LoraModule(GRUCell(weight_ih=Lora",
        ),
    ),
)
def test_other_layers(module, filter, text):
    model = lorax.loraify({"layer": module}, filter or "layer", rank=2, key=KEY)
    assert eqx.tree_pformat(model, width=400).startswith("{'layer': " + text)


def test_weights():
    w, b, a = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((4, 2)), jnp.ones((2, 8))
    weight = lorax.LoraWeight(w, b, a, alpha=4)
    assert repr(weight) == "LoraWeight(bf16[4,8], rank=2, scale=2.0)"
    assert repr(weight.T) == (
        "FactoredWeight(bf16[4,8], rank=2, scale=2.0, permutation=(-1, -2))"
    )
    nested = lorax.LoraWeight(weight, b, a, alpha=2)
    assert repr(nested) == f"LoraWeight({weight!r}, rank=2, scale=1.0)"
    numpy = lorax.LoraWeight(np.ones((4, 8), np.float32), b, a)
    assert repr(numpy).startswith("LoraWeight(f32[4,8](numpy), rank=2")
    abstract = eqx.filter_eval_shape(lambda: weight)
    shown = eqx.tree_pformat(abstract, struct_as_array=True)
    assert shown == repr(weight)


def test_parts():
    """The parts from `partition`, and filter specs."""
    layer = lorax.loraify(eqx.nn.Linear(8, 4, key=KEY), rank=2, key=KEY)
    params, frozen = lorax.partition(layer)
    assert "weight=LoraWeight(None, rank=2, scale=1.0), bias=None" in repr(
        params
    ).replace("\n  ", " ")
    assert "b=None" in repr(frozen)
    assert "b=True" in repr(lorax.trainable(layer))

"""Models of other packages, unchanged: adapt, train three steps, merge."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, weights

import eqx_lorax as lorax


pytestmark = [
    pytest.mark.interop,
    # Warnings from these packages are not for us to fix.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def _as_their_authors_run_them():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def adapt_train_merge(model, filter, call, getkey, *, targets, rank=4):
    """`call(model)` returns the outputs, an array."""
    adapted = lorax.loraify(model, filter, rank=rank, key=getkey())
    assert len(weights(adapted)) == targets
    before = eqx.filter_jit(call)(model)
    assert_close(eqx.filter_jit(call)(adapted), before, 1e-4)

    params, frozen = lorax.partition(adapted)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = optimizer.init(params)
    wanted = before + jr.normal(getkey(), before.shape)

    @eqx.filter_jit
    def step(params, state):
        def loss(params):
            return jnp.mean((call(eqx.combine(params, frozen)) - wanted) ** 2)

        value, gradient = eqx.filter_value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return eqx.apply_updates(params, updates), state, value

    values = []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    trained = eqx.combine(params, frozen)
    for old, new in zip(weights(adapted), weights(trained)):
        assert (old.b != new.b).any()

    merged = lorax.unloraify(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    after = eqx.filter_jit(call)(trained)
    assert_close(eqx.filter_jit(call)(merged), after, 1e-4)
    assert np.abs(np.asarray(after - before)).max() > 1e-3
    assert_identical(lorax.unloraify(trained, merge=False), model)


def test_equimo_vision_transformer(getkey):
    """It has its own classes for attention and patch embedding."""
    from equimo.models.vit import VisionTransformer

    model = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=2,
        depths=[2],
        num_classes=5,
        key=getkey(),
    )
    model = eqx.nn.inference_mode(model)
    image, key = jr.normal(getkey(), (3, 16, 16)), getkey()
    call = lambda model: model(image, key=key)  # noqa: E731
    linear = lambda x: isinstance(x, eqx.nn.Linear)  # noqa: E731
    leaves = jax.tree.leaves(model, is_leaf=linear)
    adapt_train_merge(
        model, eqx.nn.Linear, call, getkey, targets=sum(map(linear, leaves))
    )
    # Every linear layer, and a convolution in the patch embedding.
    adapt_train_merge(model, None, call, getkey, targets=sum(map(linear, leaves)) + 1)


def test_equimo_inverted_residual(getkey):
    """The block of MobileNet: pointwise and depthwise convolutions with squeeze and
    excitation in between."""
    from equimo.layers.convolution import MBConv

    model = eqx.nn.inference_mode(
        MBConv(8, 8, mid_channels=16, kernel_size=3, se=True, key=getkey())
    )
    image, key = jr.normal(getkey(), (8, 9, 9)), getkey()
    call = lambda model: model(image, key=key)  # noqa: E731
    conv = lambda x: isinstance(x, eqx.nn.Conv | eqx.nn.Linear)  # noqa: E731
    found = [x for x in jax.tree.leaves(model, is_leaf=conv) if conv(x)]
    assert any(getattr(x, "groups", 1) > 1 for x in found)
    adapt_train_merge(model, None, call, getkey, targets=len(found), rank=2)


def test_expaloma(getkey):
    """A graph network with its weights: raw arrays in nested custom modules, and no
    layers of Equinox."""
    from expaloma.featurize import from_rdkit_mol, graph_to_jax
    from expaloma.infer import charges_for_smiles
    from expaloma.nn.model import load_eqx
    from expaloma.paths import bundled_eqx_path
    from rdkit import Chem

    smiles = "CC(=O)Oc1ccccc1C(=O)O"
    graph = from_rdkit_mol(Chem.MolFromSmiles(smiles))
    x, senders, receivers, reference = graph_to_jax(graph)
    segments = jnp.zeros(len(x), jnp.int32)
    model = load_eqx(bundled_eqx_path())

    def call(model):
        return model(x, senders, receivers, segments, 1, 0.0, q_ref=reference)

    assert_close(call(model).reshape(-1), charges_for_smiles(smiles), 1e-4)
    adapt_train_merge(
        model, ["w_self", "w_neigh", "w_f_in"], call, getkey, targets=9, rank=8
    )
    # The model itself holds the last one, and becomes a `LoraModule`.
    adapt_train_merge(model, "w_readout", call, getkey, targets=1, rank=2)

"""Other people's models, as they wrote them: adapt, train three steps, merge."""

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
    # What these packages themselves warn of is not ours to mend.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(autouse=True)
def _as_their_authors_run_them():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def adapt_train_merge(model, filter, call, getkey, *, targets, rank=4):
    """`call(model)` gives the outputs, an array."""
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
    """Its attention and patch embedding are of its own making."""
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
    # Every linear layer and, in the patch embedding, a convolution.
    adapt_train_merge(model, None, call, getkey, targets=sum(map(linear, leaves)) + 1)


def test_equimo_mobilenet(getkey):
    """Depthwise and pointwise convolutions, squeeze and excitation."""
    from equimo.models.mobilenet import MobileNetv3

    model = MobileNetv3(
        in_channels=3,
        hidden_sizes=[16, 24],
        out_sizes=[16, 24, 32],
        use_se=[True, False],
        kernel_sizes=[3, 5],
        strides=[2, 1],
        act_layers=[jax.nn.relu, jax.nn.relu],
        key=getkey(),
    )
    del model


def test_expaloma(getkey):
    """Ships its weights; raw arrays in modules of its own, and no layer of Equinox."""
    from expaloma.featurize import from_rdkit_mol, graph_to_jax
    from expaloma.infer import load_eqx
    from rdkit import Chem

    del from_rdkit_mol, graph_to_jax, load_eqx, Chem

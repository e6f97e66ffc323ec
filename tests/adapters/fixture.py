"""The model and the adapter in the files in `data/`, one for each format."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqx_lorax as lorax


def fixture_model():
    """A model without random numbers, so that it is the same in every version of
    JAX."""
    mlp = lambda: eqx.nn.MLP(4, 3, 6, 2, key=jr.key(0))  # noqa: E731
    conv = lambda: eqx.nn.Conv2d(2, 4, 3, groups=2, key=jr.key(0))  # noqa: E731
    like = eqx.filter_eval_shape(lambda: {"mlp": mlp(), "conv": conv()})
    return jax.tree.map(
        lambda x: counted(x, 5) if isinstance(x, jax.ShapeDtypeStruct) else x, like
    )


def counted(like, step):
    """Numbers that every dtype represents exactly."""
    numbers = (np.arange(like.size) * step % 17 - 8) / 16
    return jnp.asarray(numbers.reshape(like.shape), like.dtype)


def fixture_adapter():
    model = fixture_model()
    adapted = lorax.loraify(
        model, None, rank={"conv": 1, "*": 2}, alpha=3, dropout=0.5, key=jr.key(0)
    )

    def fill(weight):
        new = counted(weight.b, 3), counted(weight.a, 7)
        return eqx.tree_at(lambda w: (w.b, w.a), weight, new)

    is_weight = lambda x: isinstance(x, lorax.LoraWeight)  # noqa: E731
    return jax.tree.map(
        lambda x: fill(x) if is_weight(x) else x, adapted, is_leaf=is_weight
    )

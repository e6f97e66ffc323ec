"""All methods, what `loraify` is given for each, and a model with a layer of each kind:
what the tests of methods have in common."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from definitions import form_dense
from helpers import is_inexact, is_weight

import eqx_lorax as lorax


# What `loraify` is given for each. Ranks are even, and sizes have several divisors.
TABLE = {
    "lora": dict(method="lora", alpha=3),
    "rank-stabilised lora": dict(method="lora", alpha=3, rank_stabilised=True),
    "pissa": dict(method="lora", init="pissa"),
    "randomised pissa": dict(method="lora", init=lorax.Pissa(iterations=2)),
    "olora": dict(method="lora", init="olora", alpha=3),
    "milora": dict(method="lora", init="milora"),
    "orthogonal": dict(method="lora", init="orthogonal"),
    "dora": dict(method="dora", alpha=3),
    "dora from pissa": dict(method="dora", init="pissa"),
    "vera": dict(method="vera", seed=3),
    "loha": dict(method="loha", alpha=3),
    "lokr": dict(method="lokr"),
    "lokr of two products": dict(method="lokr", decompose_both=True, rank=1),
    "lora_fa": dict(method="lora_fa", alpha=3),
    "lora_xs": dict(method="lora_xs"),
    "adalora": dict(method="adalora", alpha=3),
    "ia3": dict(method="ia3", scale_inputs=True),
    "full": dict(method="full"),
    "tokens": dict(method="tokens", indices=[0, 3]),
    "segments": dict(method="segments", parts=2, segments=[1]),
}
# Variations of another row, which the README's test command leaves out.
VARIATIONS = (
    *("rank-stabilised lora", "randomised pissa", "olora", "milora", "orthogonal"),
    *("dora from pissa", "lokr of two products"),
)
# Those whose normal form has a factor as large as the base.
DENSE = ("full", "lokr", "lokr of two products")


class Model(eqx.Module):
    """One layer of each kind: with a bias, with groups and a stride, a table, a stack
    in a scan below `jax.checkpoint`, arrays of a module that is no layer."""

    table: eqx.nn.Embedding
    linear: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    layers: eqx.nn.Linear
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        keys = jr.split(key, 5)
        self.table = eqx.nn.Embedding(10, 6, key=keys[0])
        self.linear = eqx.nn.Linear(6, 8, key=keys[1])
        self.conv = eqx.nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, key=keys[2])
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(
            jr.split(keys[3], 2)
        )
        self.cell = eqx.nn.GRUCell(6, 6, key=keys[4])

    def __call__(self, x, shift=0.0):
        x = self.linear(self.table(x) + shift)
        x = jnp.sum(self.conv(x.reshape(4, 2)), 1)
        x = run_stack(self.layers, x)
        return self.cell(x, x)


def run_stack(layers, x):
    arrays, rest = eqx.partition(layers, eqx.is_array)
    step = lambda x, arrays: (jnp.tanh(eqx.combine(arrays, rest)(x)), None)  # noqa: E731
    return jax.lax.scan(jax.checkpoint(step), x, arrays)[0]


TARGETS = ["table", "linear", "conv", "layers", "cell.weight_ih"]
X = jnp.asarray([3, 0, 5, 9, 3])


@jax.jit
def _make():
    return eqx.filter(Model(jr.key(0)), eqx.is_array)


def make_model(dtype=None):
    model = eqx.combine(_make(), eqx.filter_eval_shape(Model, jr.key(0)))
    return jax.tree.map(
        lambda x: x.astype(dtype) if dtype and is_inexact(x) else x, model
    )


def adapt(name, model, targets=TARGETS, **others):
    options = dict(rank=2, key=jr.key(1)) | TABLE[name] | others
    return lorax.loraify(model, targets, **options)


def train(adapted, seed=0):
    """The model after training: with other numbers in all that is trained."""
    random = np.random.default_rng(seed)
    params, frozen = lorax.partition(adapted)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), params
    )
    return lorax.combine(params, frozen)


def batched(model, x, *others):
    return jax.vmap(model)(x, *others)


def without_adapters(model):
    """The plain model with the dense arrays of the definitions."""
    dense = jax.tree.map(
        lambda x: form_dense(x) if is_weight(x) else x, model, is_leaf=is_weight
    )
    return lorax.unloraify(dense, merge=False)

"""A layer kind in a single file, with its own array names and axes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close, is_weight, trained, weights

import eqx_lorax as lorax
from eqx_lorax._layers import register


class Gated(eqx.Module):
    """`kernel (in, heads, out)` and `gate (out, in)`; no array is called `weight`."""

    kernel: jax.Array
    gate: jax.Array
    table: jax.Array

    def __init__(self, *, key):
        keys = jr.split(key, 3)
        self.kernel = jr.normal(keys[0], (6, 2, 5))
        self.gate = jr.normal(keys[1], (5, 6))
        self.table = jr.normal(keys[2], (4, 3))

    def __call__(self, x):
        return jnp.einsum("iho,i->ho", self.kernel, x) * jnp.tanh(self.gate @ x)[None]


@register(
    {
        "kernel": lambda module, ndim: ((-3,), (-2, -1)),
        "gate": lambda module, ndim: ((-2,), (-1,)),
    }
)
class LoraGated(lorax.AbstractLoraLayer):
    wrapped: Gated
    dropout: eqx.nn.Dropout | None = None
    key: jax.Array | None = None

    adapts = (Gated,)
    by_default = True
    has_dropout = True
    is_lookup = False

    def __call__(self, x, *, key=None):
        kernel, gate = self.wrapped.kernel, self.wrapped.gate
        if not (is_weight(kernel) and is_weight(gate)):
            # One of them may be plain. Then the module's own code does it.
            return lorax.lora(Gated.__call__)(self.wrapped, x)
        low_rank_x = x
        if self.dropout is not None:
            low_rank_x = self.dropout(x, key=self.key if key is None else key)
        options = dict(low_rank_x=low_rank_x)
        labels = ("in", "head", "out")
        out = kernel.contract(x, ("in",), labels, ("head", "out"), **options)
        scale = gate.contract(x, ("in",), ("out", "in"), ("out",), **options)
        return out * jnp.tanh(scale)[None]


class Model(eqx.Module):
    gated: list[Gated]
    head: eqx.nn.Linear

    def __init__(self, *, key):
        keys = jr.split(key, 3)
        self.gated = [Gated(key=key) for key in keys[:2]]
        self.head = eqx.nn.Linear(5, 3, key=keys[2])

    def __call__(self, x):
        for layer in self.gated:
            x = jnp.concatenate([layer(x).sum(0), x[:1]])
        return self.head(x[:5])


@pytest.mark.parametrize("filter", [None, "gated", "0", ["kernel", "gate"]])
def test_a_registered_layer_is_adapted(filter, getkey):
    model = Model(key=getkey())
    adapted = trained(lorax.loraify(model, filter, rank=2, key=getkey()))
    layer = adapted.gated[0]
    assert type(layer) is LoraGated
    assert (layer.kernel.rows, layer.kernel.columns) == ((-3,), (-2, -1))
    assert (layer.gate.rows, layer.gate.columns) == ((-2,), (-1,))
    assert isinstance(layer.table, jax.Array)
    x = jr.normal(getkey(), (6,))
    assert_close(adapted(x), lorax.unloraify(adapted)(x))
    assert abs(adapted(x) - model(x)).max() > 1e-3


def test_one_of_its_arrays(getkey):
    gated = Gated(key=getkey())
    adapted = lorax.loraify(gated, "gate", rank=2, key=getkey())
    assert type(adapted) is LoraGated and len(weights(adapted)) == 1
    assert isinstance(adapted.kernel, jax.Array)
    # An array that the layer does not adapt is not a target.
    with pytest.raises(ValueError, match="table"):
        lorax.loraify(gated, "table", rank=2, key=getkey())


def test_its_rank_is_checked_by_its_own_axes(getkey):
    with pytest.raises(ValueError, match=r"exceeds the smaller side, 6, of .*kernel"):
        lorax.loraify(Gated(key=getkey()), "kernel", rank=7, key=getkey())


def test_keys_for_its_dropout(getkey):
    stack = eqx.filter_vmap(lambda key: Gated(key=key))(jr.split(getkey(), 3))
    adapted = lorax.loraify(stack, rank=2, dropout=0.5, key=getkey())
    assert lorax.dropout_key(adapted, jr.key(0)).key.shape == (3,)
    assert lorax.dropout_key(adapted, None).key is None


def test_saved_for_peft(tmp_path, getkey):
    """If a module has several parameters, PEFT adapts one of them by its name."""
    from eqx_lorax._peft.pytorch import path_in_names
    from eqx_lorax._trees import Places

    found = {
        ".".join(path_in_names(x))
        for x in Places(Model(key=getkey())).all
        if x.is_array
    }
    assert {"gated.0.kernel", "gated.0.gate", "head"} <= found


def test_an_array_without_a_matrix(getkey):
    flat = eqx.tree_at(lambda x: x.gate, Gated(key=getkey()), jnp.ones(5))
    with pytest.raises(ValueError, match=r"gate is a vector \(5,\), which has no"):
        lorax.loraify({"gated": flat}, "gated", rank=2, key=getkey())
    with pytest.warns(UserWarning, match="gate is a vector"):
        adapted = lorax.loraify({"gated": flat}, rank=2, key=getkey())
    assert len(weights(adapted)) == 1

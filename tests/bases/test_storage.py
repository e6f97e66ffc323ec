"""Quantised arrays as pytrees: in files and checkpoints, abstract, and on meshes."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from stored import make_tensor

import eqx_lorax as lorax


W = jr.normal(jr.key(0), (32, 64))
X = jr.normal(jr.key(1), (8, 64))
FORMATS = {
    "nf4": dict(format="nf4", block=16),
    "nested": dict(format="nf4", block=16, nested=True),
    "fp4": dict(format="fp4", block=16),
    "int4": dict(format="int4", block=16),
    "int8": dict(format="int8"),
    "int8-block": dict(format="int8-block", block=16),
}


def quantise(w, name):
    return lorax.quantise({"w": w}, **FORMATS[name])["w"]


ARRAYS = {name: quantise(W, name) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_round_trips(name, tmp_path):
    array = ARRAYS[name]
    like = jax.tree.map(jnp.zeros_like, array)
    eqx.tree_serialise_leaves(tmp_path / "file", array)
    found = eqx.tree_deserialise_leaves(tmp_path / "file", like)
    assert eqx.tree_equal(found, array)
    assert eqx.tree_equal(pickle.loads(pickle.dumps(array)), array)
    assert eqx.tree_equal(jax.device_put(array, jax.devices()[0]), array)
    leaves, treedef = jax.tree.flatten(array)
    assert hash(treedef) == hash(jax.tree.structure(found))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_checkpoints_of_orbax(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", ARRAYS)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ARRAYS)
        found = checkpointer.restore(tmp_path / "model", like)
    assert eqx.tree_equal(found, ARRAYS)


@pytest.mark.parametrize("name", FORMATS)
def test_abstract_arrays(name):
    abstract = quantise(jax.ShapeDtypeStruct(W.shape, W.dtype), name)
    array = ARRAYS[name]
    shapes = eqx.filter_eval_shape(lambda: array)
    assert jax.tree.structure(abstract) == jax.tree.structure(array)
    assert eqx.tree_equal(abstract, shapes)
    assert (abstract.shape, abstract.nbytes) == (array.shape, array.nbytes)


def test_plans_and_summaries_have_the_bytes_that_are_stored():
    model = eqx.nn.MLP(
        64, 64, 64, 1, use_bias=False, use_final_bias=False, key=jr.key(0)
    )
    sizes = []
    for make in (lambda: model, lambda: lorax.quantise(model)):
        adapted = eqx.filter_eval_shape(
            lambda make=make: lorax.loraify(make(), rank=2, key=jr.key(0))
        )
        plan = lorax.plan(lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), adapted, X)
        summary = lorax.summary(adapted)
        assert plan.base == summary.frozen_bytes
        assert summary.frozen == 2 * 64 * 64
        sizes.append((plan.base, plan.flops, summary.full_adam_bytes))
    (plain, *others), (packed, *others_of_packed) = sizes
    assert packed == 0.5625 / 4 * plain
    assert others == others_of_packed


SPECS = {
    "rows": P("a", None),
    "columns": P(None, "b"),
    "both": P("a", "b"),
    "replicated": P(),
}


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(getattr(AxisType, kind),) * 2)


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["nf4", "nested", "int8"])
def test_meshes(name, spec, kind):
    mesh = make_mesh(kind)
    sharding = NamedSharding(mesh, spec)
    w = jax.device_put(W, sharding)
    if name == "int8" and len(spec) > 1 and spec[1] is None and spec[0]:
        # In trees of parameters the last axis is that of the outputs.
        with pytest.raises(ValueError, match='axis -2 is sharded as .*"int8-block"'):
            quantise(w, name)
        return
    if name == "int8" and spec == P("a", "b"):
        with pytest.raises(ValueError, match="axis -2 is sharded"):
            quantise(w, name)
        return
    array = quantise(w, name)
    # Bit for bit as on one device.
    jax.tree.map(np.testing.assert_array_equal, array, ARRAYS[name])
    assert array.sharding.is_equivalent_to(sharding, 2)
    abstract = quantise(jax.ShapeDtypeStruct(W.shape, W.dtype, sharding=sharding), name)
    for one, other in zip(jax.tree.leaves(abstract), jax.tree.leaves(array)):
        assert one.sharding.is_equivalent_to(other.sharding, other.ndim)
    assert array.dequantise().sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(array.dequantise(), ARRAYS[name].dequantise())
    linear = eqx.nn.Linear(64, 32, use_bias=False, key=jr.key(0))
    layer = eqx.tree_at(lambda x: x.weight, linear, array)
    adapted = lorax.loraify(layer, rank=2, key=jr.key(0))
    b, a = adapted.weight.b, adapted.weight.a
    rows, columns = (*spec, None, None)[:2]
    assert b.sharding.is_equivalent_to(NamedSharding(mesh, P(rows)), 2)
    assert a.sharding.is_equivalent_to(NamedSharding(mesh, P(None, columns)), 2)
    if kind == "Auto" or columns is None:
        with jax.set_mesh(mesh):
            whole = jax.device_put(X, NamedSharding(mesh, P()))
            found = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(adapted, whole)
        assert_close(found, X @ ARRAYS[name].dequantise().T, 1e-4)


@pytest.mark.eight_devices
def test_parts_within_shard_map():
    mesh = make_mesh("Auto")
    array = quantise(jax.device_put(W, NamedSharding(mesh, P("a", "b"))), "nf4")

    def multiply(array, x):
        assert array.shape == (16, 16)
        return jax.lax.psum(x @ array.T, "b")

    specs = jax.tree.map(lambda x: P("a", "b"), array)
    mapped = jax.shard_map(
        multiply, mesh=mesh, in_specs=(specs, P(None, "b")), out_specs=P(None, "a")
    )
    assert_close(mapped(array, X), X @ ARRAYS["nf4"].dequantise().T, 1e-4)


@pytest.mark.eight_devices
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["fp4", "int4", "int8-block", "Q5_1", "Q4_K"])
def test_other_formats_in_parts(name, kind):
    mesh = make_mesh(kind)
    spec = P("a", "b")
    sharding = NamedSharding(mesh, spec)
    if name in FORMATS:
        array = ARRAYS[name]
        placed = quantise(jax.device_put(W, sharding), name)
        jax.tree.map(np.testing.assert_array_equal, placed, array)
    else:
        blocks = 4 if name.endswith("K") else 8
        array = lorax.quantised.from_gguf(make_tensor(name, 4, blocks)[0])
        # Whatever is nested has the same axes, of blocks of blocks.
        placed = jax.device_put(array, sharding)
    w = array.dequantise()
    assert placed.sharding.is_equivalent_to(sharding, 2)
    assert placed.dequantise().sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(placed.T.dequantise(), w.T)

    def read(stack):
        scanned = jax.lax.scan(lambda _, x: (None, x.dequantise()), None, stack)[1]
        return scanned, jax.vmap(lambda x: x.dequantise())(stack)

    with jax.set_mesh(mesh):
        stack = jax.tree.map(lambda x: jnp.stack([x, x]), placed)
        for found in jax.jit(read)(stack):
            np.testing.assert_array_equal(found, jnp.stack([w, w]))

    def read_part(part):
        assert part.shape == (w.shape[0] // 2, w.shape[1] // 4)
        return part.dequantise()

    specs = jax.tree.map(lambda _: spec, placed)
    mapped = jax.shard_map(read_part, mesh=mesh, in_specs=(specs,), out_specs=spec)
    np.testing.assert_array_equal(mapped(placed), w)

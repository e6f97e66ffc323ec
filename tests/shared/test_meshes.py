"""Training on meshes, in one process and in two: the same numbers as on one device,
without unnecessary communication."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from helpers import assert_close, assert_identical, is_weight
from jax.sharding import NamedSharding, PartitionSpec as P
from meshes import collectives, WAYS
from running import running

import eqx_lorax as lorax


pytestmark = pytest.mark.eight_devices
STEPS = 20


@pytest.fixture(scope="module")
def single():
    """The results on one device."""
    return meshes.train(meshes.make_llama(), STEPS)


@pytest.mark.heavy
@pytest.mark.parametrize("name", WAYS)
def test_training(name, single):
    way = WAYS[name]
    mesh = meshes.make_mesh(way)
    model = meshes.on_mesh(meshes.make_llama(), mesh, way)
    losses, trained = meshes.train(model, STEPS, mesh)
    expected, on_one = single
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(lorax.partition(trained)[0], lorax.partition(on_one)[0], 1e-4)


# Communication


def _program(model, mesh):
    """The partitioned program of a training step. It trains the norms if there are no
    adapters."""
    has_adapters = any(is_weight(x) for x in jax.tree.leaves(model, is_leaf=is_weight))
    params, frozen = lorax.partition(model, None if has_adapters else "blocks.norms")
    state = meshes.OPTIMIZER.init(params)
    step: Any = meshes.step
    lowered = step.lower(params, frozen, state, next(meshes.batches(mesh)))
    return lowered.compile().compiled.as_text()


def _of_matrices(found, model):
    """Arrays with the shape of a base weight or of a dense update, whole or sharded."""
    shapes = set()
    for x in jax.tree.leaves(model):
        if x.ndim > 1 and x.shape[-1] > 8:
            per_device = x.sharding.shard_shape(x.shape)
            shapes |= {x.shape, x.shape[-2:], per_device, per_device[-2:]}
            shapes |= {shape[::-1] for shape in shapes}
    return Counter(x for x in found if x[1] in shapes)


@pytest.mark.heavy
@pytest.mark.parametrize("name", WAYS)
def test_no_weight_is_moved_that_was_not_before(name):
    way = WAYS[name]
    mesh = meshes.make_mesh(way)
    model = meshes.on_mesh(meshes.make_llama(), mesh, way)
    ours = _of_matrices(collectives(_program(meshes.adapted(model), mesh)), model)
    plain = _of_matrices(collectives(_program(model, mesh)), model)
    assert not ours - plain
    if way.is_tensor and way.rows is None:
        assert not ours


@pytest.mark.heavy
def test_what_data_parallel_training_exchanges():
    """Only sums of adapter-sized gradients and of the loss."""
    way = WAYS["data"]
    mesh = meshes.make_mesh(way)
    model = meshes.adapted(meshes.on_mesh(meshes.make_llama(), mesh, way))
    found = collectives(_program(model, mesh))
    assert {kind for kind, _ in found} == {"all-reduce"}
    factors = [x.shape[1:] for x in jax.tree.leaves(lorax.partition(model)[0])]
    transposed = {shape[::-1] for shape in factors}
    assert {shape for _, shape in found} <= {(), *factors, *transposed}
    count = sum(int(np.prod(shape)) for _, shape in found)
    assert count <= 1 + sum(int(np.prod(shape)) for shape in factors)


def test_the_check_finds_a_gathered_weight():
    mesh = meshes.make_mesh(WAYS["tensor"])
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    w = put(np.ones((64, 32), np.float32), None, "model")
    program = jax.jit(lambda w: w * 1.5, out_shardings=NamedSharding(mesh, P()))
    found = collectives(program.lower(w).compile().as_text())
    assert found == [("all-gather", (64, 32))]
    assert _of_matrices(found, [w])


# Files


@pytest.mark.heavy
def test_adapters_go_from_mesh_to_mesh(tmp_path):
    plain = meshes.make_llama()
    file = tmp_path / "adapter.safetensors"
    written = None
    for name in ("tensor", "mixed and fully sharded", "pipeline"):
        mesh = meshes.make_mesh(WAYS[name])
        model = meshes.on_mesh(plain, mesh, WAYS[name])
        if written is not None:
            read = lorax.load_adapter(file, model)
            assert_identical(_on_host(read), _on_host(written))
            fresh = meshes.adapted(model)
            # Into a plain model, and over another adapter.
            assert _shardings(read) == _shardings(fresh)
            again = lorax.load_adapter(file, fresh)
            assert _shardings(again) == _shardings(fresh)
            assert_identical(_on_host(again), _on_host(written))
        written = meshes.adapted(model)
        lorax.save_adapter(file, written, also="norm")


def _on_host(model):
    return jax.tree.map(np.asarray, lorax.partition(model)[0])


def _shardings(model):
    return [x.sharding for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]


# Several processes


@pytest.mark.heavy
@pytest.mark.processes
def test_two_processes(single, tmp_path):
    """With four devices each, these shardings give the same numbers as one device.
    Adapters are written once and read by all."""
    script = Path(__file__).with_name("processes_script.py")
    # Compiled like the tests, since otherwise random numbers, and so the base, differ
    # in the last bits. But without their many devices.
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": " ".join(flags),
    }
    with running(script, tmp_path, environment=environment) as program:
        program.finish()
    expected, on_one = single
    params = lorax.partition(on_one)[0]
    for name in meshes.SOME_WAYS:
        found = np.load(tmp_path / f"{name}.npz")
        np.testing.assert_allclose(found["losses"], expected, rtol=1e-5)
        leaves = [found[f"x{i}"] for i in range(len(jax.tree.leaves(params)))]
        assert_close(leaves, jax.tree.leaves(params), 1e-4)
    # One process reads a checkpoint that two have written together.
    read = lorax.load_adapter(tmp_path / "adapter.safetensors", meshes.make_llama())
    assert_close(lorax.partition(read)[0], params, 1e-4)
    merged = lorax.unloraify(read)
    assert eqx.tree_equal(
        jax.tree.map(jnp.shape, merged), jax.tree.map(jnp.shape, meshes.make_llama())
    )

"""One of two processes that train on the devices of both: see `test_meshes.py`."""

import launch


if __name__ == "__main__":
    launch.start(__file__)

import argparse
from pathlib import Path

import jax
import numpy as np


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
launch.add_flags(parser)
args = parser.parse_args()
folder, index = args.folder, args.process
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(args.coordinator, args.processes, index)

import meshes  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from tiny_llama import NAMES  # noqa: E402

import eqx_lorax as lorax  # noqa: E402


assert jax.device_count() == 8 and jax.local_device_count() == 4
runs = {}
for name, way in meshes.SOME_WAYS.items():
    mesh = meshes.make_mesh(way)
    model = meshes.on_mesh(meshes.make_llama(), mesh, way)
    losses, trained = meshes.train(model, 20, mesh)
    runs[name] = model, trained
    params = lorax.partition(trained)[0]
    whole = [
        multihost_utils.process_allgather(x, tiled=True)
        for x in jax.tree.leaves(params)
    ]
    if index == 0:
        arrays = {f"x{i}": np.asarray(x) for i, x in enumerate(whole)}
        np.savez(folder / f"{name}.npz", losses=losses, **arrays)

# Sharded by layers, over both processes.
model, trained = runs["pipeline"]
file = folder / "adapter.safetensors"
lorax.save_adapter(file, trained)
assert file.exists()
read = lorax.load_adapter(file, model)
for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(trained), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for ours, theirs in zip(x.addressable_shards, y.addressable_shards, strict=True):
        assert np.array_equal(ours.data, theirs.data)
try:
    lorax.save_adapter(folder / "adapter.safetensors" / "not a folder", trained)
except OSError as error:
    is_first = index == 0
    assert is_first != ("first process" in str(error)), error
else:
    raise AssertionError("It was written below a file.")

# Whole models, layer by layer and in several files.
checkpoint, whole = folder / "checkpoint", lorax.unloraify(read)
lorax.peft.save_weights(checkpoint, whole, names=NAMES, max_shard_size="20kB")
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), whole
)
again = lorax.peft.load_weights(checkpoint, abstract, names=NAMES)
for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    assert x.sharding == y.sharding
    for ours, theirs in zip(x.addressable_shards, y.addressable_shards, strict=True):
        assert np.array_equal(ours.data, theirs.data)
try:
    lorax.peft.save_weights(file / "not a folder", whole, names=NAMES)
except OSError as error:
    assert (index == 0) != ("first process" in str(error)), error
else:
    raise AssertionError("It was written below a file.")
options = {"filter": "blocks", "format": "int8"}
quantised = lorax.peft.load_weights(checkpoint, abstract, names=NAMES, quantise=options)
expected = lorax.quantise(whole, **options)
for x, y in zip(jax.tree.leaves(quantised), jax.tree.leaves(expected), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for ours, theirs in zip(x.addressable_shards, y.addressable_shards, strict=True):
        assert np.array_equal(ours.data, theirs.data)

merged = lorax.unloraify(read, donate=True)
assert merged.blocks.gate.weight.sharding == model.blocks.gate.weight.sharding
assert model.blocks.gate.weight.is_deleted()

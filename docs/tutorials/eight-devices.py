# %% [markdown]
# # A scanned transformer on eight devices
#
# **What you will have:** a transformer whose layers are stacked, scanned and split over a mesh of eight devices, with
# adapters that are split like it. It learns what it learns on one device. The adapter, trained on eight devices, is then
# loaded on one.
#
# No accelerator is needed: XLA can divide a CPU into eight devices. This has to be said before JAX starts. On eight real
# devices, leave out the line with `XLA_FLAGS`. The tutorial shares files with the examples of the project, so it runs in
# a clone. This makes one, and installs what is needed:
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[examples]'
# cd docs/tutorials
# ```

# %%
import os


os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import sys
import sysconfig
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax


sys.path.append("../../examples")
import toolbox


STEPS, WIDTH = 200, 128
LENGTH, LAYERS = 64, 4
print(jax.devices())

# %% [markdown]
# ## A stack of layers
#
# `eqx.filter_vmap` makes all layers at once: each of their arrays has a leading axis for the layers. `jax.lax.scan` runs
# over this axis, so XLA compiles one layer and not four. `jax.checkpoint` computes each layer again in the backward pass,
# so that only its input is kept.


# %%
class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list[eqx.nn.LayerNorm]

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=keys[0])
        self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]

    def __call__(self, x):
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        y = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))


class Transformer(eqx.Module):
    bytes: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: Block  # each array with a leading axis for the layers
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.bytes = eqx.nn.Embedding(256, WIDTH, key=keys[0])
        self.positions = eqx.nn.Embedding(LENGTH, WIDTH, key=keys[1])
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(keys[2], LAYERS))
        self.head = eqx.nn.Linear(WIDTH, 256, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.bytes)(tokens) + self.positions.weight[: len(tokens)]
        arrays, rest = eqx.partition(self.blocks, eqx.is_array)

        @jax.checkpoint
        def layer(x, arrays):
            return eqx.combine(arrays, rest)(x), None

        x, _ = jax.lax.scan(layer, x, arrays)
        return jax.vmap(self.head)(x)


# %% [markdown]
# ## On a mesh
#
# The mesh has two axes: batches are split over `data`, and matrices over `model`. As in Megatron, the first matrices of
# attention and MLP are split by their outputs, and the last ones by their inputs. So nothing has to be exchanged in
# between. The leading axis is that of the layers.

# %%
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
ROWS, COLUMNS = P(None, "model", None), P(None, None, "model")
SPLIT = {
    "query_proj.weight": ROWS,
    "key_proj.weight": ROWS,
    "value_proj.weight": ROWS,
    "output_proj.weight": COLUMNS,
    "up.weight": ROWS,
    "up.bias": P(None, "model"),
    "down.weight": COLUMNS,
}


def on_mesh(model):
    def place(path, x):
        if not eqx.is_array(x):
            return x
        name = ".".join(
            jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-2:]
        )
        return jax.device_put(x, NamedSharding(mesh, SPLIT.get(name, P())))

    return jax.tree_util.tree_map_with_path(place, model)


# %% [markdown]
# ## Training, wherever the arrays are
#
# The step says nothing about devices. JAX sees where its arguments are, and divides the work.


# %%
def loss(params, frozen, rows):
    logits = jax.vmap(lorax.combine(params, frozen))(rows)
    return toolbox.next_token_loss(logits, rows)


@eqx.filter_jit
def step(params, frozen, state, optimizer, rows):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, rows)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


def fit(params, frozen, rows, learning_rate, sharding):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, STEPS))
    state = optimizer.init(params)
    losses = []
    for _, batch in zip(range(STEPS), toolbox.batches(rows, 16, seed=0)):
        batch = jax.device_put(batch, sharding)
        params, state, value = step(params, frozen, state, optimizer, batch)
        losses.append(float(value))
    return params, losses


over_data = NamedSharding(mesh, P("data"))

# %% [markdown]
# The transformer first learns English, from Python's own documentation. All of its weights are trained, on the mesh.
# Nothing is downloaded, so it is a small model with little knowledge.

# %%
prose, _ = toolbox.token_rows(toolbox.documentation(), LENGTH, held_out=64, seed=0)
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
source = b"\n".join(file.read_bytes() for file in files[:40])
programs, held_out = toolbox.token_rows(source, LENGTH, held_out=64, seed=0)

plain = on_mesh(Transformer(jax.random.key(0)))
params, frozen = eqx.partition(plain, eqx.is_inexact_array)
params, _ = fit(params, frozen, prose, 3e-3, over_data)
plain = eqx.combine(params, frozen)


@eqx.filter_jit
def held_out_loss(model):
    return toolbox.next_token_loss(jax.vmap(model)(held_out), held_out)


print(f"loss on Python programs, held out: {held_out_loss(plain):.3f}")

# %% [markdown]
# ## Adapters, split like their bases
#
# The model is on its mesh. Now `lorax.loraify` puts an *adapter* beside each matrix `w`, its frozen *base*. An adapter is two
# small *factors* `b` and `a`, and the layer computes with `w + b·a`. [`b` is split like the rows of its base, `a` like the
# columns](../sharding.md#factors-are-sharded-like-their-base). Both have the axis of the layers.

# %%
adapted = lorax.loraify(plain, "blocks", rank=8, key=jax.random.key(1))
print(lorax.summary(adapted))
print()
for name in ("up", "down"):
    weight = getattr(adapted.blocks, name).weight
    for part in ("w", "b", "a"):
        array = getattr(weight, part)
        on_each = array.sharding.shard_shape(array.shape)
        print(f"{name}.{part}  {array.shape!s:15} on each device {on_each}")


# %% tags=["picture"] alt="The matrix of `up` and its `b` are split by rows into four parts, that of `down` and its `a` by columns."
def draw(axes, array, left, top, name):
    """The parts of a layer's matrix, in the colours of the devices that hold them."""
    holders = {}
    for shard in array.addressable_shards:
        _, rows, columns = [
            part.indices(n) for part, n in zip(shard.index, array.shape)
        ]
        box = (
            left + columns[0],
            top + rows[0],
            columns[1] - columns[0],
            rows[1] - rows[0],
        )
        holders.setdefault(box, []).append(shard.device.id)
    for (x, y, width, height), devices in holders.items():
        color = f"C{devices[0]}" if len(holders) > 1 else "#999999"
        style = dict(facecolor=color, edgecolor="#fefefe", linewidth=1)
        axes.add_patch(plt.Rectangle((x, y), width, height, **style))
        if min(width, height) > 50:
            text = " and ".join(map(str, devices))
            axes.text(
                x + width / 2, y + height / 2, text, color="w", ha="center", va="center"
            )
    rows, columns = array.shape[1:]
    if rows > columns / 4:
        axes.text(
            left + columns / 2,
            top + rows + 14,
            name,
            ha="center",
            va="top",
            weight="bold",
        )
    else:
        axes.text(
            left - 14, top + rows / 2, name, ha="right", va="center", weight="bold"
        )


figure, grid = plt.subplots(1, 2, figsize=(7.5, 4.3), width_ratios=[1, 2.6])
for axes, name, split in zip(grid, ("up", "down"), ("rows", "columns")):
    weight = getattr(adapted.blocks, name).weight
    columns = weight.w.shape[2]
    draw(axes, weight.w, 0, 0, "w")
    draw(axes, weight.b, columns + 24, 0, "b")
    draw(axes, weight.a, 0, -32, "a")
    axes.set_title(f"{name}: split by {split}")
    axes.set(xlim=(-50, columns + 60), ylim=(4 * WIDTH + 60, -60), aspect="equal")
    axes.set_axis_off()

# %% [markdown]
# ## On eight devices, and on one
#
# The same training twice: on the mesh, and with everything on the first device.

# %%
params, frozen = lorax.partition(adapted)
trained, losses = fit(params, frozen, programs, 1e-2, over_data)
model = lorax.combine(trained, frozen)
print(f"loss on Python programs, held out: {held_out_loss(model):.3f}")

first = jax.devices()[0]
alone, rest = jax.device_put((params, eqx.filter(frozen, eqx.is_array)), first)
rest = eqx.combine(rest, frozen)
alone, losses_alone = fit(alone, rest, programs, 1e-2, first)
difference = max(abs(x - y) for x, y in zip(losses, losses_alone))
print(f"largest difference of the losses of {STEPS} steps: {difference:.0e}")

# %% tags=["picture"] alt="The two curves of the loss are on top of each other."
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(losses_alone, label="one device", lw=4, alpha=0.35)
axes.plot(losses, label="eight devices", lw=1)
axes.set(title="Loss while the adapters learn programs", xlabel="step")
axes.legend()

# %% [markdown]
# The losses agree to 2e-06: several devices add up float32 numbers in another order. The adapters bring the loss on Python
# programs, for the next byte, from 2.61 to 2.12. Each device holds a third of the weights and half of the adapters, since
# norms, embeddings and one of the two factors are whole on each of them. Eight virtual devices on two cores are no faster
# than one. What adapters add to the time of a step [was measured](../sharding.md#step-time-by-number-of-devices) for
# several meshes.
#
# ## Somewhere else
#
# The file knows nothing of the mesh. It loads into the plain model on one device, or on another mesh.

# %%
lorax.save_adapter("programs.safetensors", model)

one = jax.tree.map(lambda x: jax.device_put(x, first) if eqx.is_array(x) else x, plain)
loaded = lorax.load_adapter("programs.safetensors", one)
print(
    f"on {len(loaded.blocks.up.weight.b.devices())} device: {held_out_loss(loaded):.3f}"
)

# %% [markdown]
# ## What to try next
#
# - Another `sharding=` for the factors, such as `P()` for whole ones on each device: [Several devices](../sharding.md).
# - [Explicit axes](../sharding.md#explicit-axes), where shardings are part of types.
# - [Several machines](../distributed.md): `examples/distributed_finetune.py` trains MiniLM like this in several processes, and
#   goes on after any of them was killed.
# - [Plan](../planning.md) what a model of your size needs, before you have the devices.

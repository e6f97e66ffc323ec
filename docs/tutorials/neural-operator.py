# %% [markdown]
# # A neural operator
#
# **What you will have:** a Fourier neural operator that forecasts one liquid, adapted to a thinner one from a handful of
# simulations. Its main weights are in a layer of somebody else's: arrays of four axes, which are multiplied in Fourier
# space and not by any layer of Equinox.
#
# The model comes from [PDEquinox](https://github.com/Ceyron/pdequinox), a package of Equinox models for partial differential
# equations. The package has no trained weights. So the model is trained here first, on simulations that are made here, too.
# All of it takes a few minutes on two cores.
#
# The tutorial shares a file with the examples of the project, so it runs in a clone. This makes one, and installs what is
# needed:
#
# ```sh
# git clone https://github.com/eqx-lorax/eqx-lorax
# cd eqx-lorax
# pip install -e '.[examples]'
# pip install --no-deps pdequinox==0.1.2
# cd docs/tutorials
# ```

# %%
import functools
import os
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pdequinox

import eqx_lorax as lorax


sys.path.append("../../examples")
import toolbox


PRETRAIN_STEPS, STEPS, MANY = 1500, 300, 1024
POINTS = 128

# %% [markdown]
# ## The data: Burgers' equation
#
# `u` is the velocity of a fluid on a circle. Fast parts catch up with slow ones and form steep fronts, and the viscosity
# smooths them: ∂u/∂t + u ∂u/∂x = ν ∂²u/∂x². The solver below works in Fourier space, with an integrating factor and the
# classical Runge-Kutta method.


# %%
@functools.partial(jax.jit, static_argnums=1)
def solve(starts, viscosity, time=1.0, steps=400):
    """The velocities at `time`, for velocities at 128 points at time 0."""
    waves = jnp.fft.rfftfreq(POINTS, 1 / POINTS)
    is_kept = waves < POINTS / 3  # against aliasing
    dt = time / steps
    half = jnp.exp(-viscosity * waves**2 * dt / 2)

    def slope(u):
        return -0.5j * waves * is_kept * jnp.fft.rfft(jnp.fft.irfft(u) ** 2)

    def step(u, _):
        a = slope(u)
        b = slope(half * (u + dt / 2 * a))
        c = slope(half * u + dt / 2 * b)
        d = slope(half * (half * u + dt * c))
        u = half**2 * (u + dt / 6 * a) + dt / 3 * half * (b + c) + dt / 6 * d
        return u, None

    u, _ = jax.lax.scan(step, jnp.fft.rfft(starts), length=steps)
    return jnp.fft.irfft(u)


def simulations(key, count, viscosity):
    """Pairs of velocities, at times 0 and 1, with an axis for the single channel."""
    x = 2 * jnp.pi * jnp.arange(POINTS) / POINTS
    sizes, phases = jax.random.normal(key, (2, count, 5, 1)) / 2
    waves = jnp.sin(jnp.arange(1, 6)[:, None] * x + 20 * phases)
    starts = (sizes * waves).sum(1)
    return starts[:, None], solve(starts, viscosity)[:, None]


keys = jax.random.split(jax.random.key(0), 4)
thick, thick_test = simulations(keys[0], MANY, 0.1), simulations(keys[1], 256, 0.1)
thin, thin_test = simulations(keys[2], 64, 0.03), simulations(keys[3], 256, 0.03)

# %% [markdown]
# There are 1,024 simulations of the thick liquid, of viscosity 0.1, and 64 of the thin one, of viscosity 0.03. For each
# liquid, 256 more are held out.

# %% [markdown]
# ## The model
#
# `ClassicFNO` is a chain of blocks. Each has a *spectral convolution*, which multiplies the lowest Fourier modes by matrices
# of their own, and a plain convolution beside it.


# %%
def make(key):
    return pdequinox.arch.ClassicFNO(
        1, 1, 1, hidden_channels=32, num_modes=24, num_blocks=4, key=key
    )


@eqx.filter_jit
def error(operator, pairs):
    """The norm of what is wrong over the norm of the solution, on average."""
    starts, ends = pairs
    wrong = jax.vmap(operator)(starts) - ends
    return jnp.mean(jnp.linalg.norm(wrong, axis=-1) / jnp.linalg.norm(ends, axis=-1))


# %% [markdown]
# This error is what is trained and what is reported. One function trains whatever is in `params`.


# %%
def loss(params, frozen, pairs):
    return error(lorax.combine(params, frozen), pairs)


@eqx.filter_jit
def step(params, frozen, state, optimizer, batch):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, batch)
    updates, state = optimizer.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


def fit(params, frozen, pairs, learning_rate, steps):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    state = optimizer.init(params)
    size = min(16, len(pairs[0]))
    for _, batch in zip(range(steps), toolbox.batches(pairs, size, seed=0)):
        params, state, _ = step(params, frozen, state, optimizer, batch)
    return lorax.combine(params, frozen)


params, frozen = eqx.partition(make(jax.random.key(1)), eqx.is_inexact_array)
operator = fit(params, frozen, thick, 2e-3, PRETRAIN_STEPS)
print(f"error, thick liquid: {error(operator, thick_test):.3f}")
print(f"error, thin liquid:  {error(operator, thin_test):.3f}")

# %% [markdown]
# ## Adapters in Fourier space
#
# An *adapter* is a pair of small arrays, its *factors* `a` and `b`, beside a frozen array. The update is their product, and has
# low *rank* as a matrix. So somebody must say what the *rows* and the *columns* of the array are. The weights of a
# spectral convolution have the axes (1, out, in, modes), one array for the real and one for the imaginary parts. Here
# the outputs are the rows, and inputs and modes together are the columns. A
# [`lorax.LoraSpec`](../function-door.md#which-axes) says so. The first axis is a *batch* axis, which both factors have. The plain
# convolutions are adapted as usual.

# %%
spectral = lorax.LoraSpec(8, rows=(1,), columns=(2, 3), batch=(0,))

adapted = lorax.loraify(
    operator,
    ["weights_real", "weights_imag", "by_pass_conv"],
    rank={"weights_*": spectral, "*": 4},
    key=jax.random.key(2),
)
print(lorax.summary(adapted))

# %% [markdown]
# The code of PDEquinox is untouched. It adds the real and the imaginary part to a complex array, and such a sum has no
# factored form. So there the library forms the dense array, and says so in a
# [`lorax.MaterialiseWarning`](../materialised.md). The result is the same. The array has 24,576 numbers, so here it is no
# loss, and the warning is switched off.

# %%
warnings.simplefilter("ignore", lorax.MaterialiseWarning)

# %% [markdown]
# ## From a handful of simulations
#
# The same steps train the adapters, all weights, and all weights of a fresh model, from 4, 16 and 64 simulations of the
# thin liquid. The learning rates were chosen on other simulations.

# %%
ways = {
    "from scratch": (
        eqx.partition(make(jax.random.key(3)), eqx.is_inexact_array),
        3e-3,
    ),
    "all weights": (eqx.partition(operator, eqx.is_inexact_array), 1e-3),
    "adapters": (lorax.partition(adapted), 3e-3),
}
counts = [4, 16, 64]
models, errors = {}, {name: [] for name in ways}
print(f"{'simulations':14}" + "".join(f"{count:8}" for count in counts))
for name, ((params, frozen), learning_rate) in ways.items():
    for count in counts:
        few = toolbox.rows(thin, slice(count))
        models[name, count] = fit(params, frozen, few, learning_rate, STEPS)
        errors[name].append(float(error(models[name, count], thin_test)))
    print(f"{name:14}" + "".join(f"{value:8.3f}" for value in errors[name]))
print(f"{'untouched':14}{error(operator, thin_test):8.3f}")

# %% [markdown]
# From 16 simulations, the adapters bring the error from 0.368 to 0.076. A fresh model, trained on these alone, is at
# 0.183. Training all weights does about as well as the adapters. It has four times as many numbers to train, to store for
# each liquid, and to keep in the state of the optimizer. These are runs of one seed each.

# %% tags=["picture"] alt="The error falls with the number of simulations, and that of the adapters is half of that from scratch; a forecast that follows the simulation."
figure, (left, right) = plt.subplots(1, 2, width_ratios=[1, 1.2], figsize=(7.5, 3.3))
left.axhline(error(operator, thin_test), color="#999999", ls="--", label="untouched")
for name, color in zip(ways, ["#999999", "C1", "C0"]):
    left.loglog(counts, errors[name], "o-", color=color, label=name)
left.set_xticks(counts, list(map(str, counts)))
left.minorticks_off()
left.set(title="Error on the thin liquid", xlabel="simulations", ylim=(0.02, 0.6))
left.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
left.legend(loc="lower left", fontsize=8.5)
x = 2 * np.pi * np.arange(POINTS) / POINTS
start, end = (pairs[0, 0] for pairs in thin_test)
right.plot(x, start, color="#999999", lw=1, ls=":", label="start")
right.plot(x, end, color="#999999", lw=5, alpha=0.4, label="simulation")
right.plot(x, operator(start[None])[0], "C1--", lw=1.3, label="untouched")
right.plot(
    x, models["adapters", 16](start[None])[0], "C0", lw=1.4, label="adapters, 16"
)
right.set(title="A held-out forecast", xlabel="place", xticks=[])
right.legend(fontsize=8.5)

# %% [markdown]
# ## One model for both
#
# The adapters are taken off again without a trace, so that one model serves both liquids. Merged, they make a plain
# `ClassicFNO` for the thin one.

# %%
thin_model = models["adapters", counts[-1]]
off = lorax.unloraify(thin_model, merge=False)
print(f"thick liquid, adapters taken off: {error(off, thick_test):.3f}")
merged = lorax.unloraify(thin_model)
print(f"thin liquid, adapters merged:     {error(merged, thin_test):.3f}")
assert jax.tree.structure(merged) == jax.tree.structure(operator)

lorax.save_adapter("thin.safetensors", thin_model)
print(f"a file of {os.path.getsize('thin.safetensors') / 1e3:.0f} kB")

# %% [markdown]
# ## What to try next
#
# - Modes as a batch axis, `LoraSpec(2, rows=(1,), columns=(2,), batch=(0, 3))`: an update for each mode by itself.
# - Viscosities in between: [`lorax.scale`](../many-adapters.md#adding-up) takes half of an adapter.
# - [What is materialised](../materialised.md), and what stays factored.

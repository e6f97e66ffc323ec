"""LoRA+: the factor on the output side learns faster."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from helpers import assert_close, assert_identical, filled, trained, weights, wide
from steps import arrays_like, take_steps

import eqx_lorax as lorax


# Adam mixes dtypes.
pytestmark = pytest.mark.usefixtures("as_for_users")


class Model(eqx.Module):
    """Every kind of layer, and arrays that are trained as they are."""

    words: eqx.nn.Embedding
    stack: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        make = lambda key: eqx.nn.Linear(4, 3, key=key)  # noqa: E731
        self.words = eqx.nn.Embedding(5, 4, key=keys[0])
        self.stack = eqx.filter_vmap(make)(keys[1:3])
        self.conv = eqx.nn.Conv1d(3, 4, 2, key=keys[3])
        self.cell = eqx.nn.GRUCell(4, 3, key=keys[4])
        self.head = eqx.nn.Linear(3, 2, key=keys[5])


@pytest.fixture(scope="module")
def adapted():
    key = jax.random.PRNGKey(0)
    filters = ["words", "stack", "conv", "cell.weight_ih"]
    make = lambda _, key: lorax.loraify(Model(key), filters, rank=2, key=key)  # noqa: E731
    return filled(make, jnp.float32, key)


def mark_fast(params):
    """By hand: `b` in layers, `a` in the table."""
    places = lambda m: [  # noqa: E731
        m.words.weight.a,
        m.stack.weight.b,
        m.conv.weight.b,
        m.cell.weight_ih.b,
    ]
    slow = jax.tree.map(lambda _: "slow", params)
    return eqx.tree_at(places, slow, ["fast"] * 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: optax.sgd(rate, momentum=0.9),
        lambda rate: optax.chain(optax.clip(0.5), optax.adamw(rate, weight_decay=0.3)),
    ],
    ids=["sgd", "adamw"],
)
def test_it_is_as_two_groups(adapted, make):
    """With a schedule, and arrays that are no factors."""
    params, _ = lorax.partition(adapted, also="head")
    gradients = [arrays_like(params, seed) for seed in range(3)]
    rate = optax.exponential_decay(0.01, 1, 0.7)
    groups = {"slow": make(rate), "fast": make(lambda step: 8 * rate(step))}
    labels = mark_fast(params)
    wanted = optax.multi_transform(groups, lambda _: labels)
    found = take_steps(lorax.lora_plus(make(rate), ratio=8), params, gradients)
    assert_close(found, take_steps(wanted, params, gradients), 1e-6)


def test_the_formulas():
    """Two steps of gradient descent and of AdamW, by NumPy."""
    key = jax.random.key(1)
    linear = trained(lorax.loraify(eqx.nn.Linear(4, 3, key=key), rank=2, key=key))
    params, _ = lorax.partition(linear)
    gradients = [arrays_like(params, seed) for seed in range(2)]
    found = take_steps(lorax.lora_plus(optax.sgd(0.1), 5.0), params, gradients)[-1]
    for name, rate in (("b", 0.5), ("a", 0.1)):
        start, *steps = (wide(getattr(x.weight, name)) for x in [params, *gradients])
        assert_close(getattr(found.weight, name), start - rate * sum(steps))

    decayed = optax.adamw(0.1, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.2)
    found = take_steps(lorax.lora_plus(decayed, 5.0), params, gradients)[-1]
    for name, rate in (("b", 0.5), ("a", 0.1)):
        x, *steps = (wide(getattr(x.weight, name)) for x in [params, *gradients])
        mean = square = np.zeros_like(x)
        for t, g in enumerate(steps, 1):
            mean = 0.9 * mean + 0.1 * g
            square = 0.99 * square + 0.01 * g**2
            new = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8)
            x = x - rate * (new + 0.2 * x)
        assert_close(getattr(found.weight, name), x)


def test_parameters_of_functions():
    """The last axis is the output, whichever factor has it, but in layers that say
    otherwise."""
    tree = {
        "kernel": normal(5, 4),
        "heads": normal(4, 2, 3),
        "other": normal(4, 5),
        "frozen": normal(4, 5),
        "scale": normal(3),
        "linear": eqx.nn.Linear(4, 3, use_bias=False, key=jax.random.key(0)),
    }
    spec = {
        "kernel": 2,
        "heads": lorax.LoraSpec(2, rows=(0,), columns=(1, 2)),
        "other": lorax.LoraSpec(2, rows=(1,), columns=(0,)),
        "frozen": lorax.LORA_FREEZE,
        "scale": lorax.LORA_FULL,
        "linear": 2,
    }
    params = lorax.init_lora(tree, spec, jax.random.key(0))
    gradient = jax.tree.map(jnp.ones_like, params)
    optimizer = lorax.wrap_optimizer(lorax.lora_plus(optax.sgd(1.0), 3.0), spec)
    (found,) = take_steps(optimizer, params, [gradient])
    assert_identical(found["frozen"], tree["frozen"])
    assert_close(found["scale"], tree["scale"] - 1)
    # In the order of the names: heads, kernel, linear, other.
    for fast, old, new in zip("aabb", weights(params), weights(found), strict=True):
        assert_identical(old.w, new.w)
        for factor in ("a", "b"):
            step = getattr(old, factor) - getattr(new, factor)
            assert_close(step, jnp.full(step.shape, 3.0 if factor == fast else 1.0))

    # The wrapper may also be inside.
    optimizer = lorax.lora_plus(lorax.wrap_optimizer(optax.sgd(1.0), spec), 3.0)
    assert_close(take_steps(optimizer, params, [gradient])[0], found)


def test_other_methods():
    """Every trained factor of the output side, and nothing else."""

    def make(_, key):
        model = [eqx.nn.Linear(6, 6, use_bias=False, key=key) for _ in range(5)]
        names = ["dora", "loha", "adalora", "lora_fa", "ia3"]
        methods = {str(i): name for i, name in enumerate(names)}
        return lorax.loraify(model, rank=2, method=methods, key=key)

    params, _ = lorax.partition(filled(make, jnp.float32, jax.random.PRNGKey(2)))
    ones = jax.tree.map(jnp.ones_like, params)
    optimizer = lorax.lora_plus(optax.sgd(1.0), 4.0)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    fast = [{"b"}, {"b1", "b2"}, {"b"}, {"b"}, set()]
    for weight, expected in zip(weights(updates), fast, strict=True):
        arrays = {name: getattr(weight, name) for name in weight.axes}
        found = {name for name, x in arrays.items() if x is not None and x.min() == -4}
        assert found == expected
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones)
    updates, _ = optimizer.update(narrow, optimizer.init(narrow), narrow)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}


@pytest.mark.own_errors
def test_errors(adapted):
    with pytest.raises(ValueError, match="no trained factors.*lorax.partition"):
        lorax.lora_plus(optax.sgd(0.1)).init({"w": jnp.ones(3)})
    for ratio in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="ratio=.*Pass 1 for plain LoRA"):
            lorax.lora_plus(optax.sgd(0.1), ratio)


def test_a_ratio_of_one_changes_nothing(adapted):
    params, _ = lorax.partition(adapted)
    gradients = [arrays_like(params)]
    found = take_steps(lorax.lora_plus(optax.adam(0.1), 1), params, gradients)
    assert_identical(found, take_steps(optax.adam(0.1), params, gradients))

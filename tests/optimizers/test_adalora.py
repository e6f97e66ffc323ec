"""AdaLoRA: pruning by importance, down to a budget, and the penalty beside it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_identical, weights, wide
from steps import arrays_like, take_steps

import eqx_lorax as lorax
from eqx_lorax._optimizers.budget import Budget


STEPS = dict(total_steps=12, warmup_steps=2, final_steps=4, interval=3)
RATE = 0.1


def make_weights(rank=4):
    """A stack of two matrices, the kernel of a convolution, and an array that has no
    adapter."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    stack = [draw(2, 5, 6), draw(2, 5, rank), draw(2, rank, 6), draw(2, rank)]
    kernel = [draw(4, 3, 2), draw(4, rank), draw(rank, 3, 2), draw(rank)]
    axes = dict(rows=(-3,), columns=(-2, -1))
    return {
        "stack": lorax.AdaLoraWeight(*stack, alpha=3.0),
        "kernel": lorax.AdaLoraWeight(*kernel, alpha=2.0, **axes),
        "bias": draw(3),
    }


def matrices_of(tree):
    """For each matrix its triplets: the rows of `bᵀ`, `a` and the gate, in float64."""
    found = []
    for x in weights(tree):
        rank, batch = x.gate.shape[-1], x.gate.size // x.gate.shape[-1]
        b = wide(x.b).reshape(batch, -1, rank).transpose(0, 2, 1)
        a, gate = wide(x.a).reshape(batch, rank, -1), wide(x.gate).reshape(batch, -1, 1)
        found += [list(parts) for parts in zip(b, a, gate)]
    return found


def prune(params, gradients):
    """The gates after each step of gradient descent, by algorithm 1 of the paper, with
    the settings of `STEPS`, down to two triplets a matrix."""
    warmup, last, interval, beta, start, target = 2, 8, 3, 0.85, 12, 6
    parts = matrices_of(params)
    smooth, spread = ([[0 * x for x in part] for part in parts] for _ in range(2))
    kept = [np.ones(4, bool) for _ in parts]
    for step, gradient in enumerate(map(matrices_of, gradients), 1):
        for i, part in enumerate(parts):
            for j, (x, g) in enumerate(zip(part, gradient[i])):
                new = abs(x * g)
                if step < last:
                    smooth[i][j] = beta * smooth[i][j] + (1 - beta) * new
                    off = abs(new - smooth[i][j])
                    spread[i][j] = beta * spread[i][j] + (1 - beta) * off
                part[j] = x - RATE * g
        if step == last or (warmup < step < last and step % interval == 0):
            left = (last - step) / (last - warmup)
            budget = int((start - target) * left**3 + target)
            scores = [
                sum((x * y).mean(1) for x, y in zip(*pair))
                for pair in zip(smooth, spread)
            ]
            least = np.sort(np.concatenate(scores))[start - budget]
            kept = [score >= least for score in scores]
        if step in (3, 6) or step >= last:
            for (_, _, gate), keep in zip(parts, kept):
                gate[~keep] = 0
        yield np.array([gate[:, 0] for _, _, gate in parts])


def gates_of(params):
    gates = [wide(x.gate) for x in weights(params)]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in gates])


def test_adalora():
    """Step by step as the paper says, and every other array as without it."""
    params, _ = lorax.partition(make_weights(), also="bias")
    gradients = [arrays_like(params, seed) for seed in range(12)]
    optimizer = lorax.adalora(optax.sgd(RATE), target_rank=2, **STEPS)
    found = take_steps(optimizer, params, gradients)
    wanted = prune(params, gradients)
    for x, y in zip(found, wanted, strict=True):
        assert_close(gates_of(x), y)
        assert np.array_equal(gates_of(x) == 0, y == 0)
    zeros = [int(np.sum(gates_of(x) == 0)) for x in found]
    assert zeros == [0, 0, 3, 0, 0, 6, 0, 6, 6, 6, 6, 6]
    plain = take_steps(optax.sgd(RATE), params, gradients)[-1]
    for name in ("stack", "kernel"):
        for factor in ("b", "a"):
            x, y = getattr(found[-1][name], factor), getattr(plain[name], factor)
            assert_identical(x, y)
    assert_identical(found[-1]["bias"], plain["bias"])


@pytest.mark.usefixtures("as_for_users")
def test_with_other_optimizers():
    """Adam with a schedule in a chain, gradients added up, arrays in bfloat16, a part
    of the factors frozen, and parameters of functions."""
    params, _ = lorax.partition(make_weights(), also="bias", exclude="kernel")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    gradients = [arrays_like(params, seed) for seed in range(24)]
    adam = optax.adamw(optax.linear_schedule(0.1, 0.0, 12), weight_decay=0.1)
    inner = optax.chain(optax.clip_by_global_norm(1.0), adam)
    optimizer = lorax.adalora(inner, target_rank=1.5, **STEPS)
    found = take_steps(optax.MultiSteps(optimizer, 2), params, gradients)
    zeros = [int(np.sum(wide(x["stack"].gate) == 0)) for x in found]
    assert zeros[:5] == [0] * 5 and zeros[15:] == [5] * 9
    assert found[-1]["stack"].gate.dtype == jnp.bfloat16

    # Of a function, frozen parameters included.
    params, spec = make_weights(), {"stack": 4, "kernel": 4, "bias": lorax.LORA_FREEZE}
    optimizer = lorax.adalora(optax.sgd(RATE), target_rank=1, **STEPS)
    optimizer = lorax.wrap_optimizer(optimizer, spec)
    found = take_steps(optimizer, params, [arrays_like(params)] * 12)[-1]
    assert np.sum(gates_of(found) == 0) == 9
    for x, y in zip(weights(found), weights(params), strict=True):
        assert_identical(x.w, y.w)
    assert_identical(found["bias"], params["bias"])


def test_the_state_is_of_trees_like_the_parameters():
    """So that it is sharded, planned and saved as they are."""
    params, _ = lorax.partition(make_weights(), also="bias")
    state = lorax.adalora(optax.sgd(RATE), target_rank=2, **STEPS).init(params)
    for tree in (state.importance, state.uncertainty):
        assert tree["bias"] is None
        for x, y in zip(weights(tree), weights(params), strict=True):
            assert [jnp.shape(z) for z in jax.tree.leaves(x)] == [
                z.shape for z in jax.tree.leaves(y)
            ]
    assert {x.dtype.name for x in jax.tree.leaves(state.kept)} == {"bool"}


def test_equal_scores_keep_to_the_budget():
    """Whatever the gradients are, as many triplets are left as were asked for."""
    params, _ = lorax.partition(make_weights())
    nothing = jax.tree.map(jnp.zeros_like, params)
    steps = dict(total_steps=1, warmup_steps=0, final_steps=0)
    optimizer = lorax.adalora(optax.sgd(RATE), target_rank=1, **steps)
    (found,) = take_steps(optimizer, params, [nothing])
    assert np.sum(gates_of(found) != 0) == 3


@pytest.mark.own_errors
def test_errors():
    make = lambda **others: lorax.adalora(  # noqa: E731
        optax.sgd(RATE), **{"target_rank": 2, **STEPS, **others}
    )
    params, _ = lorax.partition(make_weights())
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        make().update(params, make().init(params))
    for wrong in ({"w": jnp.ones(3)}, eqx.nn.Linear(3, 2, key=jax.random.key(0))):
        with pytest.raises(ValueError, match='no weights of AdaLoRA.*method="adalora"'):
            make().init(wrong)
    with pytest.raises(ValueError, match="target_rank=4.*12 triplets.*larger rank"):
        make(target_rank=4).init(params)
    with pytest.raises(ValueError, match="leave none of.*train longer"):
        make(warmup_steps=8)
    with pytest.raises(ValueError, match="interval=0.*at least 1"):
        make(interval=0)
    with pytest.raises(ValueError, match="beta2=1.0.*between 0 and 1"):
        make(beta2=1.0)
    with pytest.raises(ValueError, match='no factors of AdaLoRA.*method="adalora"'):
        lorax.orthogonality({"w": jnp.ones(3)})


def test_orthogonality():
    """The mean of the norms over all matrices, with a gradient where it is zero."""
    model = make_weights()
    stack, kernel = model["stack"], model["kernel"]
    pairs = [*zip(wide(stack.b), wide(stack.a))]
    pairs += [(wide(kernel.b), wide(kernel.a).reshape(4, -1))]
    grams = [gram for b, a in pairs for gram in (b.T @ b, a @ a.T)]
    norms = [np.linalg.norm(gram - np.eye(4)) for gram in grams]
    params, _ = lorax.partition(model)
    for tree in (model, params):
        assert_close(jax.jit(lorax.orthogonality)(tree), np.mean(norms))

    w, gate = jnp.ones((3, 3)), jnp.zeros(3)
    best = lorax.AdaLoraWeight(w, jnp.eye(3), jnp.eye(3), gate)
    penalty = lorax.filter_value_and_grad(lorax.orthogonality)
    value, gradient = eqx.filter_jit(penalty)(best)
    assert value == 0 and not np.any(gradient.b)


def test_the_budgets_are_those_of_the_schedule_of_peft():
    """At every step, in double precision: `int` cuts off."""
    for total, warmup, final, interval, start, target in [
        (100, 10, 20, 1, 96, 31),
        (97, 0, 0, 5, 144, 12),
        (60, 12, 1, 7, 12, 11),
    ]:
        table = Budget(total, warmup, final, interval).tabulate(start, target)
        for i, found in enumerate(table):
            step = i * interval
            left = 1 - (step - warmup) / (total - final - warmup)
            wanted = int((start - target) * left**3 + target)
            assert found == (start if step <= warmup else wanted)

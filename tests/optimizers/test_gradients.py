"""Corrected gradients: LoRA-FA and LoRA-Pro."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import normal
from helpers import assert_close, assert_identical, filled, weights, wide
from steps import arrays_like, take_steps

import eqx_lorax as lorax


class Model(eqx.Module):
    words: eqx.nn.Embedding
    stack: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        make = lambda key: eqx.nn.Linear(6, 5, use_bias=False, key=key)  # noqa: E731
        self.words = eqx.nn.Embedding(7, 4, key=keys[0])
        self.stack = eqx.filter_vmap(make)(keys[1:3])
        self.conv = eqx.nn.Conv2d(3, 4, 2, use_bias=False, key=keys[3])
        self.head = eqx.nn.Linear(3, 2, key=keys[4])


def make(method, dtype=jnp.float32, rank=3):
    def make(dtype, key):
        model, filters = Model(key), ["words", "stack", "conv"]
        return lorax.loraify(
            model, filters, rank=rank, alpha=6, method=method, dtype=dtype, key=key
        )

    return filled(make, dtype, jax.random.PRNGKey(0))


def flat(weight, b, a):
    """Factors of a weight as matrices in float64, with one batch axis."""
    rank = weight.rank
    batch = weight.w.shape[0] if weight.w.ndim == 3 else 1
    return wide(b).reshape(batch, -1, rank), wide(a).reshape(batch, rank, -1)


# LoRA-FA


@pytest.mark.usefixtures("as_for_users")
def test_lora_fa():
    """`(1 / s²) g (a aᵀ)⁻¹`, before the optimizer, and nothing else is changed."""
    model = make("lora_fa")
    params, frozen = lorax.partition(model, also="head")
    gradient = arrays_like(params)
    for given in (model, frozen):
        optimizer = lorax.lora_fa(optax.sgd(1.0), given)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        parts = weights(model), weights(gradient), weights(updates)
        for weight, g, new in zip(*parts, strict=True):
            b, a = flat(weight, g.b, weight.a)
            inverse = np.linalg.inv(a @ a.transpose(0, 2, 1))
            expected = -b @ inverse / weight.scale**2
            assert_close(flat(weight, new.b, weight.a)[0], expected, 1e-4)
            assert new.a is None and new.w is None
        assert_close(updates.head.weight, -gradient.head.weight)
    adam = optax.adam(optax.linear_schedule(0.1, 0.0, 3))
    chained = optax.chain(optax.clip(1.0), lorax.lora_fa(adam, frozen))
    take_steps(chained, params, [gradient, gradient])


def test_lora_fa_moves_the_weight_by_the_projected_gradient():
    """For a full gradient `G`, the weight moves by `-rate · G aᵀ (a aᵀ)⁻¹ a`."""
    linear = eqx.nn.Linear(6, 5, use_bias=False, key=jax.random.key(0))
    spec = eqx.tree_at(lambda x: x.weight, linear, lorax.LoraSpec(3, alpha=6))
    params = lorax.init_lora(linear, spec, jax.random.key(1), method="lora_fa")
    full, a = normal(5, 6), wide(params.weight.a)
    gradient = jax.grad(lambda x: jnp.sum(x.weight.materialise() * full))(params)
    optimizer = lorax.wrap_optimizer(lorax.lora_fa(optax.sgd(0.1), params), spec)
    (found,) = take_steps(optimizer, params, [gradient])
    change = wide(found.weight.materialise()) - wide(linear.weight)
    projection = a.T @ np.linalg.inv(a @ a.T) @ a
    assert_close(change, -0.1 * wide(full) @ projection, 1e-4)
    assert_identical(found.weight.a, params.weight.a)


@pytest.mark.own_errors
def test_errors_of_lora_fa():
    model = make("lora_fa")
    params, frozen = lorax.partition(model)
    with pytest.raises(ValueError, match=r"without its frozen part.*, frozen\)`"):
        lorax.lora_fa(optax.sgd(0.1), params)
    with pytest.raises(ValueError, match='weights of lora, and.*method="lora_fa"'):
        lorax.lora_fa(optax.sgd(0.1), make("lora"))
    with pytest.raises(ValueError, match='no adapters, and.*method="lora_fa"'):
        lorax.lora_fa(optax.sgd(0.1), model.head)
    optimizer = lorax.lora_fa(optax.sgd(0.1), frozen)
    with pytest.raises(ValueError, match="no weights of.*from the same model"):
        optimizer.init(lorax.partition(make("lora"))[0])
    with pytest.raises(ValueError, match="weight is trained.*from the same model"):
        optimizer.init(params.stack)
    wrong = lorax.partition(make("lora_fa", rank=2))[0]
    with pytest.raises(ValueError, match="weight is trained.*from the same model"):
        optimizer.update(wrong, optimizer.init(params), wrong)


# LoRA-Pro


def project(full, b, a):
    """The projection of a matrix to the tangent space `{b x + y a}`, by a basis of
    it."""
    rows, columns = full.shape
    basis = [
        np.outer(b[:, i], e).ravel() for i in range(b.shape[1]) for e in np.eye(columns)
    ]
    basis += [np.outer(e, a[i]).ravel() for i in range(len(a)) for e in np.eye(rows)]
    left, values, _ = np.linalg.svd(np.array(basis).T, full_matrices=False)
    left = left[:, values > 1e-9 * values.max()]
    return (left @ (left.T @ full.ravel())).reshape(full.shape)


def step_of(model, full, optimizer):
    """The new gradients, of a loss whose gradient in each weight is `full`."""
    params, frozen = lorax.partition(model)

    @jax.jit
    def step(params):
        def loss(params):
            found = weights(lorax.combine(params, frozen))
            terms = zip(found, full, strict=True)
            return sum(jnp.sum(x.materialise() * y) for x, y in terms)

        gradient = jax.grad(loss)(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return gradient, updates

    return step(params)


@pytest.mark.parametrize("start", ["trained", "fresh", "part"])
def test_lora_pro_is_the_projection_of_the_full_gradient(start):
    """Also where `b` is zero, or of a lower rank. Among the pairs that give it, it is
    the one nearest to the gradients of LoRA."""
    model = make("lora")
    keep = {"trained": [1, 1, 1], "fresh": [0, 0, 0], "part": [1, 1, 0]}[start]
    model = eqx.tree_at(
        lambda m: [x.b for x in weights(m)],
        model,
        replace_fn=lambda b: jnp.asarray(np.asarray(b) * np.array(keep), b.dtype),
    )
    full = [normal(*x.w.shape, seed=i) for i, x in enumerate(weights(model))]
    gradient, updates = step_of(model, full, lorax.lora_pro(optax.sgd(1.0)))
    everything = weights(model), full, weights(gradient), weights(updates)
    for weight, g, old, new in zip(*everything, strict=True):
        b, a = flat(weight, weight.b, weight.a)
        new_b, new_a = flat(weight, -new.b, -new.a)
        old_b, old_a = flat(weight, old.b, old.a)
        g = wide(g).reshape(len(b), b.shape[1], a.shape[2])
        found = weight.scale * (b @ new_a + new_b @ a)
        expected = [project(*x) for x in zip(g, b, a)]
        assert_close(found, np.array(expected), 1e-4)
        # Along `(x a, -b x)`, which changes nothing, it is nearest.
        rest = (new_a - old_a) @ a.transpose(0, 2, 1)
        rest = rest - b.transpose(0, 2, 1) @ (new_b - old_b)
        if start == "trained":
            assert_close(rest, np.zeros_like(rest), 1e-2)
        if start == "fresh":
            assert_close(new_a, np.zeros_like(new_a))


@pytest.mark.usefixtures("as_for_users")
def test_lora_pro_with_other_things():
    """Other starts, another method, arrays that are no factors, bfloat16, chains and
    schedules."""
    w, b, a = normal(5, 6), normal(5, 2, seed=2), normal(2, 6, seed=3)
    weights_of = {
        "lora": lorax.LoraWeight(w, b, a),
        "pissa": lorax.RelativeLoraWeight(w, b, a, b_start=b, a_start=a),
        "dora": lorax.DoraWeight(w, b, a, normal(5)),
    }
    params, _ = lorax.partition(weights_of)
    ones = jax.tree.map(jnp.ones_like, params)
    (found,) = take_steps(lorax.lora_pro(optax.sgd(1.0)), params, [ones])
    for name, is_adjusted in (("lora", True), ("pissa", True), ("dora", False)):
        assert np.allclose(found[name].b, b - 1) != is_adjusted
    assert_close(found["lora"].b, found["pissa"].b)

    params = {"lora": params["lora"], "head": b}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    gradients = [arrays_like(params, seed) for seed in range(2)]
    adam = optax.adam(optax.linear_schedule(0.1, 0.0, 3))
    found = take_steps(optax.chain(lorax.lora_pro(adam)), params, gradients)[-1]
    plain = take_steps(adam, params, gradients)[-1]
    assert found["lora"].b.dtype == jnp.bfloat16
    assert np.isfinite(wide(found["lora"].b)).all()
    assert not np.array_equal(found["lora"].b, plain["lora"].b)
    assert_identical(found["head"], plain["head"])


@pytest.mark.own_errors
def test_errors_of_lora_pro():
    optimizer = lorax.lora_pro(optax.sgd(0.1))
    params, _ = lorax.partition(make("lora"))
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        optimizer.update(params, optimizer.init(params))
    for wrong in ({"w": jnp.ones(3)}, lorax.partition(make("lora_fa"))[0]):
        with pytest.raises(ValueError, match="no plain LoRA.*use `optimizer` alone"):
            optimizer.init(wrong)

"""The functions for trees of parameters: specs, adapters, optimizers that know which
arrays are frozen."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from functions import dense, factored, normal
from helpers import assert_close, assert_identical, is_weight, trained

import eqx_lorax as lorax
from eqx_lorax import LORA_FREEZE, LORA_FULL, LoraSpec


PARAMS = {
    "embed": normal(9, 6),
    "layers": {"kernel": normal(3, 6, 6, seed=2), "bias": normal(3, 6, seed=3)},
    "conv": normal(3, 3, 4, 5, seed=4),
    "head": [normal(6, 2, seed=5), normal(2, seed=6)],
    "steps": jnp.int32(3),
}
SPEC = {
    "embed": LORA_FULL,
    "layers": {"kernel": LoraSpec(2, batch=(0,)), "bias": LORA_FREEZE},
    "conv": 3,
    "head": [1, LORA_FULL],
    "steps": LORA_FREEZE,
}
init = functools.partial(lorax.init_lora, PARAMS, rng=jr.key(0))


def test_init_lora():
    params = init(SPEC, alpha=6.0)
    kernel, conv, head = params["layers"]["kernel"], params["conv"], params["head"][0]
    assert (kernel.b.shape, kernel.a.shape) == ((3, 6, 2), (3, 2, 6))
    assert (conv.b.shape, conv.a.shape) == ((3, 3, 4, 3), (3, 5))
    assert (head.b.shape, head.a.shape, head.scale) == ((6, 1), (1, 2), 6.0)
    assert conv.scale == 2.0 and kernel.scale == 3.0
    assert kernel.w is PARAMS["layers"]["kernel"]
    for path in (lambda p: p["embed"], lambda p: p["steps"], lambda p: p["head"][1]):
        assert path(params) is path(PARAMS)
    for weight in (kernel, conv, head):
        assert not np.any(weight.b) and np.all(weight.a != 0)
    assert_identical(dense(params), PARAMS)


def test_init_lora_draws():
    """Normal with `stddev`; another target does not change the others; the dtype."""
    tree = {"a": jnp.zeros((400, 300)), "b": jnp.zeros((400, 300))}
    params = lorax.init_lora(tree, 50, jr.key(1), stddev=0.02, dtype=jnp.bfloat16)
    a = np.asarray(params["a"].a, np.float64)
    assert params["a"].a.dtype == params["a"].b.dtype == jnp.bfloat16
    assert abs(a.std() / 0.02 - 1) < 0.05 and abs(a.mean()) < 1e-3
    assert not np.array_equal(a, np.asarray(params["b"].a, np.float64))
    only = lorax.init_lora(tree, {"a": 50, "b": 0}, jr.key(1), 0.02, jnp.bfloat16)
    assert np.array_equal(only["a"].a, params["a"].a)


def test_a_prefix_of_a_spec():
    spec = {
        "embed": 2,
        "layers": LORA_FREEZE,
        "conv": LORA_FULL,
        "head": -1,
        "steps": 0,
    }
    params = init(spec)
    assert is_weight(params["embed"]) and not is_weight(params["layers"]["kernel"])
    split = lorax.split_lora_params(params, spec)
    assert split["layers"] == {"kernel": None, "bias": None}
    assert split["conv"] is PARAMS["conv"]


def test_spec_axes():
    kernel = normal(2, 4, 3, 5)
    for spec, b, a in [
        (LoraSpec(2, rows=(1,), columns=(2, 3), batch=(0,)), (2, 4, 2), (2, 2, 3, 5)),
        (LoraSpec(2, rows=(0, 1)), (2, 4, 2), (2, 3, 5)),
        (LoraSpec(2, columns=(0,)), (4, 3, 5, 2), (2, 2)),
        (LoraSpec(2, rows=(-1,), batch=(0, 1)), (2, 4, 5, 2), (2, 4, 2, 3)),
        (LoraSpec(2, batch=(1,)), (4, 2, 3, 2), (4, 2, 5)),
    ]:
        weight = lorax.init_lora(kernel, spec, jr.key(0))
        assert (weight.b.shape, weight.a.shape) == (b, a)
    weight = lorax.init_lora(
        kernel, LoraSpec(2, alpha=8, rank_stabilised=True), jr.key(0)
    )
    assert weight.scale == pytest.approx(8 / 2**0.5)


@pytest.mark.own_errors
@pytest.mark.parametrize(
    "spec, message",
    [
        (SPEC | {"head": [1, 4]}, r"head.1, of shape \(2,\), is a vector"),
        (SPEC | {"embed": 7}, r"rank 7 for embed, of shape \(9, 6\).*smaller side, 6"),
        (SPEC | {"embed": -3}, "rank -3 for embed"),
        (SPEC | {"steps": 1}, "steps"),
        (SPEC | {"embed": "lora"}, "'lora' at embed"),
        (SPEC | {"embed": True}, "True at embed"),
        (SPEC | {"head": [1]}, "at head it lacks 1"),
        (SPEC | {"extra": 0}, "at the root it has also extra"),
        (SPEC | {"layers": {"kernel": 2}}, "at layers it lacks bias"),
        (SPEC | {"layers": None}, "None at layers, where the parameters go on"),
        (SPEC | {"embed": LoraSpec(2, rows=(5,))}, "embed.*names an axis"),
        (SPEC | {"embed": LoraSpec(2, rows=(0, 1))}, "leaves no axes"),
        (SPEC | {"conv": LoraSpec(2, rows=(0,), columns=(1,))}, "each of the 4 axes"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    with pytest.raises(ValueError, match=message):
        init(spec)


@pytest.mark.own_errors
def test_adapting_twice():
    with pytest.raises(ValueError, match="conv already has an adapter"):
        lorax.init_lora(init(SPEC), SPEC, jr.key(0))
    with pytest.raises(ValueError, match="int32"):
        lorax.init_lora({"x": jnp.ones((3, 3), int)}, {"x": 1}, jr.key(0))


def test_simple_spec():
    seen = []

    def decide(path, x):
        seen.append(str(path))
        assert len(path) == len(str(path).split("/"))
        return 4 if "kernel" in path else LORA_FREEZE

    spec = lorax.simple_spec(PARAMS, decide, tune_vectors=True)
    assert spec["layers"] == {"kernel": 4, "bias": LORA_FREEZE}
    assert spec["head"] == [LORA_FREEZE, LORA_FULL] and spec["steps"] == LORA_FULL
    assert seen == ["conv", "embed", "head/0", "layers/bias", "layers/kernel"]
    assert set(jax.tree.leaves(lorax.simple_spec(PARAMS))) == {LORA_FREEZE}


def test_weights_of_jax_lorax():
    """`LoraWeight(w=, a=, b=, alpha=)` with the shapes of jax-lorax."""
    w, b, a = normal(5, 7), normal(5, 2), normal(2, 7, seed=2)
    weight = lorax.LoraWeight(w=w, a=a, b=b, alpha=4.0)
    assert_close(weight.materialise(), w + 2 * b @ a)
    w, b, a = normal(3, 3, 4, 5), normal(3, 3, 4, 2), normal(1, 1, 2, 5, seed=2)
    weight = lorax.LoraWeight(w=w, a=a, b=b, alpha=4.0)
    assert_close(weight.materialise(), w + 2 * b @ a)
    # These have three axes too, but not the layout of jax-lorax.
    w, b, a = normal(2, 1, 1), normal(1, 2, 1), normal(1, 1, 1, seed=2)
    weight = lorax.LoraWeight(w, b, a, rows=(0,), columns=(1,))
    assert (weight.rows, weight.columns, weight.a.shape) == ((-3,), (-2,), (1, 1, 1))


def test_what_jax_lorax_calls_otherwise():
    from eqx_lorax import constants

    assert (constants.LORA_FREEZE, constants.LORA_FULL) == (LORA_FREEZE, LORA_FULL)
    w, b, a = normal(5, 7), normal(5, 2), normal(2, 7, seed=2)
    weight = lorax.LoraWeight(w=w, a=a, b=b, alpha=4.0)
    assert weight.get_scale() == weight.scale == 2
    assert np.array_equal(weight.materialize(), weight.materialise())
    tree = {"w": weight, "v": normal(3)}
    merged = lorax.merge_params(tree, destructive=False, use_scaling=False)
    assert_close(merged["w"], w + b @ a)
    merged = lorax.merge_params(tree, destructive=False)
    assert_close(merged["w"], w + 2 * b @ a)


def test_split_and_combine():
    params = trained(init(SPEC))
    split = lorax.split_lora_params(params, SPEC)
    assert split["layers"]["bias"] is None and split["conv"].w is None
    assert split["conv"].a is params["conv"].a and split["embed"] is PARAMS["embed"]
    assert_identical(eqx.combine(split, params), params)


def test_merge_params():
    params = trained(init(SPEC))
    expected = dense(params)
    kept = lorax.merge_params(params, destructive=False)
    assert_close(kept, expected)
    assert jax.tree.structure(kept) == jax.tree.structure(PARAMS)
    copied = jax.tree.map(jnp.copy, params)
    merged = lorax.merge_params(copied)
    assert_close(merged, expected)
    assert copied["conv"].w.is_deleted() and not copied["embed"].is_deleted()
    assert not params["conv"].w.is_deleted()
    with pytest.raises(ValueError, match="no adapters"):
        lorax.merge_params(PARAMS)
    inside = jax.jit(lorax.merge_params)(trained(init(SPEC)))
    assert_close(inside, expected)


def test_merge_spares_what_is_tied():
    table = normal(9, 6)
    tree = {"embed": table, "tied": table, "head": table}
    params = lorax.init_lora(tree, {"embed": 2, "tied": 0, "head": 3}, jr.key(0))
    merged = lorax.merge_params(trained(params))
    assert np.array_equal(merged["tied"], table)
    numpy = lorax.init_lora(np.ones((4, 4), np.float32), 2, jr.key(0))
    assert_close(lorax.merge_params(numpy), np.ones((4, 4)))


def test_merge_checks_first():
    params = jax.tree.map(jnp.copy, init(SPEC))
    params["conv"] = eqx.tree_at(
        lambda w: w.b, params["conv"], jnp.full((3, 3, 4, 3), jnp.nan)
    )
    with pytest.raises(ValueError, match="not finite in conv"):
        lorax.merge_params(params)
    assert not params["layers"]["kernel"].w.is_deleted()


# Optimizers


def loss(params, x):
    layers, (kernel, bias) = params["layers"], params["head"]
    hidden = params["embed"][x] @ layers["kernel"][0] + layers["bias"][0]
    return ((hidden @ kernel + bias) ** 2).sum()


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), 2),
    "guarded": optax.apply_if_finite(optax.adam(1e-2), 2),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-2),
}
TREE = {key: PARAMS[key] for key in ("embed", "layers", "head", "conv")}
TREE_SPEC = {key: SPEC[key] for key in TREE} | {"head": [2, LORA_FULL]}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")  # Optax has some constants of its own.
def test_wrap_optimizer(name, as_for_users):
    optimizer = OPTIMIZERS[name]
    params = start = lorax.init_lora(TREE, TREE_SPEC, jr.key(0))
    wrapped = lorax.wrap_optimizer(optimizer, TREE_SPEC)
    state = jax.jit(wrapped.init)(params)
    trained_part = lorax.split_lora_params(params, TREE_SPEC)
    # The state equals that of an optimizer for the trained arrays only.
    alone = optax.with_extra_args_support(optimizer)
    assert_identical_shapes(state, jax.eval_shape(alone.init, trained_part))
    x = jnp.array([0, 4])

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lorax.lora(loss))(params, x)
        updates, state = wrapped.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    frozen = [p["layers"]["bias"] for p in (params, start)]
    for new, old in [frozen, *([p[k].w for p in (params, start)] for k in ["conv"])]:
        assert np.array_equal(new, old)
    assert np.array_equal(params["head"][0].w, start["head"][0].w)
    assert np.any(params["head"][0].b != start["head"][0].b)
    assert np.any(params["embed"] != start["embed"])
    assert np.any(params["head"][1] != start["head"][1])


def assert_identical_shapes(x, y):
    shapes = [[(i.shape, i.dtype) for i in jax.tree.leaves(tree)] for tree in (x, y)]
    assert shapes[0] == shapes[1]


@pytest.mark.heavy
def test_wrap_optimizer_with_line_search(as_for_users):
    """Such an optimizer gets the gradient and the function too."""
    params = lorax.init_lora(TREE, TREE_SPEC, jr.key(0))
    wrapped = lorax.wrap_optimizer(optax.lbfgs(), TREE_SPEC)
    adapted, x = lorax.lora(loss), jnp.array([0, 4])
    with jax.numpy_dtype_promotion("standard"):
        state = wrapped.init(params)
        losses = []
        for _ in range(3):
            value, gradient = jax.value_and_grad(adapted)(params, x)
            updates, state = wrapped.update(
                gradient, state, params,
                value=value, grad=gradient, value_fn=lambda p: adapted(p, x),
            )  # fmt: skip
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
    assert losses[2] < losses[1] < losses[0]


SEARCHES = {
    "lbfgs": optax.lbfgs(),  # with a zoom
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True)
    ),
}


@pytest.mark.heavy  # Line searches take long to compile.
@pytest.mark.parametrize("name", SEARCHES)
def test_value_and_grad_from_state(name, as_for_users):
    """The steps equal those for the trained arrays alone, with values computed anew."""
    tree, spec = TREE | {"steps": jnp.int32(3)}, TREE_SPEC | {"steps": LORA_FREEZE}
    params = trained(lorax.init_lora(tree, spec, jr.key(0)))
    part, x = lorax.split_lora_params(params, spec), jnp.array([0, 4])
    optimizer = SEARCHES[name]
    wrapped = lorax.wrap_optimizer(optimizer, spec)

    def value_fn(params, scale=1.0):
        return scale * lorax.lora(loss)(params, x)

    def value_of(part):
        return value_fn(eqx.combine(part, params))

    @jax.jit
    def step(params, state):
        value, grad = lorax.value_and_grad_from_state(value_fn, spec)(
            params, state=state
        )
        assert grad["layers"]["bias"] is None and grad["conv"].w is None
        updates, state = wrapped.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def step_alone(part, state):
        value, grad = jax.value_and_grad(value_of)(part)
        updates, state = optimizer.update(
            grad, state, part, value=value, grad=grad, value_fn=value_of
        )
        return optax.apply_updates(part, updates), state, value

    found, state, alone = params, wrapped.init(params), optimizer.init(part)
    values = []
    for _ in range(3):
        found, state, value = step(found, state)
        part, alone, expected = step_alone(part, alone)
        assert_close(value, expected, 1e-4)
        values.append(float(value))
    assert len({*values}) == 3
    assert_close(lorax.split_lora_params(found, spec), part, 1e-3)
    assert np.array_equal(found["layers"]["bias"], params["layers"]["bias"])
    twice = lorax.value_and_grad_from_state(value_fn, spec)(
        params, scale=2.0, state=wrapped.init(params)
    )
    assert_close(twice[0], 2 * values[0], 1e-4)


def test_frozen_arrays_are_handed_through(as_for_users):
    """An update returns frozen arrays as the same objects, also for NumPy."""
    wrapped = lorax.wrap_optimizer(optax.adam(1e-2), {"w": 2, "frozen": LORA_FREEZE})
    for kind in (jnp.asarray, np.asarray):
        tree = {"w": kind(normal(4, 4)), "frozen": kind(normal(3))}
        params = lorax.init_lora(tree, {"w": 2, "frozen": 0}, jr.key(0))
        updates, _ = wrapped.update(params, wrapped.init(params), params)
        new: Any = optax.apply_updates(params, updates)
        assert np.array_equal(new["frozen"], tree["frozen"])
        assert np.array_equal(new["w"].w, tree["w"])
    jaxpr = jax.make_jaxpr(lambda p: optax.apply_updates(p, updates))(params)
    handed = set(map(id, jaxpr.jaxpr.invars)) & set(map(id, jaxpr.jaxpr.outvars))
    assert len(handed) == 2


@pytest.mark.own_errors
def test_wrap_optimizer_errors():
    params = lorax.init_lora(TREE, TREE_SPEC, jr.key(0))
    for spec, tree, message in [
        (LORA_FREEZE, params, "freezes every parameter"),
        (TREE_SPEC, TREE, "no adapter but an array"),
        (TREE_SPEC | {"conv": LORA_FULL}, params, "LORA_FULL` at conv"),
        ({"embed": 1}, params, "at the root it lacks"),
    ]:
        with pytest.raises(ValueError, match=message):
            lorax.wrap_optimizer(optax.adam(1e-2), spec).init(tree)


def test_the_readme_of_jax_lorax(capsys, as_for_users):
    import jax_lorax_readme

    for donate in ("--donate", "--no-donate"):
        small = ["--dim", "64", "--layers", "4", "--rank", "8", "--steps", "40", donate]
        result = jax_lorax_readme.main(small)
        assert sorted(result.losses, reverse=True) == result.losses
        assert result.losses[-1] < 0.97 * result.losses[0]
        assert abs(result.difference) < 1e-4
    assert "Step: 39 loss:" in capsys.readouterr().out


def test_no_step_forms_a_dense_gradient(as_for_users):
    """The gradient of the whole tree has zeros for frozen arrays. If the optimizer does
    not use them, they are not computed."""
    w = {"w": factored((11, 13))}
    wrapped = lorax.wrap_optimizer(optax.adam(1e-2), {"w": 2})

    def step(params, state, x):
        gradient = jax.grad(lorax.lora(lambda p, x: (p["w"] @ x).sum()))(params, x)
        updates, state = wrapped.update(gradient, state, params)
        return lorax.split_lora_params(optax.apply_updates(params, updates), {"w": 2})

    compiled = jax.jit(step).lower(w, wrapped.init(w), normal(13)).compile()
    text = str(compiled.as_text())
    body = text[text.index("ENTRY") :]
    made = [line for line in body.splitlines() if "= f32[11,13]" in line]
    assert all("parameter(" in line for line in made)

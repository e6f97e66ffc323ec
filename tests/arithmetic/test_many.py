"""Several adapters of one model: stacking, scaling and adding up."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import few_cases
from helpers import (
    assert_close,
    assert_identical,
    equations,
    filled,
    run,
    weights,
    wide,
)

import eqx_lorax as lorax


def randomised(adapted, key):
    """The model's adapter as if trained: with random factors."""
    params, _ = lorax.partition(adapted)
    leaves, treedef = jax.tree.flatten(params)
    keys = jr.split(key, len(leaves))
    drawn = [0.5 * jr.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, drawn)


def make(case, getkey, ranks, **options):
    """The frozen model, its adapters, and inputs."""
    model = filled(case.make, jnp.float32, getkey())
    adapters, frozen = [], None
    for rank in ranks:
        adapted = lorax.loraify(model, case.filter, rank=rank, key=getkey(), **options)
        adapters.append(randomised(adapted, getkey()))
        _, frozen = lorax.partition(adapted)
    return adapters, frozen, case.inputs(jnp.float32)


@few_cases
def test_a_batch_of_several_adapters(case, getkey):
    """A batch equals one run for each example, also for the base alone, and nothing is
    compiled again."""
    adapters, frozen, inputs = make(case, getkey, [case.rank] * 3, alpha=3.0)
    stacked = lorax.stack([*adapters[:2], None, adapters[2]])
    one_by_one = [run(lorax.combine(params, frozen), *inputs) for params in adapters]
    base = run(lorax.combine(lorax.scale(adapters[0], 0), frozen), *inputs)
    expected = [*one_by_one[:2], base, one_by_one[2]]

    @eqx.filter_jit
    def answers(stacked, frozen, index, inputs):
        def one(i, *inputs):
            params = jax.tree.map(lambda array: array[i], stacked)
            return lorax.combine(params, frozen)(*inputs)

        return eqx.filter_vmap(one)(index, *inputs)

    index = [3, 0, 2, 1, 2]
    batch = jax.tree.map(lambda x: jnp.stack([x] * len(index)), inputs)
    found = answers(stacked, frozen, jnp.array(index), batch)
    for i, y in zip(index, found):
        assert_close(y, expected[i])


@few_cases
def test_a_bank(case, getkey):
    """The same for a bank, and for mixtures."""
    adapters, frozen, inputs = make(case, getkey, [case.rank] * 3, alpha=3.0)
    one_by_one = [run(lorax.combine(params, frozen), *inputs) for params in adapters]
    bank = lorax.AdapterBank([*adapters[:2], None, adapters[2]])
    base = run(lorax.combine(lorax.scale(adapters[0], 0), frozen), *inputs)
    expected = [*one_by_one[:2], base, one_by_one[2]]

    @eqx.filter_jit
    def answers(bank, frozen, index, inputs):
        def one(i, *inputs):
            return lorax.combine(bank[i], frozen)(*inputs)

        return eqx.filter_vmap(one)(index, *inputs)

    index = [3, 0, 2, 1, -1]
    batch = jax.tree.map(lambda x: jnp.stack([x] * len(index)), inputs)
    found = answers(bank, frozen, jnp.array(index), batch)
    for i, y in zip(index, found):
        assert_close(y, expected[i])

    weights = [0.5, -1.0, 7.0, 0.25]
    mixture = lorax.combine(bank.mix(weights), frozen)
    combined = lorax.weighted_sum(adapters, [0.5, -1.0, 0.25])
    assert_close(run(mixture, *inputs), run(lorax.combine(combined, frozen), *inputs))


def test_a_bank_copies_no_factors(getkey):
    """Under `vmap` all products are with arrays that the batch shares."""
    linear = eqx.nn.Linear(5, 7, key=getkey())
    adapted = lorax.loraify(linear, rank=2, key=getkey())
    _, frozen = lorax.partition(adapted)
    bank = lorax.AdapterBank([randomised(adapted, getkey()) for _ in range(3)])

    def one(index, x):
        return lorax.combine(bank[index], frozen)(x)

    index, x = jnp.zeros(11, int), jnp.ones((11, 5))
    jaxpr = jax.make_jaxpr(jax.vmap(one))(index, x)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert all(min(x.aval.ndim for x in e.invars) == 2 for e in products)
    assert all(e.params["dimension_numbers"][1] == ((), ()) for e in products)


@pytest.mark.cpu
def test_factors_of_each_example_are_picked_when_they_are_needed():
    """Not those of all layers at the start."""
    keys = jr.split(jr.key(0), 8)
    model = eqx.nn.Sequential([eqx.nn.Linear(64, 64, key=key) for key in keys])
    adapted = lorax.loraify(model, rank=4, key=jr.key(1))
    params, frozen = lorax.partition(adapted)
    stacked = lorax.stack([params, None, params])

    def one(index, x):
        params = jax.tree.map(lambda array: array[index], stacked)
        return jax.vmap(lorax.combine(params, frozen))(x)

    index, x = jnp.arange(16) % 3, jnp.ones((16, 2, 64))
    memory: Any = jax.jit(jax.vmap(one)).lower(index, x).compile().memory_analysis()
    picked = 16 * sum(array.nbytes for array in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < picked / 2


def test_what_a_bank_has(getkey):
    linear = eqx.nn.Linear(5, 7, key=getkey())
    adapted = lorax.loraify(linear, rank=2, key=getkey())
    params, frozen = lorax.partition(adapted)
    bank = lorax.AdapterBank([params, None])
    assert len(bank) == 2
    with pytest.raises(IndexError):
        bank[2]
    with pytest.raises(ValueError, match=r"one for each of 2 adapters.*\(3,\)"):
        bank.mix(jnp.ones(3))
    # Gradients with respect to the mixing weights and the factors.
    x = jnp.ones(5)
    total = lambda bank, w: jnp.sum(lorax.combine(bank.mix(w), frozen)(x))  # noqa: E731
    moving = eqx.filter_grad(lambda both: total(*both))((bank, jnp.ones(2)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moving))


@few_cases
def test_ranks_and_scales_that_differ(case, getkey):
    model = filled(case.make, jnp.float32, getkey())
    inputs = case.inputs(jnp.float32)
    options = [(1, 2.0, False), (case.rank, 7.0, False), (1, 3.0, True)]
    models = [
        lorax.loraify(
            model,
            case.filter,
            rank=rank,
            alpha=alpha,
            rank_stabilised=stabilised,
            key=getkey(),
        )
        for rank, alpha, stabilised in options
    ]
    adapters = [randomised(adapted, getkey()) for adapted in models]
    frozen = [lorax.partition(adapted)[1] for adapted in models]
    stacked = lorax.stack(adapters)
    bank = lorax.AdapterBank(adapters)
    assert {weight.rank for weight in weights(stacked)} == {case.rank}
    for i, (params, own) in enumerate(zip(adapters, frozen)):
        expected = run(lorax.combine(params, own), *inputs)
        # All of them fit the frozen part of the first.
        taken = jax.tree.map(lambda array, i=i: array[i], stacked)
        assert_close(run(lorax.combine(taken, frozen[0]), *inputs), expected)
        assert_close(run(lorax.combine(bank[i], frozen[0]), *inputs), expected)


@pytest.mark.parametrize("method", ("exact", "svd"))
@few_cases
def test_combining_is_the_sum_of_the_updates(case, method, getkey):
    ranks = [1, case.rank, case.rank]
    factors = [0.5, -1.0, 2.0]
    model = filled(case.make, jnp.float32, getkey())
    models = [
        lorax.loraify(model, case.filter, rank=rank, alpha=alpha, key=getkey())
        for rank, alpha in zip(ranks, (1.0, 3.0, 2.0))
    ]
    models = [eqx.combine(randomised(m, getkey()), m) for m in models]
    total = sum(ranks)
    options = {"rank": total} if method == "svd" else {}
    combined = lorax.weighted_sum(models, factors, method, **options)
    for new, *parts in zip(weights(combined), *map(weights, models)):
        update = sum(
            factor * (wide(part.materialise()) - wide(part.w))
            for factor, part in zip(factors, parts)
        )
        assert_close(wide(new.materialise()) - wide(new.w), update, 1e-4)
        assert new.rank == total or method == "svd"
    # It fits the frozen part of the first one's model.
    params = lorax.partition(combined)[0]
    lorax.combine(params, lorax.partition(models[0])[1])


def test_the_smaller_rank_is_the_best_there_is(getkey):
    linear = eqx.nn.Linear(20, 30, key=getkey())
    adapters = [
        randomised(lorax.loraify(linear, rank=3, key=getkey()), getkey())
        for _ in range(2)
    ]
    update = sum(
        weight.scale * wide(weight.b) @ wide(weight.a)
        for adapter in adapters
        for weight in weights(adapter)
    )
    sizes = np.linalg.svd(update, compute_uv=False)
    combined, errors = lorax.weighted_sum(
        adapters, [1, 1], "svd", rank=2, return_error=True
    )
    (weight,) = weights(combined)
    found = weight.scale * wide(weight.b) @ wide(weight.a)
    lost = np.linalg.norm(found - update) / np.linalg.norm(update)
    assert np.isclose(lost, np.linalg.norm(sizes[2:]) / np.linalg.norm(sizes), 1e-4)
    assert np.isclose(errors["weight"], lost, 1e-4)
    with pytest.warns(UserWarning, match=r"lose more than 1 %.*1 of 1 weights: weight"):
        lorax.weighted_sum(adapters, [1, 1], "svd", rank=2)


def test_a_weight_of_minus_one_negates(getkey):
    linear = eqx.nn.Linear(5, 7, key=getkey())
    adapter = randomised(lorax.loraify(linear, rank=2, key=getkey()), getkey())
    (nothing,) = weights(lorax.weighted_sum([adapter, adapter], [1, -1]))
    assert np.abs(nothing.b @ nothing.a).max() < 1e-6
    twice = lorax.scale(lorax.scale(adapter, -1), -1)
    assert_identical(twice, adapter)


def test_scaling_compiles_nothing_again(getkey):
    linear = eqx.nn.Linear(5, 7, key=getkey())
    adapted = lorax.loraify(linear, rank=2, key=getkey())
    params, frozen = lorax.partition(
        eqx.combine(randomised(adapted, getkey()), adapted)
    )
    traces = []

    @eqx.filter_jit
    def call(params, frozen, x):
        traces.append(1)
        return lorax.combine(params, frozen)(x)

    x = jnp.ones(5)
    outs = [call(lorax.scale(params, f), frozen, x) for f in (0, 1, -2, jnp.array(0.5))]
    assert len(traces) == 1
    assert_close((outs[1] - outs[0]) * -2, outs[2] - outs[0])
    # Another adapter of the same shape needs no new compilation.
    other = randomised(adapted, getkey())
    call(other, frozen, x)
    assert len(traces) == 1
    scaled = eqx.filter_jit(lorax.scale)(params, jnp.array(0.5))
    assert_close(call(scaled, frozen, x), outs[3])


def test_heads(getkey):
    model = eqx.nn.MLP(4, 3, 6, 1, key=getkey())
    adapted = lorax.loraify(model, "layers.0", rank=2, key=getkey())
    params, _ = lorax.partition(adapted, also="layers.1")
    other = eqx.tree_at(lambda m: m.layers[1].bias, params, jnp.ones(3))
    stacked = lorax.stack([params, other])
    assert_identical(stacked.layers[1].bias[1], other.layers[1].bias)
    assert_identical(lorax.scale(params, 3).layers[1], params.layers[1])
    with pytest.raises(ValueError, match=r"layers\.1\.\w+ was trained.*`base=model`"):
        lorax.stack([params, None])
    with pytest.raises(
        ValueError, match=r"layers\.1\.bias was trained too and differs"
    ):
        lorax.weighted_sum([params, other], [1, 1])
    same = lorax.weighted_sum([params, params], [1, 1])
    assert_identical(same.layers[1], params.layers[1])


@pytest.mark.own_errors
def test_what_does_not_fit_together(getkey):
    model = eqx.nn.MLP(4, 3, 6, 1, key=getkey())
    whole = lorax.loraify(model, rank=2, key=getkey())
    params = lorax.partition(whole)[0]
    narrow = lorax.partition(
        lorax.loraify(model, rank=2, dtype=jnp.bfloat16, key=getkey())
    )[0]
    larger = eqx.nn.MLP(4, 3, 8, 1, key=getkey())
    larger = lorax.partition(lorax.loraify(larger, rank=2, key=getkey()))[0]
    deeper = lorax.loraify(eqx.nn.MLP(4, 3, 6, 2, key=getkey()), rank=2, key=getkey())
    with pytest.raises(ValueError, match=r"different models: at layers one has 0, 1 "):
        lorax.stack([params, lorax.partition(deeper)[0]])
    with pytest.raises(ValueError, match=r"layers\.0\.weight differs in shape"):
        lorax.weighted_sum([params, larger], [1, 1])
    with pytest.raises(ValueError, match=r"layers\.0\.weight has factors of several"):
        lorax.stack([params, narrow])
    with pytest.raises(ValueError, match="its frozen base with it.*partition"):
        lorax.stack([whole, whole])
    with pytest.raises(ValueError, match="no adapter in what was passed to `stack`"):
        lorax.stack([None, None])
    with pytest.raises(
        ValueError, match="no adapter in what was passed to `weighted_sum`"
    ):
        lorax.weighted_sum([model], [1])
    with pytest.raises(ValueError, match="2 `weights` for 1 `adapters`"):
        lorax.weighted_sum([params], [1, 2])
    with pytest.raises(ValueError, match="'linear'` is unknown. There are 'exact'"):
        lorax.weighted_sum([params], [1], "linear")  # pyright: ignore
    with pytest.raises(ValueError, match="`rank=3` is for `method='svd'`"):
        lorax.weighted_sum([params], [1], rank=3)
    with pytest.raises(ValueError, match="one number"):
        lorax.scale(params, jnp.ones(2))


# Adapters with different targets


class Blocks(eqx.Module):
    layers: list
    table: eqx.nn.Embedding
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.layers = [eqx.nn.Linear(6, 6, key=k) for k in keys[:2]]
        self.table = eqx.nn.Embedding(5, 6, key=keys[2])
        self.head = eqx.nn.Linear(6, 2, key=keys[3])

    def __call__(self, i):
        x = self.table(i)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x)


@pytest.fixture
def different(getkey):
    """The plain model, adapters with few common targets, and the outputs of each
    adapter in its own model."""
    model = Blocks(getkey())
    options = [
        dict(filter="layers.0", rank=2, alpha=3),
        dict(filter=["layers", "table"], rank=3),
        dict(filter=["table", "layers.1"], rank=1, rank_stabilised=True, dropout=0.0),
    ]
    adapters, outputs = [], []
    for i, each in enumerate(options):
        adapted = lorax.loraify(model, key=getkey(), **each)
        if i == 2:
            new = jax.tree.map(lambda x: x + 1, model.head)
            adapted = eqx.tree_at(lambda m: m.head, adapted, new)
        params, frozen = lorax.partition(adapted, "head" if i == 2 else None)
        leaves, treedef = jax.tree.flatten(params)
        drawn = [0.5 * jr.normal(getkey(), x.shape) for x in leaves]
        params = jax.tree.unflatten(treedef, drawn)
        adapters.append(params)
        outputs.append(run(lorax.combine(params, frozen), 3))
    return model, [*adapters, None], [*outputs, run(model, 3)]


def test_a_batch_of_adapters_with_different_targets(different):
    model, adapters, outputs = different
    stacked = lorax.stack(adapters, base=model)
    bank = lorax.AdapterBank(adapters, base=model)

    @eqx.filter_jit
    def answers(stacked, bank, model, index):
        def one(i):
            taken = jax.tree.map(lambda array: array[i], stacked)
            return [lorax.attach(model, params)(3) for params in (taken, bank[i])]

        return eqx.filter_vmap(one)(index)

    index = [3, 0, 2, 1, 2]
    for found in answers(stacked, bank, model, jnp.array(index)):
        for i, y in zip(index, found):
            assert_close(y, outputs[i])
    # A missing adapter is the base alone, including its head.
    nothing = answers(stacked, bank, model, jnp.array([7]))[1]
    assert_close(nothing[0], outputs[3])
    # The frozen part of a model with all targets also works.
    first = jax.tree.map(lambda array: array[0], stacked)
    _, frozen = lorax.partition(lorax.attach(model, first), "head")
    assert_close(run(lorax.combine(bank[2], frozen), 3), outputs[2])


def test_adding_up_adapters_with_different_targets(different):
    model, adapters, _ = different
    factors = [0.5, -1.0, 2.0, 9.0]
    for method, rank in (("exact", None), ("svd", 6)):
        total = lorax.weighted_sum(adapters, factors, method, rank=rank, base=model)
        merged = lorax.unloraify(lorax.attach(model, total))
        each = [lorax.attach(model, params) for params in adapters[:3]]
        plain = [lorax.unloraify(adapted) for adapted in each]
        expected = jax.tree.map(
            lambda base, *arrays: (
                base + sum(f * (x - base) for f, x in zip(factors, arrays))
                if eqx.is_array(base)
                else base
            ),
            model,
            *plain,
        )
        assert_close(
            eqx.filter(merged, eqx.is_array), eqx.filter(expected, eqx.is_array), 1e-4
        )
    # Without heads `base` is not needed.
    total = lorax.weighted_sum([adapters[0], None, adapters[1]], [1, 1, 1])
    found = [weight.rank for weight in weights(total)]
    assert found == [5, 3, 3]


def test_whole_models_with_different_targets(different):
    model, adapters, _ = different
    models = [lorax.attach(model, params) for params in adapters[:2]]
    total = lorax.weighted_sum(models, [2.0, -1.0])
    alone = lorax.weighted_sum(adapters[:2], [2.0, -1.0])
    assert_identical(total, lorax.attach(model, alone))


def test_what_is_not_known_of_a_head(different, getkey):
    model, adapters, _ = different
    for call in (lorax.stack, lorax.AdapterBank):
        with pytest.raises(ValueError, match=r"head\.weight.*known.*`base=model`"):
            call(adapters)
        with pytest.raises(ValueError, match=r"head\.\w+ was trained.*not in `base`"):
            call(adapters, base=eqx.tree_at(lambda m: m.head, model, None))
        other = eqx.tree_at(lambda m: m.head.weight, model, jnp.ones((3, 6)))
        with pytest.raises(ValueError, match=r"head\.weight has shape \(3, 6\) in `ba"):
            call(adapters, base=other)
    with pytest.raises(ValueError, match=r"head\.weight.*not in all adapters"):
        lorax.weighted_sum(adapters, [1, 1, 1, 1])
    adapted = lorax.loraify(model, "head", rank=1, key=getkey())
    with pytest.raises(ValueError, match=r"head\.weight differs in kind"):
        lorax.stack([adapters[2], lorax.partition(adapted)[0]])
    bank = lorax.AdapterBank([adapters[2], adapters[2]])
    gone = eqx.filter_jit(lambda bank, i: bank[i].head.bias)(bank, jnp.array(5))
    assert np.isnan(gone).all()

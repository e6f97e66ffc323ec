"""Updates that are pruned before they are added up."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, weights, wide

import eqx_lorax as lorax


class Model(eqx.Module):
    stack: eqx.nn.Linear
    conv: eqx.nn.Conv1d

    def __init__(self, key):
        *keys, last = jax.random.split(key, 3)
        make = lambda key: eqx.nn.Linear(9, 7, key=key)  # noqa: E731
        self.stack = eqx.filter_vmap(make)(jnp.stack(keys))
        self.conv = eqx.nn.Conv1d(3, 5, 2, key=last)


def train(adapted, seed, size=0.3):
    random = np.random.default_rng(seed)
    params, frozen = lorax.partition(adapted)
    params = jax.tree.map(
        lambda x: jnp.asarray(size * random.normal(size=x.shape), x.dtype), params
    )
    return lorax.combine(params, frozen)


def updates(weight):
    """The update of each layer of a stack as a matrix, in float64."""
    update = wide(weight.materialise()) - wide(weight.w)
    rows = weight.w.shape[weight.rows[0]]
    # The batch axes come first, then the rows.
    count = np.prod(weight.w.shape[: weight.rows[0]], dtype=int)
    return list(update.reshape(count, rows, -1))


# The definitions on dense matrices.


def trim(update, density):
    count = max(1, round(density * update.size))
    least = np.sort(np.abs(update).ravel())[-count]
    return np.where(np.abs(update) >= least, update, 0)


def magnitude(parts, factors, density):
    return sum(f * trim(part, density) for f, part in zip(factors, parts))


def ties(parts, factors, density):
    parts = np.array([f * trim(part, density) for f, part in zip(factors, parts)])
    merged = np.zeros(parts.shape[1:])
    for index in np.ndindex(merged.shape):
        entries = parts[:, *index]
        same = entries[np.sign(entries) == np.sign(entries.sum())]
        if entries.any():
            merged[index] = same.mean()
    return merged


@pytest.mark.parametrize("adapter", ("lora", "dora"))
@pytest.mark.parametrize("definition", (magnitude, ties))
def test_the_definitions_on_dense_updates(definition, adapter, getkey):
    """Also of a method that scales its base, and with a weight of minus one."""
    model = Model(getkey())
    models = [
        train(lorax.loraify(model, rank=2, alpha=3, method=adapter, key=getkey()), i)
        for i in range(3)
    ]
    factors, method = [0.5, -1.0, 2.0], definition.__name__
    merged, errors = lorax.weighted_sum(
        models, factors, method, rank=9, density=0.3, return_error=True
    )
    assert set(errors) == {"stack.weight", "conv.weight"}
    assert max(errors.values()) < 1e-5
    for new, *parts in zip(weights(merged), *map(weights, models), strict=True):
        assert type(new) is lorax.LoraWeight and new.w is parts[0].w
        dense = zip(*map(updates, parts), strict=True)
        expected = [definition(each, factors, 0.3) for each in dense]
        assert_close(updates(new), expected, 1e-4)


def factor_by_factor(parts, factors, density):
    """What PEFT computes, of factors `b` with the scale and `a`."""
    b = ties([part.scale * wide(part.b) for part in parts], factors, density)
    a = ties([wide(part.a) for part in parts], [1.0] * len(parts), density)
    return b @ a


def test_the_factors_are_not_pruned_one_by_one(getkey):
    linear = eqx.nn.Linear(12, 10, key=getkey())
    models = [
        train(lorax.loraify(linear, rank=3, key=getkey()), seed) for seed in range(2)
    ]
    merged = lorax.weighted_sum(models, [1, 1], "ties", rank=10, density=0.5)
    parts = [model.weight for model in models]
    expected = ties([updates(part)[0] for part in parts], [1, 1], 0.5)
    (found,) = updates(merged.weight)
    assert_close(found, expected, 1e-4)
    other = factor_by_factor(parts, [1, 1], 0.5)
    assert np.linalg.norm(other - expected) > 0.5 * np.linalg.norm(expected)


def test_dare(getkey):
    """Each entry is dropped or divided by the density, apart in each layer, weight and
    adapter, and the sum is right on average."""
    models = [
        train(lorax.loraify(Model(getkey()), rank=2, key=getkey()), seed)
        for seed in range(2)
    ]
    options = dict(rank=9, density=0.4)
    key = jax.random.key(3)
    merged = lorax.weighted_sum([models[0]], [2.0], "dare", key=key, **options)
    kept = []
    for new, old in zip(weights(merged), weights(models[0]), strict=True):
        for found, update in zip(updates(new), updates(old), strict=True):
            ratio = found / update
            is_kept = ratio > 2.5
            np.testing.assert_allclose(ratio, np.where(is_kept, 5, 0), atol=0.05)
            kept.append(is_kept)
    assert 0.25 < np.concatenate([x.ravel() for x in kept]).mean() < 0.55
    assert (kept[0] != kept[1]).any()
    again = lorax.weighted_sum([models[0]], [2.0], "dare", key=key, **options)
    assert_identical(again, merged)
    # Of two equal adapters not the same entries are kept.
    both = lorax.weighted_sum([models[0]] * 2, [1, -1], "dare", key=key, **options)
    assert np.abs(updates(weights(both)[0])[0]).max() > 0.1


def test_a_density_of_one_prunes_nothing(getkey):
    models = [
        lorax.partition(train(lorax.loraify(Model(getkey()), rank=2, key=getkey()), i))
        for i in range(2)
    ]
    params, frozen = zip(*models)
    options = dict(rank=4, density=1.0)
    expected = lorax.weighted_sum(params, [1, 0.5])
    for method, more in (("magnitude", {}), ("dare", {"key": jax.random.key(0)})):
        found = lorax.weighted_sum(params, [1, 0.5], method, **options, **more)
        whole, wanted = (lorax.combine(x, frozen[0]) for x in (found, expected))
        for x, y in zip(weights(whole), weights(wanted), strict=True):
            assert x.rank == 4
            assert_close(updates(x), updates(y), 1e-4)


def test_the_loss_of_the_rank_is_reported(getkey):
    model = lorax.loraify(Model(getkey()), "conv", rank=2, key=getkey())
    models = [train(model, seed) for seed in range(2)]
    found, errors = lorax.weighted_sum(
        models, [1, 1], "magnitude", density=0.3, return_error=True
    )
    (weight,) = weights(found)
    expected = magnitude([updates(m.conv.weight)[0] for m in models], [1, 1], 0.3)
    sizes = np.linalg.svd(expected, compute_uv=False)
    lost = np.linalg.norm(sizes[2:]) / np.linalg.norm(sizes)
    assert weight.rank == 2 and np.isclose(errors["conv.weight"], lost, 1e-3)
    with pytest.warns(UserWarning, match="larger `rank` keeps more; `return_error"):
        lorax.weighted_sum(models, [1, 1], "magnitude", density=0.3)


@pytest.mark.own_errors
def test_arguments_that_do_not_belong(getkey):
    linear = eqx.nn.Linear(4, 3, key=getkey())
    params, _ = lorax.partition(lorax.loraify(linear, rank=2, key=getkey()))
    key = jax.random.key(0)
    wrong = [
        (dict(method="tie"), r"'tie'` is unknown\. Did you mean 'ties'\?"),
        (dict(method="dare_linear"), "Did you mean 'dare'"),
        (dict(method="dare"), r"`key` is for.*Pass `key=jax\.random\.key\(0\)`"),
        (dict(method="ties", key=key), "`key` is for `method='dare'`.*Leave it out"),
        (dict(method="svd", density=0.2), "`density=0.2` is for 'ties', 'dare', 'mag"),
        (dict(method="ties", density=0), "`density=0` must be the share"),
        (dict(method="ties", density=1.5), "`density=1.5` must be"),
        (dict(method="magnitude", density=True), "`density=True` must be"),
        (dict(method="ties", rank=0), "`rank=0` is for"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            lorax.weighted_sum([params], [1], **options)
    dora = lorax.loraify(linear, rank=2, method="dora", key=getkey())
    with pytest.raises(ValueError, match=r"scales its base.*`lorax\.as_lora\(model, r"):
        lorax.weighted_sum([dora], [1])
    with pytest.raises(ValueError, match="weight is a DoraWeight.*Pass whole models"):
        lorax.weighted_sum([lorax.partition(dora)[0]], [1], "ties")

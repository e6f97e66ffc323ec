"""Ranks from what adapters have learned."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import weights

import eqx_lorax as lorax


def spectrum(path, values, size=1.0, layer=()):
    shape, rank = (9, 9), len(values)
    return lorax.TargetSpectrum(
        path, layer, shape, rank, tuple(values), size, None, None, None
    )


SPECTRA = lorax.Spectra(
    (
        spectrum("a.weight", [4.0, 1.0, 0.2, 0.1]),
        spectrum("stack.weight", [3.0, 0.1], layer=(0,)),
        spectrum("stack.weight", [3.0, 2.0], layer=(1,)),
        spectrum("none.weight", [0.0, 0.0]),
    )
)


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(threshold=0.25), [2, 2, 1]),
        (dict(threshold=0.25, min_rank=0), [2, 2]),
        (dict(threshold=0.02), [4, 2, 1]),
        (dict(threshold=0.02, max_rank=3, min_rank=2), [3, 2, 2]),
        (dict(threshold=1.0), [1, 1, 1]),
    ],
)
def test_by_a_threshold(options, expected):
    ranks = lorax.allocate_ranks(SPECTRA, **options)
    assert list(ranks.values()) == expected
    assert list(ranks) == ["a.weight", "stack.weight", "none.weight"][: len(ranks)]


def test_for_a_budget():
    """Relative to the base: of the same values, those of the smaller base come
    first. A stack of two layers costs two."""
    values = [2.0, 1.0, 0.5]
    spectra = lorax.Spectra(
        (
            spectrum("large", values, size=0.01),
            spectrum("small", values, size=1.0),
            spectrum("stack", values, size=0.5, layer=(0,)),
            spectrum("stack", values, size=0.5, layer=(1,)),
        )
    )
    found = [lorax.allocate_ranks(spectra, budget=x) for x in (4, 5, 6, 8, 12)]
    assert [list(ranks.values()) for ranks in found] == [
        [1, 1, 1],
        [1, 2, 1],
        [1, 3, 1],
        [1, 3, 2],
        [3, 3, 3],
    ]
    found = lorax.allocate_ranks(spectra, budget=2, min_rank=0)
    assert found == {"small": 2}


def test_the_next_run_has_these_ranks():
    """Of an update of rank two and one of rank four."""
    keys = jr.split(jr.key(0), 3)
    model = [eqx.nn.Linear(8, 8, key=key) for key in keys[:2]]
    adapted = lorax.loraify(model, rank=4, key=keys[2])
    random = np.random.default_rng(0)
    drawn = [random.normal(size=(8, rank)) for rank in (2, 4)]
    drawn[0] = np.concatenate([drawn[0], np.zeros((8, 2))], 1)
    adapted = eqx.tree_at(
        lambda model: [weight.b for weight in weights(model)],
        adapted,
        [jnp.asarray(b, jnp.float32) for b in drawn],
    )
    ranks = lorax.allocate_ranks(lorax.spectra(adapted), threshold=1e-3)
    assert ranks == {"0.weight": 2, "1.weight": 4}
    again = lorax.loraify(model, list(ranks), rank=ranks, key=keys[2])
    assert [weight.rank for weight in weights(again)] == [2, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "give one of the two"),
        (dict(threshold=0.1, budget=5), "give one of the two"),
        (dict(threshold=0.0), "above 0 and at most 1"),
        (dict(budget=2), "4 layers of at least rank 1 need 4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lorax.allocate_ranks(SPECTRA, **options)

"""The singular values of updates, in tables and pictures."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, weights, wide

import eqx_lorax as lorax


def train(adapted, size=0.3):
    """The model with random numbers in its trained arrays."""
    random = np.random.default_rng(0)
    params, frozen = lorax.partition(adapted)
    params = jax.tree.map(
        lambda x: jnp.asarray(size * random.normal(size=x.shape), x.dtype), params
    )
    return lorax.combine(params, frozen)


class Model(eqx.Module):
    first: eqx.nn.Linear
    stack: eqx.nn.Linear
    conv: eqx.nn.Conv1d

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        make = lambda key: eqx.nn.Linear(9, 7, key=key)  # noqa: E731
        self.first = eqx.nn.Linear(6, 9, key=keys[0])
        self.stack = eqx.filter_vmap(make)(keys[1:3])
        self.conv = eqx.nn.Conv1d(3, 5, 2, key=keys[3])


def test_the_numbers_of_dense_updates(getkey):
    """Of a scaled base, of factors with a gate, and of more of them than a side is
    long."""
    methods = {"first": "dora", "stack": "adalora", "conv": "loha"}
    ranks = [6, 3, 3, 5]
    model = Model(getkey())
    model = train(lorax.loraify(model, rank=3, alpha=2, method=methods, key=getkey()))
    found = lorax.spectra(model, intruders=4, threshold=0.9).targets
    names = ["first.weight", "stack.weight[0]", "stack.weight[1]", "conv.weight"]
    assert [target.name for target in found] == names
    bases, merged = [], []
    for weight in weights(model):
        for arrays, array in ((bases, weight.w), (merged, weight.materialise())):
            is_stack = weight is model.stack.weight
            layers = wide(array) if is_stack else wide(array)[None]
            arrays += [layer.reshape(len(layer), -1) for layer in layers]
    for target, base, new, rank in zip(found, bases, merged, ranks, strict=True):
        update = new - base
        values = np.linalg.svd(update, compute_uv=False)
        assert target.shape == base.shape and target.rank == rank
        np.testing.assert_allclose(target.values, values[: target.rank], atol=1e-5)
        assert np.allclose(values[target.rank :], 0, atol=1e-5)
        shares = values[: target.rank] / values[: target.rank].sum()
        entropy = -np.sum(shares * np.log(shares))
        assert np.isclose(target.effective_rank, np.exp(entropy), 1e-4)
        frobenius = np.linalg.norm(update)
        assert np.isclose(target.stable_rank, (frobenius / values[0]) ** 2, 1e-4)
        assert np.isclose(target.tail, values[target.rank - 1] / values[0], atol=1e-5)
        assert np.isclose(target.size, frobenius / np.linalg.norm(base), 1e-4)
        largest = np.linalg.norm(base, 2)
        assert np.isclose(target.spectral_size, values[0] / largest, 1e-4)
        left, _, _ = np.linalg.svd(base, full_matrices=False)
        leading = np.linalg.svd(new)[0][:, :4]
        cosines = np.abs(left.T @ leading).max(0)
        np.testing.assert_allclose(target.similarities, cosines, atol=1e-3)
        assert target.intruders == np.sum(np.array(target.similarities) < 0.9)


def test_a_planted_intruder(getkey):
    """A direction that the base has not, larger than any of its own; and one of its
    own, made larger, which is none."""
    random = np.random.default_rng(0)
    u, _ = np.linalg.qr(random.normal(size=(8, 8)))
    v, _ = np.linalg.qr(random.normal(size=(8, 8)))
    base = u[:, :4] @ np.diag([4.0, 3.0, 2.0, 1.0]) @ v[:, :4].T
    for column, count in ((7, 1), (0, 0)):
        b, a = 9 * u[:, [column]], v[:, [column]].T
        arrays = (jnp.asarray(x, jnp.float32) for x in (base, b, a))
        weight = lorax.LoraWeight(*arrays)
        (target,) = lorax.spectra(weight, intruders=4).targets
        assert target.intruders == count
        assert np.isclose(target.values[0], 9)
        assert np.isclose(target.spectral_size, 9 / 4)


def test_ranks_of_known_spectra():
    target = lorax.TargetSpectrum("w", (), (9, 9), 4, (2.0,) * 4, 0.1, None, None, None)
    assert np.isclose(target.effective_rank, 4) and np.isclose(target.stable_rank, 4)
    single = dataclasses.replace(target, values=(3.0, 0.0, 0.0, 0.0))
    assert (single.effective_rank, single.stable_rank, single.tail) == (1, 1, 0)
    nothing = dataclasses.replace(target, values=(0.0,) * 4)
    assert (nothing.effective_rank, nothing.stable_rank, nothing.tail) == (0, 0, 0)


def test_nothing_dense_is_formed(getkey):
    from eqx_lorax._inspection.spectra import _measure

    linear = lorax.loraify(eqx.nn.Linear(64, 48, key=getkey()), rank=2, key=getkey())
    form = linear.weight.factored()
    jaxpr = jax.make_jaxpr(lambda form: _measure(form, 0))(form).jaxpr
    made = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    shapes = {e.outvars[0].aval.shape for e in made}
    assert shapes and (48, 64) not in shapes


def test_a_fresh_adapter_and_ia3(getkey):
    linear = eqx.nn.Linear(4, 3, use_bias=False, key=getkey())
    for method in ("lora", "ia3"):
        fresh = lorax.loraify(linear, rank=2, method=method, key=getkey())
        (target,) = lorax.spectra(fresh).targets
        assert target.size == target.effective_rank == 0
        assert "0.00%" in str(lorax.spectra(fresh))
    (target,) = lorax.spectra(train(fresh)).targets
    assert target.rank == 3 and target.size > 0


def test_adapters_on_top_of_adapters_are_one_update(getkey):
    linear = eqx.nn.Linear(7, 6, key=getkey())
    inner = train(lorax.loraify(linear, rank=1, key=getkey()))
    both = train(lorax.loraify(inner, rank=2, nested=True, key=getkey()))
    (target,) = lorax.spectra(both).targets
    update = wide(both.weight.materialise()) - wide(linear.weight)
    values = np.linalg.svd(update, compute_uv=False)
    np.testing.assert_allclose(target.values, values[:3], atol=1e-5)


@pytest.fixture(scope="module")
def blocks():
    """Six linear layers, and a stack of two."""
    model = {
        "blocks": [eqx.nn.Linear(12, 12, key=jax.random.key(i)) for i in range(6)],
        "rest": Model(jax.random.key(9)),
    }
    model = lorax.loraify(
        model, ["blocks", "rest.stack"], rank=2, key=jax.random.key(7)
    )
    return lorax.spectra(train(model))


def test_the_table(blocks):
    lines = str(blocks).splitlines()
    head = ["target", "shape", "rank", "effective", "stable", "tail", "size"]
    assert lines[0].split() == head
    assert re.match(r"blocks\.\*\.weight × 6 +12×12 +2 +1\.\d–\d\.\d ", lines[2])
    assert re.match(r"rest\.stack\.weight\[\*\] × 2 +7×9 +2 ", lines[3])
    assert re.match(r"full +\d of 8 .*larger one may help$", lines[4])
    assert re.match(r"spare +0 of 8 .*smaller one may do$", lines[5])
    full = blocks.table(full=True).splitlines()
    assert len(full) == 2 + 8 + 2
    assert full[2].startswith("blocks.0.weight ")
    assert full[9].startswith("rest.stack.weight[1] ")
    with_intruders = lorax.Spectra(
        tuple(
            dataclasses.replace(x, similarities=(0.1, 0.9), intruders=1)
            for x in blocks.targets
        )
    )
    assert str(with_intruders).splitlines()[2].endswith(" 6 of 12")


def test_the_picture(blocks, tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra `plots`")
    figure = blocks.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    heat, sizes, _ = figure.axes
    (image,) = heat.images
    shown = np.array([x.values for x in blocks.targets])
    np.testing.assert_allclose(image.get_array(), shown / shown[:, :1])
    labels = [label.get_text() for label in heat.get_yticklabels()]
    assert labels == [target.name for target in blocks.targets]
    widths = [bar.get_width() for bar in sizes.patches]
    np.testing.assert_allclose(widths, [100 * x.size for x in blocks.targets])


def test_the_progress_bar(getkey, capsys):
    pytest.importorskip("tqdm")
    adapted = lorax.loraify(eqx.nn.Linear(4, 3, key=getkey()), rank=2, key=getkey())
    lorax.spectra(adapted)
    assert not capsys.readouterr().err
    lorax.spectra(adapted, progress=True)
    assert "Decomposing: 100%" in capsys.readouterr().err


@pytest.mark.own_errors
def test_what_has_no_spectra(getkey):
    linear = eqx.nn.Linear(4, 3, key=getkey())
    adapted = lorax.loraify(linear, rank=2, key=getkey())
    params, frozen = lorax.partition(adapted)
    with pytest.raises(ValueError, match=r"no adapters to look into.*lorax\.loraify"):
        lorax.spectra(linear)
    for part in (params, frozen):
        with pytest.raises(ValueError, match=r"lorax\.spectra\(lorax\.combine"):
            lorax.spectra(part)
    with pytest.raises(ValueError, match="`threshold=0` must be a cosine"):
        lorax.spectra(adapted, threshold=0)
    with pytest.raises(ValueError, match="`intruders=-1` must be"):
        lorax.spectra(adapted, intruders=-1)
    with pytest.raises(ValueError, match=r"shapes in the place of numbers.*`jax\.jit`"):
        eqx.filter_jit(lorax.spectra)(adapted)

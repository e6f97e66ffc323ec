"""The rank, the axes and the scale of fresh adapters, and the errors for a rank or axes
that do not fit."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import OwnLinear
from helpers import assert_close, assert_identical, call64, trained, weights

import eqx_lorax as lorax


class UNet(eqx.Module):
    """Small and large layers, as in real U-Nets."""

    down: list[eqx.nn.Conv2d]
    up: list[eqx.nn.ConvTranspose2d]
    time: eqx.nn.Linear
    scalar: eqx.nn.Linear
    classes: dict[str, eqx.nn.Linear]
    blocks: list[eqx.nn.Linear]
    odd: dict[str, eqx.nn.Linear]

    def __init__(self, key):
        key = iter(jr.split(key, 20))
        conv, transposed = eqx.nn.Conv2d, eqx.nn.ConvTranspose2d
        self.down = [conv(i, j, 3, key=next(key)) for i, j in ((1, 3), (3, 12))]
        self.up = [transposed(i, j, 3, key=next(key)) for i, j in ((12, 3), (3, 1))]
        self.time = eqx.nn.Linear("scalar", 16, key=next(key))
        self.scalar = eqx.nn.Linear(16, "scalar", key=next(key))
        self.classes = {
            name: eqx.nn.Linear(16, 3, key=next(key)) for name in ("a", "b.c", "[d]")
        }
        sizes = (4, 4, 4, 20, 20)
        self.blocks = [eqx.nn.Linear(16, size, key=next(key)) for size in sizes]
        self.odd = {
            "4": eqx.nn.Linear(16, 2, key=next(key)),
            "weight": eqx.nn.Linear(16, 2, key=next(key)),
        }


LIMITS = [3, 8, 3, 1, 1, 1, 3, 3, 3, 4, 4, 4, 8, 8, 2, 2]
"""The smaller sides of `UNet`, at most 8, in its order."""


@pytest.fixture(scope="module")
def unet():
    return eqx.filter_eval_shape(UNet, jr.key(0))


def shaped(model, *args, **kwargs):
    """`lorax.loraify(...)` without computing anything: shapes are enough to see
    ranks."""
    return eqx.filter_eval_shape(lambda: lorax.loraify(model, *args, **kwargs))


def ranks(model):
    return [weight.rank for weight in weights(model)]


@pytest.mark.parametrize("rank", (None, {"time": 1}, {"time": None}))
def test_the_default_rank_fits(rank, unet):
    adapted = shaped(unet, rank=rank, key=jr.key(1))
    assert ranks(adapted) == LIMITS
    assert [weight.scale for weight in weights(adapted)] == [1.0] * len(LIMITS)
    summary = lorax.summary(adapted)
    assert [target.rank for target in summary.targets] == LIMITS


def suggested(error):
    """The argument that the message suggests, evaluated as Python."""
    text = re.search(r"`rank=(\{.*?\})`", str(error.value))
    assert text is not None
    return eval(text[1], {"lorax": lorax, "re": re})


RANKS = {
    "one": (8, LIMITS),
    "larger than all": (64, [3, 12, 3, 1, 1, 1, 3, 3, 3, 4, 4, 4, 16, 16, 2, 2]),
    "mapping": (
        {"blocks": 6, "*": 2},
        [2, 2, 2, 1, 1, 1, 2, 2, 2, 4, 4, 4, 6, 6, 2, 2],
    ),
    "a pattern that decides no more": (
        {"blocks.0": 6, "classes.a": 7, re.compile("odd.*"): 1, "*": 1},
        [1, 1, 1, 1, 1, 1, 1, 3, 1, 4, 1, 1, 1, 1, 1, 1],
    ),
    "regex that stays": (
        {re.compile(r"(blocks|classes)\..*"): 6, "*": 1},
        [1, 1, 1, 1, 1, 1, 3, 3, 3, 4, 4, 4, 6, 6, 1, 1],
    ),
    "spec": (
        lorax.LoraSpec(4, alpha=8),
        [3, 4, 3, 1, 1, 1, 3, 3, 3, 4, 4, 4, 4, 4, 2, 2],
    ),
    "spec in a mapping": (
        {"classes": lorax.LoraSpec(6, alpha=3.0), "*": 1},
        [1] * 6 + [3] * 3 + [1] * 7,
    ),
}


@pytest.mark.own_errors
@pytest.mark.parametrize("name", RANKS)
def test_what_is_suggested_works_as_pasted(name, unet):
    rank, expected = RANKS[name]
    with pytest.raises(ValueError, match="exceeds the smaller side") as error:
        shaped(unet, rank=rank, key=jr.key(1))
    adapted = shaped(unet, rank=suggested(error), key=jr.key(1))
    assert ranks(adapted) == expected
    if "spec" in name:
        small = weights(adapted)[6]
        assert small.alpha == (8 if name == "spec" else 3)


@pytest.mark.own_errors
def test_a_model_that_is_one_layer():
    with pytest.raises(ValueError, match="exceeds") as error:
        lorax.loraify(eqx.nn.Linear(4, 3, key=jr.key(0)), rank=8, key=jr.key(0))
    assert suggested(error) == {"weight": 3}
    # The same name further down is a different path.
    both = {"weight": eqx.nn.Linear(4, 3, key=jr.key(0)), "a": OwnWeight(jr.key(1))}
    with pytest.raises(ValueError, match="exceeds") as error:
        lorax.loraify(both, ["weight", "a"], rank=8, key=jr.key(0))
    adapted = lorax.loraify(both, ["weight", "a"], rank=suggested(error), key=jr.key(0))
    assert ranks(adapted) == [8, 3]


class OwnWeight(eqx.Module):
    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (9, 9))


class Attention(eqx.Module):
    """Attention with `einsum`, as people write it."""

    wq: jax.Array
    wo: jax.Array
    experts: jax.Array

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.wq = jr.normal(keys[0], (24, 2, 8))
        self.wo = jr.normal(keys[1], (2, 8, 24))
        self.experts = jr.normal(keys[2], (3, 24, 24)) / 5

    def __call__(self, x):
        heads = jnp.einsum("td,dhk->thk", x, self.wq)
        x = jnp.einsum("thk,hkd->td", jnp.tanh(heads), self.wo)
        return jnp.einsum("td,edf->tef", x, self.experts).sum(1)


@pytest.mark.own_errors
def test_an_adapter_larger_than_its_base():
    model = {"attention": Attention(jr.key(0))}
    with pytest.raises(ValueError) as error:
        lorax.loraify(model, "attention.w*", key=jr.key(1))
    text = str(error.value)
    assert "attention.wq (24, 2, 8) was taken for 24 matrices (2, 8)" in text
    assert "`rank=2` gives 480 trained numbers over 384 frozen" in text
    rank = suggested(error)
    assert rank == {
        "attention.wq": lorax.LoraSpec(8, rows=(0,), columns=(1, 2)),
        "attention.wo": lorax.LoraSpec(8, rows=(0, 1), columns=(2,)),
    }
    adapted = lorax.loraify(model, "attention.w*", rank=rank, key=jr.key(1))
    assert [weight.a.shape for weight in weights(adapted)] == [(8, 2, 8), (8, 24)]
    assert lorax.summary(adapted).trained == 2 * 8 * (24 + 16)
    # The second suggestion in the message.
    batch = re.search(r"they are `batch`: `(.*?)`", text)
    assert batch is not None
    rank = eval(batch[1], {"lorax": lorax})
    adapted = lorax.loraify(model, "wq", rank=rank, key=jr.key(1))
    assert weights(adapted)[0].a.shape == (24, 2, 8)
    # With an explicit rank, and with other targets.
    everything = ["attention.w*", "experts"]
    with pytest.raises(ValueError, match="rank=8") as error:
        lorax.loraify(model, everything, rank={"wq": 8, "*": 3}, key=jr.key(1))
    rank = suggested(error)
    adapted = lorax.loraify(model, everything, rank=rank, key=jr.key(1))
    assert ranks(adapted) == [8, 3, 3]


def test_what_is_no_guess():
    """Stacks of known layers, kernels, matrices, and explicit axes need no guess."""
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 8, key=key))(
        jr.split(jr.key(0), 24)
    )
    conv = eqx.nn.Conv2d(2, 8, 1, key=jr.key(0))
    model = {"stack": stack, "conv": conv, "own": OwnLinear(2, 8, key=jr.key(0))}
    adapted = lorax.loraify(model, ["stack", "conv", "kernel"], rank=2, key=jr.key(1))
    assert ranks(adapted) == [2, 2, 2]


def test_specs_in_loraify(tmp_path):
    """Values, gradients, merging and files with explicit axes."""
    model = {"layer": Attention(jr.key(0))}
    rank = {
        "wq": lorax.LoraSpec(3, rows=(0,), columns=(1, 2), alpha=6),
        "wo": lorax.LoraSpec(2, columns=(-1,), rank_stabilised=True),
        "experts": lorax.LoraSpec(2, rows=(2,), columns=(1,), batch=(0,)),
    }
    adapted = lorax.loraify(
        model, ["w*", "experts"], rank=rank, alpha={"wo": 5, "*": 4}, key=jr.key(1)
    )
    query, out, experts = weights(adapted)
    assert (query.b.shape, query.a.shape) == ((24, 3), (3, 2, 8))
    assert (out.b.shape, out.a.shape) == ((2, 8, 2), (2, 24))
    assert (experts.b.shape, experts.a.shape) == ((3, 24, 2), (3, 2, 24))
    assert (query.scale, experts.scale) == (2.0, 2.0)
    assert out.scale == pytest.approx(5 / 2**0.5)

    adapted = trained(adapted)
    x = jr.normal(jr.key(2), (5, 24))
    found = adapted["layer"](x)
    query, out, experts = weights(adapted)

    def dense(factors, plain, x):
        (b0, a0), (b1, a1), (b2, a2) = factors
        changes = (
            query.scale * jnp.einsum("dr,rhk->dhk", b0, a0),
            out.scale * jnp.einsum("hkr,rd->hkd", b1, a1),
            experts.scale * jnp.einsum("efr,erd->edf", b2, a2),
        )
        where = lambda m: (m.wq, m.wo, m.experts)  # noqa: E731
        new = [w + change for w, change in zip(where(plain), changes)]
        return eqx.tree_at(where, plain, new)(x)

    factors = [(weight.b, weight.a) for weight in weights(adapted)]
    assert_close(found, call64(dense, factors, model["layer"], x))
    gradient = lorax.filter_grad(lambda m, x: m["layer"](x).sum())(adapted, x)
    dense_gradient = jax.grad(lambda *args: dense(*args).sum())
    wanted = call64(dense_gradient, factors, model["layer"], x)
    assert_close([(weight.b, weight.a) for weight in weights(gradient)], wanted)

    assert_close(lorax.unloraify(adapted)["layer"](x), found)
    assert_identical(lorax.unloraify(adapted, merge=False), model)
    lorax.save_adapter(tmp_path / "adapter", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "adapter", model), adapted)
    with pytest.raises(ValueError, match="has factors along the axes"):
        lorax.peft.save(tmp_path / "peft", adapted, names=lambda path: path)


def test_specs_without_axes_take_those_of_the_layer():
    conv = eqx.nn.Conv2d(4, 6, 3, key=jr.key(0))
    adapted = lorax.loraify(conv, rank=lorax.LoraSpec(2, alpha=8), key=jr.key(1))
    plain = lorax.loraify(conv, rank=2, alpha=8, key=jr.key(1))
    assert_identical(adapted, plain)


def test_specs_for_layers():
    """Swapped axes, which the layers support too."""
    linear = eqx.nn.Linear(4, 6, key=jr.key(0))
    swapped = lorax.LoraSpec(2, rows=(1,))
    adapted = trained(lorax.loraify(linear, rank=swapped, key=jr.key(1)))
    assert adapted.weight.b.shape == (4, 2)
    assert_close(adapted(jnp.ones(4)), lorax.unloraify(adapted)(jnp.ones(4)))
    conv = eqx.nn.Conv1d(4, 6, 3, key=jr.key(0))
    adapted = trained(lorax.loraify(conv, rank=swapped, key=jr.key(1)))
    assert adapted.weight.b.shape == (4, 2)
    x = jr.normal(jr.key(2), (4, 5))
    assert_close(adapted(x), lorax.unloraify(adapted)(x))


@pytest.mark.own_errors
@pytest.mark.parametrize(
    "spec, message",
    (
        (lorax.LoraSpec(0), "must be at least 1"),
        (lorax.LoraSpec(True), "must be an integer"),
        (lorax.LoraSpec(2, rows=(5,)), r"layer.wq \(24, 2, 8\): .*names an axis"),
        (lorax.LoraSpec(2, batch=(0, 1)), "leaves no axes"),
        (lorax.LoraSpec(2, rows=(0,), columns=(0,)), "name each of the 3 axes once"),
        (lorax.LoraSpec(2, rows=(0,), alpha=-1), "must be positive"),
        (lorax.LoraSpec(17, rows=(0,)), "`rank=17` exceeds the smaller side, 16, of"),
    ),
)
def test_specs_that_do_not_fit(spec, message):
    model = {"layer": Attention(jr.key(0))}
    with pytest.raises((ValueError, TypeError), match=message):
        lorax.loraify(model, "wq", rank=spec, key=jr.key(0))

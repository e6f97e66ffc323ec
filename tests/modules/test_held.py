"""Weights in a model that are views or mixtures: files, partitions, checkpoints and
merging treat them correctly, or raise an error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubled import Doubled
from functions import normal
from helpers import assert_close, assert_identical, dense_weight, is_weight, wide

import eqx_lorax as lorax
from eqx_lorax._factored import views
from eqx_lorax._layers import LoraLinear
from eqx_lorax._methods import FactoredWeight


def weight(*shape, rank=2, dtype=jnp.float32, seed=0, **settings) -> lorax.LoraWeight:
    *batch, rows, columns = shape
    w, b, a = normal(*shape, seed=seed), normal(*batch, rows, rank, seed=seed + 1), None
    a = normal(*batch, rank, columns, seed=seed + 2).astype(dtype)
    return lorax.LoraWeight(w, b.astype(dtype), a, alpha=3.0, **settings)


def kernel() -> lorax.LoraWeight:
    w, b, a = normal(4, 3, 5), normal(5, 2, seed=1), normal(2, 4, 3, seed=2)
    return lorax.LoraWeight(w, b, a, 3.0, rows=(-1,), columns=(-3, -2))


def dense_kernel(lora: Any) -> np.ndarray:
    update = np.einsum("or,rwi->wio", wide(lora.b), wide(lora.a))
    return wide(lora.w) + lora.scale * update


def nested(*shape: int) -> lorax.LoraWeight:
    above = weight(*shape, rank=1, seed=7)
    return lorax.LoraWeight(weight(*shape), above.b, above.a, alpha=0.5)


def doubled() -> Doubled:
    plain = weight(4, 4)
    return Doubled(plain.w, plain.b, plain.a, 4)


def doubled_dense() -> np.ndarray:
    plain = weight(4, 4)
    return dense_weight(plain.replace(alpha=4.0))


def scaled() -> FactoredWeight:
    return FactoredWeight(views.scale(weight(4, 4).factored(), normal(4, 1, seed=9)))


def of_bank(pick: Callable[[lorax.AdapterBank], Any], **options: Any) -> Any:
    """A model with the bank, and one with each of its adapters."""
    every = [{"w": weight(4, 4, seed=i, **options)} for i in (10, 20, 30)]
    every = [{"w": x["w"].replace(w=every[0]["w"].w)} for x in every]
    parts = [lorax.partition(model) for model in every]
    bank = lorax.AdapterBank([params for params, _ in parts])
    return lorax.combine(pick(bank), parts[0][1])["w"]


def mixed(*weights: float, **options: Any) -> np.ndarray:
    every = [weight(4, 4, seed=i, **options) for i in (10, 20, 30)]
    update = [dense_weight(x) - wide(x.w) for x in every]
    return wide(every[0].w) + sum(c * u for c, u in zip(weights, update))


class Held(NamedTuple):
    make: Callable[[], Any]
    expected: Callable[[], np.ndarray]
    base: Callable[[], Any]
    """What the plain model has there."""
    refused: str | None = None


def view(of: Callable[..., Any], change: Callable[[Any], Any], *shape: int) -> Held:
    return Held(
        lambda: change(of(*shape)),
        lambda: change(dense_weight(of(*shape))),
        lambda: jnp.asarray(change(np.asarray(lowest(of(*shape))))),
    )


def lowest(x: Any) -> Any:
    while is_weight(x):
        x = x.w
    return x


def first_base() -> Any:
    return weight(4, 4, seed=10).w


HELD = {
    "plain": view(weight, lambda x: x, 4, 4),
    "T": view(weight, lambda x: x.T, 4, 4),
    "T of a rectangle": view(weight, lambda x: x.T, 6, 4),
    "T of T": view(weight, lambda x: x.T.T, 4, 4),
    "T of a stack": view(weight, lambda x: x.T, 3, 3, 3),
    "mT of a stack": view(weight, lambda x: x.mT, 2, 4, 4),
    "T of two": view(weight, lambda x: x.T, 2, 3, 4, 4),
    "rows": view(weight, lambda x: x[2:], 6, 4),
    "columns": view(weight, lambda x: x[:, 1:3], 4, 6),
    "part of T": view(weight, lambda x: x.T[1:], 4, 5),
    "a layer": view(weight, lambda x: x[1], 2, 4, 4),
    "narrower": Held(
        lambda: weight(4, 4).astype(jnp.bfloat16),
        lambda: (
            dense_weight(weight(4, 4))
            + wide(weight(4, 4).w.astype(jnp.bfloat16))
            - wide(weight(4, 4).w)
        ),
        lambda: weight(4, 4).w.astype(jnp.bfloat16),
    ),
    "kernel": Held(
        lambda: kernel().T,
        lambda: dense_kernel(kernel()).T,
        lambda: jnp.asarray(kernel().w.T),
    ),
    "nested": view(nested, lambda x: x, 4, 4),
    "T of nested": view(nested, lambda x: x.T, 4, 4),
    "nested on T": Held(
        lambda: nested(4, 4).replace(w=weight(4, 4).T),
        lambda: dense_weight(nested(4, 4)) + (d := dense_weight(weight(4, 4))).T - d,
        lambda: weight(4, 4).w.T,
    ),
    "T of another method": Held(
        lambda: doubled().T,
        lambda: doubled_dense().T,
        lambda: doubled().w.T,
    ),
    "a mixture": Held(
        lambda: of_bank(lambda bank: bank.mix([0.25, -0.5, 2.0])),
        lambda: mixed(0.25, -0.5, 2.0),
        first_base,
    ),
    "stabilised mixture": Held(
        lambda: of_bank(lambda b: b.mix([0.25, -0.5, 2.0]), rank_stabilised=True),
        lambda: mixed(0.25, -0.5, 2.0, rank_stabilised=True),
        first_base,
    ),
    "one of a bank": Held(
        lambda: of_bank(lambda bank: bank[1]), lambda: mixed(0, 1, 0), first_base
    ),
    "T of a mixture": Held(
        lambda: of_bank(lambda bank: bank.mix([0.25, -0.5, 2.0])).T,
        lambda: mixed(0.25, -0.5, 2.0).T,
        lambda: first_base().T,
    ),
    "scaled": Held(
        lambda: scaled(),
        lambda: dense_weight(weight(4, 4)) * wide(normal(4, 1, seed=9)),
        lambda: weight(4, 4).w * normal(4, 1, seed=9),
        "layer.w is scaled",
    ),
    "T of scaled": Held(
        lambda: scaled().T,
        lambda: (dense_weight(weight(4, 4)) * wide(normal(4, 1, seed=9))).T,
        lambda: (weight(4, 4).w * normal(4, 1, seed=9)).T,
        "layer.w is scaled",
    ),
}
every = pytest.mark.parametrize("name", HELD)


def tree(held: Any) -> Any:
    """A tree with the weight and an array beside it."""
    return {"layer": {"w": held}, "bias": normal(3, seed=5)}


def tolerance(held: Any) -> float:
    return 1e-2 if held.dtype == jnp.bfloat16 else 1e-6


def assert_stands_for(found: Any, case: Held) -> None:
    w = found["layer"]["w"]
    assert w.shape == case.expected().shape
    dense = w.materialise() if is_weight(w) else w
    assert_close(dense, case.expected(), tolerance(w))
    assert_identical(found["bias"], normal(3, seed=5))


@every
def test_files(name, tmp_path):
    case, path = HELD[name], tmp_path / "a"
    model, plain = tree(case.make()), tree(case.base())
    if case.refused is not None:
        with pytest.raises(ValueError, match=f"{case.refused}.*merge"):
            lorax.save_adapter(path, model)
        assert not path.exists()
        return
    lorax.save_adapter(path, model)
    info = lorax.adapter_info(path)["targets"][0]
    assert (info["path"], info["shape"]) == ("layer.w", case.expected().shape)
    loaded = lorax.load_adapter(path, model)
    assert_stands_for(loaded, case)
    if "nested" in name:
        return
    assert_stands_for(lorax.load_adapter(path, plain), case)
    # The loaded weight is an ordinary one, and saving it again gives an equal file.
    lorax.save_adapter(tmp_path / "again", loaded)
    assert_identical(lorax.load_adapter(tmp_path / "again", plain), loaded)


@every
def test_merging(name):
    case = HELD[name]
    model = tree(case.make())
    assert_stands_for(lorax.unloraify(model), case)
    bare = lorax.unloraify(model, merge=False)
    assert_close(bare["layer"]["w"], case.base(), 1e-7)
    assert bare["layer"]["w"].dtype == case.base().dtype
    if name not in ("T of two", "a mixture", "T of scaled"):
        return
    inside = jax.jit(lorax.unloraify)(model)
    assert_stands_for(inside, case)
    copied = jax.tree.map(jnp.copy, model)
    assert_stands_for(lorax.unloraify(copied, donate=True), case)


@every
def test_partitions(name):
    """`params` is the adapter. Combined with the frozen part of another model with the
    same base, it gives the same model or an error."""
    case = HELD[name]
    model = tree(case.make())
    if case.refused is not None:
        with pytest.raises(ValueError, match=f"{case.refused}.*merge"):
            lorax.partition(model)
        return
    params, frozen = lorax.partition(model)
    assert_stands_for(lorax.combine(params, frozen), case)
    gradient = lorax.filter_grad(lambda m: jnp.sum(m["layer"]["w"].materialise() ** 2))
    shapes = eqx.filter_eval_shape(gradient, model)
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    ours = params["layer"]["w"]
    form = case.make().factored()
    base = case.make().w if is_weight(case.make().w) else case.base()
    try:
        other = lorax.LoraWeight(
            base,
            jnp.zeros_like(ours.b),
            jnp.zeros_like(ours.a),
            form.scale * form.rank,
            form.rows,
            form.columns,
        )
    except ValueError:  # A base of this shape cannot have these factors.
        return
    _, elsewhere = lorax.partition(tree(other))
    try:
        found = lorax.combine(params, elsewhere)
    except ValueError:
        return
    assert_stands_for(found, case)


@every
def test_checkpoints(name, tmp_path):
    case = HELD[name]
    if case.refused is not None:
        return
    params, frozen = lorax.partition(tree(case.make()))
    zeros = jax.tree.map(jnp.zeros_like, params)
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, params)
        found = checkpoints.restore(zeros)
        assert found is not None
        assert_identical(found[1], params)
    if "nested" in name:
        return
    # The base is that of the plain model.
    with lorax.Checkpoints(tmp_path, tree(case.base())) as checkpoints:
        assert checkpoints.restore(zeros) is not None


@every
def test_summaries(name):
    model = tree(HELD[name].make())
    expected = HELD[name].expected().shape
    assert lorax.summary(model).targets[0].shape == expected
    abstract = eqx.filter_eval_shape(lambda: model)
    assert str(lorax.summary(abstract)) == str(lorax.summary(model))


@pytest.mark.parametrize(
    "name", [name for name, case in HELD.items() if case.expected().ndim == 2]
)
def test_folders_of_peft(name, tmp_path):
    case = HELD[name]
    rows, columns = case.expected().shape
    plain = eqx.filter_eval_shape(
        lambda: eqx.nn.Linear(columns, rows, use_bias=False, key=jax.random.key(0))
    )
    plain = eqx.tree_at(lambda m: m.weight, plain, case.base())
    model = {"layer": LoraLinear(eqx.tree_at(lambda m: m.weight, plain, case.make()))}
    names = {"layer": "layer"}
    try:
        lorax.peft.save(tmp_path, model, names=names)
    except ValueError as error:
        assert "layer.weight" in str(error)
        assert name not in ("plain", "rows", "columns", "narrower", "a mixture")
        assert not list(tmp_path.iterdir())
        return
    loaded: Any = lorax.peft.load(tmp_path, {"layer": plain}, names=names)
    found = loaded["layer"].weight.materialise()
    assert_close(found, case.expected(), tolerance(found))


def test_narrow_mixtures(tmp_path):
    """A gate in float32 is not rounded to bfloat16, the dtype of the factors."""

    def make(rank_stabilised: bool = False) -> Any:
        parts = [{"w": weight(4, 4, dtype=jnp.bfloat16, seed=i)} for i in (10, 20)]
        parts = [{"w": x["w"].replace(w=parts[0]["w"].w)} for x in parts]
        split = [lorax.partition(model) for model in parts]
        bank = lorax.AdapterBank([params for params, _ in split])
        mixture = lorax.combine(bank.mix([1 / 3, 2 / 3]), split[0][1])["w"]
        dense = [dense_weight(x["w"]) for x in parts]
        return mixture, dense[0] / 3 + 2 * dense[1] / 3

    mixture, expected = make()
    lorax.save_adapter(tmp_path / "a", {"w": mixture})
    loaded = lorax.load_adapter(tmp_path / "a", {"w": mixture.w})
    assert_close(loaded["w"].materialise(), expected, 1e-6)
    params, frozen = lorax.partition({"w": mixture})
    assert_close(lorax.combine(params, frozen)["w"].materialise(), expected, 1e-6)


# Other methods


class Remembering(lorax.AbstractLoraWeight):
    """Has state beyond the arguments of its class."""

    w: Any
    b: jax.Array
    a: jax.Array
    times: Any = eqx.field(static=True)
    more: Any
    half: float = eqx.field(static=True)

    method = "remembering"
    frozen = ("w", "more")

    def __init__(self, w, b, a, times=1):
        self.w, self.b, self.a, self.times = w, b, a, times
        # These are computed from the saved arguments.
        self.more = jnp.sum(b)
        self.half = 0.5

    def factored(self):
        return lorax.Factored(self.w, self.b, self.a, 1 / self.b.shape[-1])

    def array_axes(self):
        return {"b": (-2, "rank"), "a": ("rank", -1)}


def test_what_a_class_holds_beyond_its_arguments(tmp_path):
    plain = weight(4, 4)
    held = Remembering(plain.w, plain.b, plain.a, (1, "two", None))
    lorax.save_adapter(tmp_path / "a", {"w": held})
    assert_identical(lorax.load_adapter(tmp_path / "a", {"w": plain.w}), {"w": held})
    for change, message in [
        ({"more": jnp.ones(())}, "in `more`"),
        ({"half": 0.25}, "in `half`"),
        ({"more": None, "half": 1.0}, "in `more`, `half`"),
        ({"times": jax.nn.relu}, "in `times`"),
        ({"times": ((1, 2), 3)}, "in `times`"),
        ({"times": {"b": 2}}, "in `times`"),
    ]:
        changed = Remembering(plain.w, plain.b, plain.a, 1)
        for name, value in change.items():
            object.__setattr__(changed, name, value)
        with pytest.raises(TypeError, match=f"Remembering at layer.w .*{message}"):
            lorax.save_adapter(tmp_path / "b", {"layer": {"w": changed}})
    assert not (tmp_path / "b").exists()


class Keyed(Doubled):  # Not final as in the library, to keep this short.
    method = "keyed"

    def __init__(self, w, b, a, key):
        self.w, self.b, self.a, self.times = w, b, a, 1


def test_arguments_that_a_class_does_not_hold(tmp_path):
    plain = weight(4, 4)
    held = Keyed(plain.w, plain.b, plain.a, jax.random.key(0))
    with pytest.raises(TypeError, match="Keyed at w, whose argument `key` cannot"):
        lorax.save_adapter(tmp_path / "a", {"w": held})


def test_split_lora_params():
    """Its counterpart is the whole tree, so the gate cannot be folded into the
    factors."""
    for name in ("a mixture", "scaled"):
        with pytest.raises(ValueError, match="layer/w.*`lorax.partition`|layer.w"):
            spec = {"layer": {"w": 2}, "bias": 0}
            lorax.split_lora_params(tree(HELD[name].make()), spec)

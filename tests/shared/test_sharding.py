"""Models on several devices. `meshes.py` has the shardings."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_identical, trained, weights
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from meshes import collectives

import eqx_lorax as lorax


KEY = jr.key(1)
KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@pytest.fixture
def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def put(x, mesh, *spec):
    return jax.device_put(np.asarray(x), NamedSharding(mesh, P(*spec)))


def linear_on(mesh, *spec):
    linear = eqx.nn.Linear(8, 16, key=jr.key(0))
    return eqx.tree_at(
        lambda layer: layer.weight, linear, put(linear.weight, mesh, *spec)
    )


def specs(weight):
    return [weight.b.sharding.spec, weight.a.sharding.spec]


# The sharding of factors


@pytest.mark.eight_devices
@KINDS
@pytest.mark.parametrize(
    "spec, b, a",
    [
        ((), (None, None), (None, None)),
        (("data",), ("data", None), (None, None)),
        ((None, "model"), (None, None), (None, "model")),
        (("model", "data"), ("model", None), (None, "data")),
        ((("data", "model"),), (("data", "model"), None), (None, None)),
    ],
)
def test_factors_follow_the_base(mesh, spec, b, a):
    model = linear_on(mesh, *spec)
    adapted = lorax.loraify(model, rank=2, key=KEY)
    assert specs(adapted.weight) == [P(*b), P(*a)]
    assert adapted.weight.w is model.weight
    # The numbers are those that a single device would draw.
    single = lorax.loraify(eqx.nn.Linear(8, 16, key=jr.key(0)), rank=2, key=KEY)
    assert_identical(np.asarray(adapted.weight.a), np.asarray(single.weight.a))
    params = lorax.init_lora({"w": model.weight}, 2, KEY)
    assert specs(params["w"]) == [P(*b), P(*a)]


@pytest.mark.eight_devices
@KINDS
def test_stacks_convolutions_and_second_adapters(mesh):
    stack = eqx.filter_vmap(lambda k: eqx.nn.Linear(8, 16, key=k))(
        jr.split(jr.key(0), 4)
    )
    stack = eqx.tree_at(
        lambda layer: layer.weight, stack, put(stack.weight, mesh, "data", "model")
    )
    once = lorax.loraify(stack, rank=2, key=KEY)
    assert specs(once.weight) == [P("data", "model", None), P("data", None, None)]
    twice = lorax.loraify(once, rank=1, nested=True, key=jr.key(2))
    assert specs(twice.weight) == [P("data", "model", None), P("data", None, None)]
    conv = eqx.nn.Conv1d(4, 16, 3, key=jr.key(0))
    conv = eqx.tree_at(
        lambda c: c.weight, conv, put(conv.weight, mesh, "model", "data")
    )
    conv = lorax.loraify(conv, rank=2, key=KEY)
    assert specs(conv.weight) == [P("model", None), P(None, "data", None)]


@pytest.mark.eight_devices
@KINDS
def test_placement_can_be_chosen(mesh):
    model = {"x": linear_on(mesh, "model"), "y": linear_on(mesh, "model")}

    def placed(sharding):
        adapted = lorax.loraify(model, rank=2, sharding=sharding, key=KEY)
        return [*specs(adapted["x"].weight), *specs(adapted["y"].weight)]

    followed = [P("model", None), P(None, None)]
    assert placed(P()) == [P(), P()] * 2
    assert placed(NamedSharding(mesh, P(None, "model"))) == [P(None, "model")] * 4
    assert placed((None, P(None, "data"))) == [followed[0], P(None, "data")] * 2
    assert placed({"y": P()}) == [*followed, P(), P()]
    spec = {"x": lorax.LoraSpec(2, sharding=(P(), None)), "y": 2}
    params = {"x": model["x"].weight, "y": model["y"].weight}
    params = lorax.init_lora(params, spec, KEY, sharding=P("model"))
    assert specs(params["x"]) == [P(), P(None, None)]
    assert specs(params["y"]) == [P("model"), P("model")]
    with pytest.raises(ValueError, match="rank 2|size is 2|does not fit"):
        lorax.init_lora({"x": model["x"].weight}, 2, KEY, sharding=P("data"))


@pytest.mark.eight_devices
@pytest.mark.own_errors
@pytest.mark.parametrize(
    "sharding, error, message",
    [
        (P("data", "data"), ValueError, r"weight does not fit .*\(16, 3\).*duplicate"),
        (P("rows"), ValueError, "rows.* is not found in mesh"),
        (P(None, None, "data"), ValueError, "for 3 axes. Pass a pair"),
        ((None, P("model")), ValueError, r"\(3, 8\).*should evenly divide"),
        ("data", TypeError, "must be a `jax.sharding.Sharding`"),
    ],
)
def test_placements_that_do_not_fit(sharding, error, message):
    model = linear_on(jax.make_mesh((4, 2), ("data", "model")), "model")
    with pytest.raises(error, match=message):
        lorax.loraify(model, rank=3, sharding=sharding, key=jr.key(0))


def test_a_specification_needs_a_mesh():
    linear = eqx.nn.Linear(8, 16, key=jr.key(0))
    with pytest.raises(ValueError, match="is on no mesh; pass `jax.sharding.Named"):
        lorax.loraify(linear, rank=2, sharding=P("data"), key=jr.key(0))


@pytest.mark.eight_devices
def test_single_devices():
    plain = eqx.nn.Linear(8, 16, key=jr.key(0))
    assert not lorax.loraify(plain, rank=2, key=KEY).weight.b.committed
    third = jax.devices()[2]
    model = jax.device_put(plain, third)
    weight = lorax.loraify(model, rank=2, key=KEY).weight
    assert weight.a.devices() == weight.b.devices() == {third}


@KINDS
def test_abstract_models(kind):
    """No device is needed, for a mesh of any size."""
    mesh = AbstractMesh((64, 8), ("data", "model"), axis_types=(kind, kind))
    shape = jax.ShapeDtypeStruct(
        (28672, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, P("model", "data"))
    )
    linear = eqx.filter_eval_shape(eqx.nn.Linear, 8192, 28672, key=jr.key(0))
    linear = eqx.tree_at(lambda layer: layer.weight, linear, shape)
    before = len(jax.live_arrays())
    once = lorax.loraify(linear, rank=16, key=KEY)
    twice = lorax.loraify(once, rank=2, nested=True, key=KEY)
    assert len(jax.live_arrays()) <= before
    weight = once.weight
    assert specs(weight) == specs(twice.weight) == [P("model", None), P(None, "data")]
    assert (weight.b.shape, weight.b.dtype) == ((28672, 16), jnp.float32)
    if kind == AxisType.Explicit:
        adapt = lambda model: lorax.loraify(model, rank=16, key=KEY)  # noqa: E731
        assert specs(eqx.filter_eval_shape(adapt, linear).weight) == specs(weight)


@pytest.mark.eight_devices
@KINDS
def test_inside_jit(mesh):
    model = linear_on(mesh, "model", "data")

    def adapt(model, sharding):
        return lorax.loraify(model, rank=2, sharding=sharding, key=KEY)

    chosen = (P("model", None), P(None, "data"))
    if AxisType.Explicit in mesh.axis_types:
        assert specs(eqx.filter_jit(adapt)(model, None).weight) == list(chosen)
    with jax.set_mesh(mesh):
        adapted = eqx.filter_jit(adapt)(model, chosen)
    for factor, spec in zip((adapted.weight.b, adapted.weight.a), chosen):
        wanted = NamedSharding(mesh, spec)
        assert factor.sharding.is_equivalent_to(wanted, 2)
    assert_close(adapted.weight.a, adapt(model, None).weight.a)


@pytest.mark.eight_devices
def test_a_stack_gets_no_more_than_its_adapters():
    """No array of the base's size is made, not even temporarily."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    base = put(np.zeros((16, 64, 64), np.float32), mesh, None, "data", "model")
    linear = eqx.nn.Linear(64, 64, use_bias=False, key=jr.key(0))
    stack = eqx.tree_at(lambda layer: layer.weight, linear, base)
    before = {id(x): x for x in jax.live_arrays()}
    adapted = lorax.loraify(stack, rank=2, key=KEY)
    new = [x for x in jax.live_arrays() if id(x) not in before]
    factors = adapted.weight.b.nbytes + adapted.weight.a.nbytes
    assert sum(x.nbytes for x in new) < factors + 1000
    assert adapted.weight.w is base

    def create(key):
        return lorax.loraify(stack, rank=2, key=key).weight.a

    costs = jax.jit(create).lower(KEY).compile().memory_analysis()
    assert costs is not None
    assert costs.temp_size_in_bytes + costs.output_size_in_bytes < 4 * factors


# Merging


@pytest.mark.eight_devices
@KINDS
def test_merging_stays_where_it_is(mesh):
    model = trained(lorax.loraify(linear_on(mesh, "model", "data"), rank=2, key=KEY))
    w, b, a = (np.asarray(x) for x in (model.weight.w, model.weight.b, model.weight.a))
    program = jax.jit(lambda w: w.materialise()).lower(model.weight).compile()
    assert not collectives(program.as_text())
    merged = lorax.unloraify(model)
    assert merged.weight.sharding.spec == P("model", "data")
    assert_close(merged.weight, w + b @ a)
    pointers = _pointers(model.weight.w)
    donated = lorax.unloraify(model, donate=True)
    assert model.weight.w.is_deleted() and not model.weight.b.is_deleted()
    assert _pointers(donated.weight) == pointers
    assert_identical(donated, merged)


def _pointers(x):
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def test_donating_keeps_what_is_elsewhere(getkey):
    linear = eqx.nn.Linear(4, 4, key=getkey())
    model = {"x": linear, "tied": linear.weight}
    adapted = trained(lorax.loraify(model, "x", rank=2, key=getkey()))
    merged = lorax.unloraify(adapted, donate=True)
    assert merged["tied"] is linear.weight and not linear.weight.is_deleted()


def test_donating_what_is_not_finite_changes_nothing(getkey):
    model = lorax.loraify(eqx.nn.Linear(4, 4, key=getkey()), rank=2, key=getkey())
    model = eqx.tree_at(lambda m: m.weight.b, model, jnp.full((4, 2), jnp.nan))
    with pytest.raises(ValueError, match="not finite"):
        lorax.unloraify(model, donate=True)
    assert not model.weight.w.is_deleted()
    with pytest.raises(ValueError, match="`merge=False` merges none"):
        lorax.unloraify(model, merge=False, donate=True)


# It runs wherever the plain model does


class Stack(eqx.Module):
    layers: eqx.nn.Linear

    def __init__(self):
        make = lambda key: eqx.nn.Linear(8, 8, key=key)  # noqa: E731
        self.layers = eqx.filter_vmap(make)(jr.split(jr.key(0), 4))

    def __call__(self, x):
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        layer = lambda x, a: (jnp.tanh(eqx.combine(a, rest)(x)), None)  # noqa: E731
        return jax.lax.scan(layer, x, arrays)[0]


class Function(eqx.Module):
    """A function of one weight."""

    weight: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x):
        return FUNCTIONS[self.name](self.weight, x)


def _told(*spec):
    return lambda w, x: jnp.einsum("oi,bi->bo", w, x, out_sharding=P(*spec))


@functools.partial(jax.sharding.auto_axes, out_sharding=P("data", None))
def _auto(w, x):
    return x @ w.T


FUNCTIONS = {
    "product": lambda w, x: w @ x.T,
    "told where": _told("data", None),
    "told to split": _told(None, "model"),
    "gathered": lambda w, x: x @ jax.sharding.reshard(w, P(None, None)).T,
    "moved": lambda w, x: x @ jax.sharding.reshard(w.T, P(None, "model")),
    "looked up": lambda w, x: w.at[jnp.arange(5)].get(out_sharding=P(None, None)),
    "sliced": lambda w, x: x @ w[:8].T,
    "reshaped": lambda w, x: jnp.einsum("abi,ti->tab", w.reshape(2, 8, 8), x),
    "automatic": lambda w, x: _auto(w, x),
    "summed": lambda w, x: w.sum(0) + x.sum(),
    "scaled": lambda w, x: x @ (w * jnp.arange(16.0)[:, None]).T,
}
SPECS = [
    ((), ("data",)),
    (("model",), ("data",)),
    ((None, "model"), ("data", "model")),
    (("model", "data"), ()),
    ((("data", "model"),), (None, "model")),
]
IMAGES = [(spec, (x[0],) if x else ()) for spec, x in SPECS]
STACKS = [((None, *spec), x) for spec, x in SPECS] + [(("data",), ())]
KEPT = [  # A model of weights, the call, the shape of its input
    ("linear", eqx.nn.Linear(8, 16, key=KEY), jax.vmap, (8, 8), SPECS, None),
    ("stack", Stack(), jax.vmap, (8, 8), STACKS, None),
    (
        "convolution",
        eqx.nn.Conv1d(4, 16, 3, padding=1, key=KEY),
        jax.vmap,
        (8, 4, 8),
        IMAGES,
        None,
    ),
    *(
        (
            name,
            Function(jr.normal(KEY, (16, 8)), name),
            lambda f: f,
            (8, 8),
            SPECS,
            "weight",
        )
        for name in FUNCTIONS
    ),
]


@pytest.mark.eight_devices
@pytest.mark.heavy
@KINDS
@pytest.mark.parametrize("case", KEPT, ids=lambda case: case[0])
def test_runs_wherever_the_plain_model_does(case, kind, mesh):
    name, plain, call, shape, pairs, filter = case
    needs_types = name in ("told where", "told to split", "moved")
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def loss(model, x):
        return jnp.sin(call(model)(x)).sum()

    def on_mesh(leaf, spec):
        if not eqx.is_array(leaf):
            return leaf
        is_bias = leaf.ndim == 1 or leaf.shape[-1] == 1
        is_bias = is_bias or (leaf.ndim == 2 and len(spec) == 3)
        return put(leaf, mesh, *(() if is_bias else spec))

    ran = 0
    for spec, x_spec in pairs:
        with jax.set_mesh(mesh):
            model = jax.tree.map(lambda leaf: on_mesh(leaf, spec), plain)
            placed = put(x, mesh, *x_spec)
            adapted = lorax.loraify(model, filter, rank=2, key=KEY)
            adapted = jax.tree.map(
                lambda new, old: (
                    put(new, mesh, *old.sharding.spec) if eqx.is_array(new) else new
                ),
                trained(adapted),
                adapted,
            )
            merged = lorax.unloraify(adapted)
            try:
                value, dense = eqx.filter_jit(eqx.filter_value_and_grad(loss))(
                    merged, placed
                )
            except Exception:  # Such as a missing `out_sharding`.
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("error", lorax.MaterialiseWarning)
                found = eqx.filter_jit(lorax.filter_value_and_grad(loss))(
                    adapted, placed
                )
        ran += 1
        assert_close(found[0], value)
        (weight,), (got,) = weights(adapted), weights(found[1])
        dw = _matrix(_weight_of(dense))
        b, a = np.asarray(weight.b), _matrix(weight.a)
        assert_close(got.b, dw @ np.swapaxes(a, -1, -2), 1e-4)
        assert_close(_matrix(got.a), np.swapaxes(b, -1, -2) @ dw, 1e-4)
        # With automatic axes the compiler chooses the sharding of a gradient.
        is_typed = kind == AxisType.Explicit
        assert not is_typed or got.b.sharding == weight.b.sharding
    assert bool(ran) == (kind == AxisType.Explicit or not needs_types)


def _weight_of(model):
    return model.layers.weight if isinstance(model, Stack) else model.weight


def _matrix(x):
    """A kernel as a matrix: its outputs, or the rank, by all other axes."""
    x = np.asarray(x)
    is_kernel = x.ndim == 3 and x.shape[-1] == 3
    return x.reshape(len(x), -1) if is_kernel else x

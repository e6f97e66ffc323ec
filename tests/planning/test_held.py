"""The arrays that a plan says a step holds when it holds most."""

import collections

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax


TOKENS, WIDTH, RANK = 50, 8, 2
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


def make_layers(count, filter=None):
    keys = jr.split(jr.key(0), count)
    layers = [eqx.nn.Linear(WIDTH, WIDTH, use_bias=False, key=key) for key in keys]
    return lorax.loraify(layers, filter, rank=RANK, key=jr.key(1))


def make_loss(transform=lambda layer: layer):
    def loss(layers, x):
        for layer in layers:
            block = transform(lambda x, layer=layer: jnp.sin(jax.vmap(layer)(x)))
            x = block(x)
        return jnp.sum(x)

    return loss


def checkpointed(policy):
    return lambda block: eqx.filter_checkpoint(block, policy=policy)


def count(plan, **attributes):
    """The number of arrays of each name and shape."""
    return collections.Counter(
        {
            (x.name, x.shape): x.count
            for x in plan.held
            if all(getattr(x, name) == value for name, value in attributes.items())
        }
    )


OUTPUT, HIDDEN = (TOKENS, WIDTH), (TOKENS, RANK)
FROZEN = {("cos", OUTPUT): 1}
ADAPTED = {("cos", OUTPUT): 1, ("sin", OUTPUT): 1, ("lorax_hidden", HIDDEN): 1}
BY_POLICY = {
    ("lorax_product", OUTPUT): 1,
    ("lorax_hidden", HIDDEN): 1,
    ("sin", OUTPUT): 1,
}


@pytest.mark.parametrize(
    "filter, transform, of_a_layer",
    [
        (lambda path, _: path == ("0",), lambda block: block, FROZEN),
        (None, lambda block: block, ADAPTED),
        (None, checkpointed(lorax.checkpoint_policy()), BY_POLICY),
        (None, checkpointed(None), {("sin", OUTPUT): 1}),
    ],
    ids=["frozen", "adapted", "policy", "checkpoint"],
)
def test_what_one_more_layer_holds(filter, transform, of_a_layer):
    """A frozen layer keeps the derivative of the sine, and an adapted one its input and
    the hidden activation too. A checkpointed block always keeps its input."""
    if filter is not None:
        filter = "0"
    loss = make_loss(transform)
    plans = [lorax.plan(loss, make_layers(n, filter), X) for n in (3, 4)]
    small, large = (count(plan, is_backward=False) for plan in plans)
    assert large - small == of_a_layer
    more = sum(x * shape[0] * shape[1] for (_, shape), x in of_a_layer.items())
    assert plans[1].activations - plans[0].activations == 4 * more


def test_the_arrays_are_the_activations():
    plan = lorax.plan(make_loss(), make_layers(3), X)
    assert sum(x.nbytes for x in plan.held) == plan.activations > 0
    sizes = [x.nbytes for x in plan.held]
    assert sizes == sorted(sizes, reverse=True)
    assert all(x.dtype == "float32" for x in plan.held)
    assert "held" not in repr(plan)


def test_arrays_of_a_scan():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(WIDTH, WIDTH, key=key))
    layers = lorax.loraify(make(jr.split(jr.key(0), 3)), rank=RANK, key=jr.key(1))

    def loss(layers, x):
        arrays, rest = eqx.partition(layers, eqx.is_array)

        def body(x, arrays):
            return jnp.sin(jax.vmap(eqx.combine(arrays, rest))(x)), None

        policy = lorax.checkpoint_policy()
        body = jax.checkpoint(body, policy=policy)
        return jnp.sum(lax.scan(body, x, arrays)[0])

    plan = lorax.plan(loss, layers, X)
    assert count(plan, is_backward=False) == {
        ("carry", (3, *OUTPUT)): 1,
        ("lorax_product", (3, *OUTPUT)): 1,
        ("lorax_hidden", (3, *HIDDEN)): 1,
    }
    slices = count(plan, is_backward=True)
    assert slices["slice of lorax_product", OUTPUT] == 1
    assert slices["slice of lorax_hidden", HIDDEN] == 1
    assert slices["slice of weight", (WIDTH, WIDTH)] == 1
    products = [x for x in plan.held if x.name == "lorax_product"]
    assert [x.scope for x in products] == ["lorax.LoraLinear"]


def test_names_and_scopes():
    def loss(layers, x):
        with jax.named_scope("outer"):
            x = jax.vmap(layers[0])(x)
            with jax.named_scope("inner"):
                x = checkpoint_name(jnp.exp(x), "mine")
        return jnp.sum(jnp.sin(x) * jnp.cos(x))

    held = lorax.plan(loss, make_layers(1), X).held
    assert [x.scope for x in held if x.name == "mine"] == ["outer/inner"]


def test_an_unpacked_weight():
    layers = lorax.quantise([eqx.nn.Linear(64, 64, key=jr.key(0)) for _ in range(2)])
    layers = lorax.loraify(layers, rank=RANK, key=jr.key(1))
    x = jax.ShapeDtypeStruct((5, 64), jnp.float32)
    plan = lorax.plan(make_loss(), layers, x)
    # One at a time.
    assert count(plan)["unpacked weight", (64, 64)] == 1


def test_gathered_weights():
    axis_types = (AxisType.Auto,)
    mesh = AbstractMesh((4,), ("data",), axis_types=axis_types)
    sharding = NamedSharding(mesh, P("data"))

    def shard(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    layers = make_layers(1)
    layers = eqx.tree_at(lambda m: m[0].weight.w, layers, replace_fn=shard)
    plan = lorax.plan(make_loss(), layers, shard(jnp.ones((4, WIDTH))))
    gathered = [x for x in plan.held if x.name == "gathered weight"]
    assert [(x.shape, x.nbytes) for x in gathered] == [((8, 8), 4 * 8 * 8)]


def test_tables():
    wide = eqx.nn.Linear(200, 200, key=jr.key(0))
    model = lorax.loraify([wide], rank=1, key=jr.key(1))
    x = jax.ShapeDtypeStruct((TOKENS, 200), jnp.float32)
    plan = lorax.plan(make_loss(), model, x)
    table, full = plan.table(), plan.table(full=True)
    assert table.startswith(str(plan)) and full.startswith(str(plan))
    assert "smaller ones" in table and "lorax_hidden" not in table
    lines = full.splitlines()
    assert lines[-len(plan.held) - 2].split() == [
        *("pass", "made", "by", "scope", "shape", "dtype", "arrays", "bytes")
    ]
    assert "smaller ones" not in full
    assert lines[-1].split() == [
        *("forward", "lorax_hidden", "lorax.LoraLinear", "50×1", "float32", "1"),
        *("200", "B"),
    ]


def test_nothing_is_held():
    linear = make_layers(1)
    plan = lorax.plan(lambda layers, x: layers[0].weight.b[0, 0], linear, X)
    assert plan.held == () and plan.activations == 0
    assert plan.table().startswith(str(plan))

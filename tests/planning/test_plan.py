import gc

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from tiny_llama import Llama

import eqx_lorax as lorax


MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SHARDED = NamedSharding(MESH, P("data"))


def shaped(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def place_array(tree, *spec):
    """The abstract tree, with matrices sharded by their last two axes."""

    def place(x):
        if not eqx.is_array(x) and not isinstance(x, jax.ShapeDtypeStruct):
            return x
        axes = (*[None] * (x.ndim - 2), *spec) if x.ndim >= 2 else ()
        return shaped(*x.shape, dtype=x.dtype, sharding=NamedSharding(MESH, P(*axes)))

    return jax.tree.map(place, tree)


def adapted(model, filter=None, *, rank):
    """The abstract model with abstract adapters."""
    adapt = lambda model: lorax.loraify(model, filter, rank=rank, key=jr.key(0))  # noqa: E731
    return eqx.filter_eval_shape(adapt, model)


def count_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def mean_square(model, x):
    return jnp.mean(jax.vmap(model)(x).astype(jnp.float32) ** 2)


@pytest.fixture
def mlp(getkey):
    model = eqx.nn.MLP(12, 6, 16, 2, dtype=jnp.bfloat16, key=getkey())
    return lorax.loraify(model, rank=2, key=getkey())


X, TWENTY = (shaped(n, 12, dtype=jnp.bfloat16) for n in (5, 20))


# Memory


@pytest.mark.parametrize("optimizer", [None, optax.adafactor(1e-3), optax.sgd(0.1)])
def test_bytes_are_those_of_the_arrays(mlp, optimizer):
    plan = lorax.plan(mean_square, mlp, X, optimizer=optimizer)
    params, frozen = lorax.partition(mlp)
    assert plan.base == count_bytes(frozen)
    assert plan.adapters == plan.gradients == count_bytes(params)
    assert plan.optimizer == count_bytes((optimizer or optax.adam(1e-3)).init(params))
    parts = (plan.base, plan.adapters, plan.gradients, plan.optimizer)
    assert plan.total == sum(parts) + plan.activations
    assert (plan.devices, plan.received) == (1, 0)


def test_abstract_or_not(mlp):
    abstract = eqx.filter_eval_shape(lambda: mlp)
    plan = lorax.plan(mean_square, abstract, X)
    assert lorax.plan(mean_square, mlp, jnp.ones(X.shape, X.dtype)) == plan


def test_also(mlp):
    plan, more = (
        lorax.plan(mean_square, mlp, X, also=x) for x in (None, "layers.0.bias")
    )
    assert more.adapters == plan.adapters + 2 * 16
    assert more.base == plan.base - 2 * 16
    assert more.optimizer == plan.optimizer + 2 * 2 * 16


def test_on_one_device_of_several(getkey):
    model = {"linear": eqx.nn.Linear(16, 8, use_bias=False, key=getkey())}
    model = adapted(model, rank=2)
    weight = model["linear"].weight
    placement = [P("model", "data"), P("model", None), P(None, "data")]
    arrays = [
        shaped(*x.shape, sharding=NamedSharding(MESH, spec))
        for x, spec in zip((weight.w, weight.b, weight.a), placement)
    ]
    get = lambda m: [getattr(m["linear"].weight, name) for name in "wba"]  # noqa: E731
    model = eqx.tree_at(get, model, arrays)
    loss = lambda m, x: mean_square(m["linear"], x)  # noqa: E731
    plan = lorax.plan(loss, model, shaped(4, 16, sharding=SHARDED))
    assert plan.devices == 8
    assert plan.base == 4 * 16 * 8 // 8
    b, a = 4 * 8 * 2 // 2, 4 * 2 * 16 // 4
    assert plan.adapters == plan.gradients == b + a
    assert plan.optimizer == 2 * (b + a) + 4  # depends on the number of steps
    # The input's gradient is not needed, so the base is read once. Parts of a weight on
    # other rows of the mesh are received, but not those on other columns.
    w, a = 4 * 16 * 8 // 2, 4 * 2 * 16
    assert plan.read == w + 2 * b + a
    gathered = (w - w // 4) + (a - a // 4)
    summed = (b - b // 4) + (b - b // 4) + (a - a // 4)
    assert plan.received == gathered + summed


def test_activations_of_a_divided_batch(mlp):
    small, whole = (lorax.plan(mean_square, mlp, x) for x in (X, TWENTY))
    x = shaped(20, 12, dtype=X.dtype, sharding=SHARDED)
    divided = lorax.plan(mean_square, mlp, x)
    assert divided.activations == small.activations < whole.activations
    assert divided.flops == 4 * small.flops


def stack(form, weights, x):
    if form.startswith("list"):
        layer = lambda x, w: jnp.sin(x @ w)  # noqa: E731
        layer = jax.checkpoint(layer) if "checkpoint" in form else layer
        for w in weights:
            x = layer(x, w)
        return jnp.sum(x)

    def body(x, w):
        return jnp.sin(x @ w), None

    body = jax.checkpoint(body) if form == "checkpoint" else body
    return jnp.sum(lax.scan(body, x, weights)[0])


def plan_of_stack(form, layers):
    weights = [shaped(8, 8)] * layers if "list" in form else shaped(layers, 8, 8)
    loss = lambda model, x: stack(form, model["w"], x)  # noqa: E731
    return lorax.plan(loss, {"w": weights}, shaped(50, 8), also="w")


@pytest.mark.parametrize(
    "form, kept", [("list", 2), ("scan", 2), ("checkpoint", 1), ("list, checkpoint", 1)]
)
def test_activations_of_a_stack(form, kept):
    """Each layer keeps its input, for the gradient of the weight, and the cosine, for
    that of the sine. With a checkpoint it keeps only its input."""
    plans = [plan_of_stack(form, layers) for layers in (3, 4)]
    assert plans[1].activations - plans[0].activations == kept * 4 * 50 * 8


def checkpointed(model, tokens):
    """A Llama with checkpointed layers."""
    arrays, rest = eqx.partition(model.blocks, eqx.is_array)
    body = lambda x, arrays: (eqx.combine(arrays, rest)(x), None)  # noqa: E731
    x, _ = lax.scan(jax.checkpoint(body), jax.vmap(model.words)(tokens), arrays)
    return jax.vmap(model.head)(jax.vmap(model.norm)(x))


def next_token_loss(model, tokens):
    logits = jax.vmap(lambda tokens: checkpointed(model, tokens))(tokens)
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def test_activations_are_near_those_compiled(as_for_users):
    model = eqx.filter_eval_shape(lambda: Llama(500, 64, 256, 4, 4, 2, jr.key(0)))
    model = adapted(model, "blocks", rank=4)
    tokens = shaped(4, 128, dtype=jnp.int32)
    plan = lorax.plan(next_token_loss, model, tokens)
    params, frozen = lorax.partition(model)

    def gradient(params, frozen, tokens):
        of_params = lambda p: next_token_loss(eqx.combine(p, frozen), tokens)  # noqa: E731
        return jax.grad(of_params)(params)

    compiled = jax.jit(gradient).lower(params, frozen, tokens).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0.6 < plan.activations / temporary < 1.6


def test_seventy_billion_parameters(as_for_users):
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    model = eqx.filter_eval_shape(
        lambda: Llama(128_256, 8192, 28_672, 80, 64, 8, jr.key(0))
    )
    model = place_array(adapted(model, rank=16), "model", "data")
    batch = shaped(4, 1024, dtype=jnp.int32, sharding=SHARDED)
    plan = lorax.plan(next_token_loss, model, batch)
    assert 70e9 * 4 / 8 < plan.base < 71e9 * 4 / 8
    summary = lorax.summary(model)
    assert summary.device_frozen_bytes == plan.base
    # Forward, forward again except for the last layer of a block, and backward. The
    # head runs only forward and backward. The base has no gradients.
    layers, down, head = 68.45e9, 80 * 8192 * 28_672, 8192 * 128_256
    weights = 3 * layers - down + 2 * head
    assert plan.flops == pytest.approx(2 * weights * 4 * 1024, rel=0.05)
    # Half of a weight is gathered each time, and a quarter is already there.
    assert plan.received == pytest.approx(weights * 4 / 2 * 3 / 4, rel=0.05)
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1000


# Operations


@pytest.mark.parametrize(
    "form, products",
    [("list", 8), ("scan", 9), ("checkpoint", 12), ("list, checkpoint", 11)],
)
def test_flops_of_a_stack(form, products):
    """Each of three products has two more in the backward pass. The input's gradient is
    not needed for the first one, but a scan computes it anyway. With checkpoints each
    product is computed again."""
    assert plan_of_stack(form, 3).flops == products * 2 * 50 * 8 * 8


def test_flops_of_adapters():
    """A frozen product has one more, for the gradient of its input. The products of an
    adapter have two more each."""
    make = lambda: [eqx.nn.Linear(8, 8, key=jr.key(0)) for _ in range(2)]  # noqa: E731
    model = adapted(eqx.filter_eval_shape(make), rank=2)
    loss = lambda m, x: mean_square(lambda x: m[1](m[0](x)), x)  # noqa: E731
    plan = lorax.plan(loss, model, shaped(5, 8))
    first = 5 * 8 * 8 + (2 + 3) * 5 * 8 * 2
    second = 2 * 5 * 8 * 8 + (2 + 4) * 5 * 8 * 2
    assert plan.flops == 2 * (first + second)


def test_flops_of_a_convolution():
    conv = eqx.filter_eval_shape(
        lambda: eqx.nn.Conv2d(4, 6, 3, stride=2, groups=2, key=jr.key(0))
    )
    plan = lorax.plan(mean_square, conv, shaped(5, 4, 9, 9), also="weight")
    # 4 × 4 outputs with 6 channels, each from 2 × 3 × 3 inputs; and the kernel's
    # gradient.
    assert plan.flops == 2 * 2 * 5 * 6 * 16 * 18


def test_flops_of_control_flow():
    def loss(model, x):
        w = model["w"]
        wide = lambda x: jnp.sum(x @ w @ w.T)  # noqa: E731
        x = lax.while_loop(lambda x: x.sum() < 0, lambda x: x + jnp.ones((5, 5)) @ x, x)
        return lax.cond(x[0, 0] > 0, wide, lambda x: jnp.sum(x @ w), x)

    plan = lorax.plan(loss, {"w": shaped(8, 6)}, shaped(5, 8), also="w")
    # The larger branch: two products, and gradients of `w`, of `x @ w` and of `w.T`.
    # The loop counts as one iteration.
    assert plan.flops == 2 * (5 * 5 * 8 * 6 + 5 * 5 * 8)


def test_flops_of_all_devices():
    def loss(model, x):
        matmul = jax.shard_map(
            lambda x, w: x @ w,
            mesh=MESH,
            in_specs=(P("data"), P(None, "model")),
            out_specs=P("data", "model"),
        )
        return jnp.sum(matmul(x, model["w"]))

    plan = lorax.plan(loss, {"w": shaped(8, 6)}, shaped(16, 8), also="w")
    assert plan.flops == 2 * 2 * 16 * 8 * 6


# The bound


def test_bound(mlp):
    plan = lorax.plan(mean_square, mlp, X)
    moved = plan.read + 2 * (plan.adapters + plan.optimizer)
    device = lorax.Accelerator("device", plan.total, plan.flops / 3, moved / 2)
    bound = plan.bound(device)
    assert (bound.compute, bound.memory, bound.communication) == (3, 2, 0)
    assert bound.seconds == 3 and bound.fits and bound.accelerator is device
    small = lorax.Accelerator("small", plan.total - 1, 1e9, 1e9)
    assert not plan.bound(small).fits


def test_table(mlp):
    lines = str(lorax.plan(mean_square, mlp, X)).splitlines()
    assert lines[0] == "on one device"
    assert [line.split()[0] for line in lines[1:7]] == [
        *("base", "adapters", "gradients", "optimizer", "activations", "total")
    ]
    x = shaped(20, 12, dtype=X.dtype, sharding=SHARDED)
    assert str(lorax.plan(mean_square, mlp, x)).startswith("on one of 8 devices")


# Errors


def test_no_adapters(mlp):
    plain = lorax.unloraify(mlp, merge=False)
    with pytest.raises(ValueError, match="no adapters"):
        lorax.plan(mean_square, plain, X)


@pytest.mark.parametrize(
    "loss, got",
    [
        (lambda model, x: jax.vmap(model)(x), r"shape \(5, 6\) and dtype bfloat16"),
        (lambda model, x: jnp.argmax(model(x[0])), r"shape \(\) and dtype int32"),
        (lambda model, x: (mean_square(model, x), x), "tuple"),
    ],
)
def test_not_a_scalar(mlp, loss, got):
    with pytest.raises(ValueError, match=f"`loss` returned .*{got}.*Take the mean"):
        lorax.plan(loss, mlp, X)


def test_what_cannot_be_divided(mlp):
    with pytest.raises(ValueError, match="divide"):
        lorax.plan(mean_square, mlp, shaped(5, 12, dtype=X.dtype, sharding=SHARDED))

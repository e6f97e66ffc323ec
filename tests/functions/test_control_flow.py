"""`lorax.lora(fn)` under transformations and control flow."""

import warnings

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import Case, check, dense, factored, normal, scalar, trained_part
from helpers import assert_close, equations
from jax.sharding import PartitionSpec as P

import eqx_lorax as lorax


W = factored((11, 11))
TALL = factored((13, 11), seed=2)
STACK = factored((3, 13, 11), seed=3)
SQUARE = factored((3, 11, 11), seed=4)
x11, x13 = normal(11), normal(13)


def step(w, x):
    return jnp.tanh(w @ x)


def scan_stacked(stack, x):
    return lax.scan(lambda x, w: (step(w, x), x.sum()), x, stack)


def scan_tree(tree, x):
    def body(x, layer):
        return step(layer["w"], x) + layer["bias"][0], None

    return lax.scan(body, x, tree, reverse=True, unroll=2)[0]


def scan_transposed(stack, x):
    """The transpose of every layer, taken inside and outside of the loop."""

    def body(x, w):
        # Scaled, since float32 has no derivative of a `tanh` far from zero.
        return jnp.tanh(0.03 * (w[0] @ (w[1] @ x))), None

    return lax.scan(body, x, (stack.swapaxes(1, 2), stack))[0]


def scan_moved_axis(w, x):
    return lax.scan(lambda x, w: (step(w, x), None), x, jnp.moveaxis(w, 1, 0))[0]


def scan_carried(w, x):
    def body(carry, _):
        w, x = carry
        return (w, step(w, x)), None

    return lax.scan(body, (w, x), length=3)[0][1]


def scan_returns_weights(stack, x):
    ws = lax.scan(lambda _, w: (None, 2.0 * w.T), None, stack)[1]
    return ws[1] @ x


def fori(stack, x):
    return lax.fori_loop(0, 3, lambda i, x: step(stack[i], x), x)


def while_loop(w, x, n):
    def body(carry):
        i, w, x = carry
        return i + 1, w, step(w, x)

    return lax.while_loop(lambda carry: carry[0] < n, body, (0, w, x))[2]


def while_condition(w, x):
    def goes_on(x):
        return jnp.abs(w @ x).max() > 0.5

    return lax.while_loop(goes_on, lambda x: 0.01 * step(w, x), x)


def cond(w, x, flag):
    return lax.cond(flag, lambda w: step(w, x), lambda w: x @ w, w)


def cond_picks(stack, x, i):
    branches = [lambda s: s[0], lambda s: s[1], lambda s: s[2]]
    return lax.switch(i, branches, stack) @ x


def cond_in_scan(stack, x):
    def body(x, w):
        return lax.cond(x[0] > 0, lambda w: step(0.1 * w, x), lambda w: x @ w, w), None

    return lax.scan(body, x, stack)[0]


def by_platform(w, x):
    return lax.platform_dependent(w, x, cpu=step, default=lambda w, x: x @ w)


def maps(w, xs):
    return lax.map(lambda x: step(w, x), xs)


def checkpointed(w, x):
    inner = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable)
    return inner(w, jax.checkpoint(step)(w, x))


def jitted(stack, x):
    @jax.jit
    def layer(w, x):
        return {"y": step(w, x), "w": w.T}

    out = layer(stack[0], x)
    return layer(stack[1], out["y"])["y"] + out["w"] @ x


def closed_over(w, x):
    return jax.jit(lambda x: jax.vmap(lambda x: step(w, x))(x))(x)


def differentiated(w, x):
    """Derivatives inside the function, with respect to its activations."""
    gradient = jax.grad(lambda x: step(w, x).sum())(x)
    tangent = jax.jvp(lambda x: step(w, x), (x,), (x,))[1]
    return gradient, tangent, jax.hessian(lambda x: step(w, x).sum())(x)


def attention(params, x):
    q, k, v = (jnp.einsum("ti,hid->thd", x, params[name]) for name in "qkv")
    out = jax.nn.dot_product_attention(q[None], k[None], v[None])[0]
    return jnp.einsum("thd,hdo->to", jax.nn.gelu(out), params["o"])


def losses(w, x):
    logits = w @ x
    labels = jnp.arange(11) % 2
    return (
        optax.softmax_cross_entropy_with_integer_labels(logits[None], labels[:1]),
        optax.sigmoid_binary_cross_entropy(logits, labels.astype(x.dtype)),
        optax.huber_loss(logits),
        jax.nn.logsumexp(logits) + jax.nn.silu(logits),
    )


QKVO = {
    name: factored(shape, rows, columns, seed=i)
    for i, (name, shape, rows, columns) in enumerate(
        [
            ("q", (2, 6, 5), (1,), (0, 2)),
            ("k", (2, 6, 5), (1,), (0, 2)),
            ("v", (2, 6, 5), (1,), (0, 2)),
            ("o", (2, 5, 6), (0, 1), (2,)),
        ]
    )
}
ATTENTION = (QKVO, normal(4, 6))

CASES = [
    Case("scan-stacked", scan_stacked, (SQUARE, x11)),
    Case("scan-tree", scan_tree, ({"w": SQUARE, "bias": normal(3, 1)}, x11)),
    Case("scan-transposed", scan_transposed, (STACK, x11)),
    Case("scan-moved-axis", scan_moved_axis, (factored((11, 3, 11), (0,), (2,)), x11)),
    Case(
        "scan-constant",
        lambda w, x: lax.scan(lambda x, _: (step(w, x), x), x, length=3),
        (W, x11),
    ),
    Case("scan-carried", scan_carried, (W, x11)),
    Case("scan-returns-weights", scan_returns_weights, (STACK, x13)),
    Case("fori", fori, (SQUARE, x11)),
    Case("cond", cond, (W, x11, True)),
    Case("cond-picks", cond_picks, (SQUARE, x11, jnp.int32(2))),
    Case("cond-in-scan", cond_in_scan, (SQUARE, x11)),
    Case("platform-dependent", by_platform, (W, x11)),
    Case("map", maps, (W, normal(4, 11))),
    Case("vmap-weights", jax.vmap(step), (SQUARE, normal(3, 11))),
    Case("vmap-in-axes", jax.vmap(step, in_axes=(None, 0)), (W, normal(3, 11))),
    Case("checkpoint", checkpointed, (W, x11)),
    Case("jit", jitted, (factored((2, 11, 11)), x11)),
    Case("closed-over", closed_over, (TALL, normal(3, 11))),
    Case("differentiated", differentiated, (W, x11)),
    Case("attention", attention, ATTENTION),
    Case("losses", losses, (W, x11)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees(case):
    # JAX's own attention mixes dtypes in float64.
    with jax.numpy_dtype_promotion("standard"):
        check(
            case.fn, *case.args, eagerly=case.name.startswith(("scan", "jit", "cond"))
        )


@pytest.mark.parametrize("fn", [while_loop, while_condition])
def test_while(fn):
    """Forward only: `while` has no reverse mode."""
    args = (0.2 * x11,) if fn is while_condition else (x11, 3)
    w = factored((11, 11))
    adapted = lorax.lora(fn, on_materialise="error")
    for run in (adapted, jax.jit(adapted)):
        assert_close(run(w, *args), fn(dense(w), *args), 1e-4)
    params, frozen = trained_part(w)
    direction = jax.tree.map(jnp.cos, params)

    def pushed(fn):
        def of_params(p):
            return scalar(fn(eqx.combine(p, frozen), *args))

        return jax.jit(lambda p, d: jax.jvp(of_params, (p,), (d,)))(params, direction)

    assert_close(pushed(adapted), pushed(lambda w, *args: fn(dense(w), *args)), 1e-4)


def test_transformed_from_outside():
    """`vmap`, `scan`, `checkpoint`, `jit` and derivatives of `lora(fn)` itself."""
    adapted = lorax.lora(step, on_materialise="error")
    xs = normal(3, 11)
    expected = jax.vmap(step)(dense(SQUARE), xs)
    assert_close(jax.vmap(adapted)(SQUARE, xs), expected)
    assert_close(lax.map(lambda wx: adapted(*wx), (SQUARE, xs)), expected)
    assert_close(jax.checkpoint(adapted)(W, x11), step(dense(W), x11))
    hessian = jax.hessian(lambda x: adapted(W, x).sum())(x11)
    assert_close(hessian, jax.hessian(lambda x: step(dense(W), x).sum())(x11))
    shape = jax.eval_shape(adapted, W, x11)
    assert (shape.shape, shape.dtype) == ((11,), jnp.float32)


def test_weights_that_were_sliced_wrongly():
    """Without a batch axis in the spec, the layers of a stack count as rows."""
    wrong = lorax.init_lora(normal(2, 11, 11), 2, jax.random.key(0))
    with pytest.raises(ValueError, match=r"LoraSpec\(rank, batch=\(0,\)\)"):
        jax.vmap(lorax.lora(step), in_axes=(0, None))(wrong, x11)


def test_nested():
    once, twice = lorax.lora(step), lorax.lora(lorax.lora(step))
    assert np.array_equal(once(W, x11), twice(W, x11))


def test_whole_gradient_is_zero_for_the_base():
    gradient = jax.grad(lambda w: lorax.lora(step)(w, x11).sum())(W)
    assert not np.any(gradient.w)
    assert np.any(gradient.a) and np.any(gradient.b)


def test_the_base_is_frozen_to_every_order():
    def penalty(fn):
        return lambda w, x: (jax.grad(lambda x: fn(w, x).sum())(x) ** 2).sum()

    adapted, whole = lorax.lora(step), lambda w, x: step(dense(w), x)
    for run in (lambda f: f, jax.jit):
        got = run(jax.grad(penalty(adapted)))(W, x11)
        want = jax.grad(penalty(whole))(W, x11)
        assert not np.any(got.w)
        assert_close((got.a, got.b), (want.a, want.b), 1e-4)
    hessian = jax.hessian(lambda w: adapted(w, x11).sum())(W)
    assert not np.any(hessian.w.b) and not np.any(hessian.b.w)


def test_scan_memory():
    """A scanned stack keeps no copy of the frozen weights for the backward pass."""
    stack = factored((12, 256, 256), rank=4)
    stack = eqx.tree_at(lambda w: w.w, stack, stack.w / 16)
    params, frozen = trained_part(stack)
    x = normal(8, 256)

    def body(x, w):
        return jnp.tanh(x @ w), None

    def loss(params, x):
        adapted = lorax.lora(lambda w, x: lax.scan(body, x, w)[0].sum())
        return adapted(eqx.combine(params, frozen), x)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * stack.w.nbytes


# A custom derivative of the user is kept.


@jax.custom_vjp
def sevenfold(x):
    return x


sevenfold.defvjp(lambda x: (x, None), lambda _, g: (7 * g,))


@jax.custom_jvp
def threefold(x):
    return x


threefold.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))


@jax.custom_vjp
def odd_product(w, x):
    return w @ x


odd_product.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda saved, g: (5 * jnp.outer(g, saved[1]), -saved[0].T @ g),
)


@pytest.mark.parametrize("rule", [sevenfold, threefold])
def test_custom_derivatives_of_activations(rule):
    """Custom derivatives without weights are unchanged: nothing is materialised."""
    check(
        lambda w, x: rule(jnp.tanh(w @ rule(x))),
        TALL,
        x11,
        sides=(13, 11),
        forward=rule is threefold,
    )
    factor = {sevenfold: 7, threefold: 3}[rule]
    adapted = lorax.lora(lambda w, x: rule(w @ x).sum(), on_materialise="error")
    plain = lorax.lora(lambda w, x: (w @ x).sum())
    for argnum in (0, 1):
        got = jax.grad(adapted, argnum)(TALL, x11)
        assert_close(
            got, jax.tree.map(lambda g: factor * g, jax.grad(plain, argnum)(TALL, x11))
        )


def test_custom_derivative_of_a_weight():
    """A function with a custom derivative gets the dense weight, so that its rule stays
    valid."""
    adapted = lorax.lora(lambda w, x: odd_product(w, x).sum(), on_materialise="allow")
    gradient, to_x = jax.grad(adapted, (0, 1))(TALL, x11)
    plain, plain_to_x = jax.grad(lorax.lora(lambda w, x: (w @ x).sum()), (0, 1))(
        TALL, x11
    )
    assert_close(gradient.a, 5 * plain.a)
    assert_close(gradient.b, 5 * plain.b)
    assert_close(to_x, -plain_to_x)
    assert not np.any(gradient.w)


def test_checkpoint_stays():
    """Rematerialisation and its policy are kept, also after differentiation."""

    def residuals(policy):
        def loss(p, x):
            inner = jax.checkpoint(lambda w, x: jnp.sin(step(w, x)), policy=policy)
            return lorax.lora(inner)(eqx.combine(p, frozen), x).sum()

        params, frozen = trained_part(TALL)
        # A batch: JAX's policies do not know the primitive for one vector.
        jaxpr = jax.make_jaxpr(jax.grad(loss))(params, normal(11, 4))
        remats = [e for e in equations(jaxpr.jaxpr) if "policy" in e.params]
        assert remats and all(e.params["policy"] is policy for e in remats)
        inner = [e for e in remats if e.params["differentiated"]]
        return sum(
            e.primitive.name == "dot_general"
            for remat in inner
            for e in equations(remat.params["jaxpr"])
        )

    nothing = residuals(jax.checkpoint_policies.nothing_saveable)
    everything = residuals(jax.checkpoint_policies.dots_saveable)
    assert nothing > everything


def test_effects_happen_once_in_order(capfd):
    def fn(w, x):
        jax.debug.print("first {}", x[0], ordered=True)
        y = w @ x
        jax.debug.print("second {}", y.shape[0], ordered=True)

        def body(y, i):
            jax.debug.print("loop {}", i, ordered=True)
            return jnp.tanh(w @ y), None

        y, _ = lax.scan(body, y, jnp.arange(2))
        jax.debug.print("last", ordered=True)
        return y

    expected = ["first 1.0", "second 11", "loop 0", "loop 1", "last"]
    x = jnp.ones(11)
    for run in (lorax.lora(fn), jax.jit(lorax.lora(fn))):
        jax.block_until_ready(run(W, x))
        jax.effects_barrier()
        assert capfd.readouterr().out.split("\n")[:-1] == expected


def test_callbacks_happen_once():
    seen = []

    def fn(w, x):
        y = jnp.tanh(w @ x)
        jax.debug.callback(lambda y: seen.append(np.asarray(y)), y)
        shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return jax.pure_callback(lambda y: np.asarray(y) + 1, shape, y)

    out = lorax.lora(fn)(W, x11)
    jax.effects_barrier()
    assert len(seen) == 1
    assert_close(out, seen[0] + 1)


def test_no_needless_compilation():
    """A second eager call compiles nothing, because inner programs are cached by their
    jaxpr."""
    traces = []

    @jax.jit
    def inner(w, x):
        traces.append(None)
        return lax.scan(lambda x, _: (step(w, x), None), x, length=2)[0]

    def body(x, w):
        traces.append(None)
        return step(w, x), None

    def fn(w, stack, x):
        return lax.scan(body, inner(w, x), stack)[0]

    adapted = lorax.lora(fn, on_materialise="error")
    adapted(W, SQUARE, x11)
    adapted(W, SQUARE, x11)
    count, events = len(traces), []
    listen = lambda event, *_, **__: events.append(event)  # noqa: E731
    # It stays registered, since JAX 0.8 cannot remove it.
    jax.monitoring.register_event_duration_secs_listener(listen)
    adapted(W, SQUARE, x11)
    assert len(traces) == count
    assert not [event for event in events if "backend_compile" in event]


def test_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        def local(w, x):
            return lax.psum(w @ x, "d")

        specs = (P(None, "d"), P("d"))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(w, x)

    adapted = lorax.lora(fn, on_materialise="error")
    assert_close(jax.jit(adapted)(TALL, x11), dense(TALL) @ x11)
    check(fn, TALL, x11, sides=(13, 11), eagerly=False)


def test_quiet_where_nothing_is_materialised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in CASES[:4]:
            lorax.lora(case.fn)(*case.args)

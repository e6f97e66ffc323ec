"""Joins and random programs compared with dense ones: the value, and the gradient of
every inexact array, adapted or plain."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from functions import (
    assert_nothing_dense,
    check,
    dense,
    factored,
    normal,
    scalar,
    trained_part,
)
from helpers import assert_close

import eqx_lorax as lorax


def check_programs(seeds):
    for seed in seeds:
        source = programs.source(seed)
        found = "\n".join(programs.faults(source))
        assert not found, f"Seed {seed}:\n{source}\n{found}"


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_random_programs(first):
    check_programs(range(first, first + 20))


@pytest.mark.heavy
@pytest.mark.parametrize("first", range(100, 400, 50))
def test_random_programs_beyond(first):
    check_programs(range(first, first + 50))


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(10_000, 14_000, 100))
def test_more_random_programs(first):
    check_programs(range(first, first + 100))


# The joined arrays have derivatives: factors that were looked up before, and plain
# arrays.
# `u` and `o` have few rows, `t` has many, `n` has two adapters.
JOINED = [
    "jnp.concatenate([w, u])",
    "jnp.concatenate([o, w, u])",
    "jnp.concatenate([w, t])",
    "jnp.concatenate([w, t], 1)",
    "jnp.concatenate([w, t[:, :1]], 1)",
    "jnp.concatenate([n, u])",
    "jnp.concatenate([n, t])",
    "jnp.concatenate([t, n, w])",
    "jnp.concatenate([x.astype(jnp.float32) for x in (w, u)]).astype(jnp.float64)",
    "jnp.concatenate([w, jnp.concatenate([v, t])])",
    "jnp.concatenate([jnp.concatenate([w, t]), u])",
    "jnp.stack([w, t])[i]",
    "jnp.stack([t, n])[i]",
    "jnp.concatenate([s, m])[ids[0]]",
    "jnp.append(w, w[:1], 0)",
    "jnp.append(w, w[:, :1], 1)",
    "jnp.append(w, w[:0], 0)",
    "jnp.roll(w, 1, 0)",
    "jnp.roll(w, -1, 1)",
    "jnp.roll(n, 1, 0)",
    *(
        f"jnp.pad(w, ((1, 2), (1, 0)), {mode!r})"
        for mode in ("edge", "reflect", "symmetric", "wrap")
    ),
    "jnp.pad(w, ((1, 2), (1, 0)), 'empty')[1:-2, 1:]",
]
USES = [
    "{}[ids]",
    "{}[1]",
    "{}[:, 1:3].T",
    "{0} @ e[:{0}.shape[1]]",
    "f[:, :{0}.shape[0]] @ {0}",
    "c * {0} @ {0}.T",
    "lax.stop_gradient({0}) @ e[:{0}.shape[1]]",
    "{0}.sum(0)",
    "jnp.tanh({0})",
]


@pytest.mark.parametrize("join", JOINED)
def test_what_is_joined_keeps_its_derivative(join):
    lines = [f"z = {join}", f"return {', '.join(use.format('z') for use in USES)},"]
    source = programs.program(*lines)
    found = "\n".join(programs.faults(source))
    assert not found, f"{source}\n{found}"


def joined_kernel(kernel, new, x):
    return lax.conv(x, jnp.concatenate([kernel, new]), (1,), "SAME")


@pytest.mark.parametrize("outputs", [1, 6])
def test_joined_kernels(outputs):
    kernel = factored((7, 4, 3), rows=(-3,), columns=(-2, -1))
    new, images = normal(outputs, 4, 3, seed=3), normal(2, 4, 8)
    check(joined_kernel, kernel, new, images, eagerly=False)


# No whole table is formed only for a few of its rows.

TABLE, ROWS = factored((17, 13)), normal(2, 13, seed=5)
IDS = jnp.array([0, 18, 3, 17, 18])


def lookup(table, rows, ids):
    return jnp.concatenate([table, rows])[ids]


def logits(table, rows, x):
    return x @ jnp.concatenate([table, rows]).T


def test_a_lookup_among_new_rows():
    quickly = dict(sides=(19, 13), eagerly=False)
    check(lookup, TABLE, ROWS, IDS, **quickly)
    check(logits, TABLE, ROWS, normal(5, 13, seed=6), **quickly)


def test_a_moved_row():
    rolled = lambda w, x: jnp.roll(w, 1, 0) @ x  # noqa: E731
    check(rolled, TABLE, normal(13), sides=(17, 13), eagerly=False)


def test_no_gradient_for_what_has_none():
    """Fused projections, of which one is adapted and the others are frozen."""
    query, key_value = factored((11, 13)), normal(23, 13)

    def fused(query, key_value, x):
        return jnp.concatenate([query, key_value]) @ x

    def loss(query):
        adapted = lorax.lora(fused, on_materialise="error")
        return scalar(adapted(query, key_value, normal(13)))

    assert_nothing_dense(jax.make_jaxpr(jax.grad(loss))(query), {34, 13})


# In any inner program.

INSIDE = [
    "jax.jit(lambda w, u: jnp.concatenate([w, u]) @ g)(w, {})",
    "jax.checkpoint(lambda w, u: jnp.tanh(jnp.concatenate([w, u]) @ g))(w, {})",
    "jax.vmap(lambda g: jnp.concatenate([w, {}]) @ g)(f[:, :5])",
    "jax.vmap(lambda w: jnp.concatenate([w, {}]) @ g)(s)",
    "jax.vmap(lambda u: jnp.concatenate([w, u[None]]) @ g)({})",
    "lax.scan(lambda h, w: (jnp.tanh(jnp.append(w, {}, 0)[1:6] @ h), h), g, s)[0]",
    "lax.scan(lambda h, u: (jnp.append(w, u[None], 0)[3:] @ h, h), g, {})[0]",
    "lax.cond(i > 0, lambda u: jnp.append(w, u, 0), lambda u: jnp.append(n, u, 0), {})",
]


@pytest.mark.parametrize("inside", INSIDE)
def test_inside_transformations(inside):
    found = {}
    for few_or_many in ("u", "t"):
        source = programs.program(f"return {inside.format(few_or_many)},")
        found[few_or_many] = programs.faults(source)
    assert not any(found.values()), found


@pytest.mark.parametrize("count", [2, 8])
def test_second_derivatives(count):
    args = (TABLE, normal(count, 13, seed=5), normal(5, 13, seed=6))
    params, frozen = trained_part(args)
    direction = jax.tree.map(jnp.cos, params)

    def curvature(fn):
        def loss(params):
            return jnp.tanh(0.1 * fn(*eqx.combine(params, frozen))).sum()

        return jax.jit(
            lambda params: jax.jvp(jax.grad(loss), (params,), (direction,))[1]
        )(params)

    got = curvature(lorax.lora(logits, on_materialise="error"))
    assert_close(got, curvature(lambda *args: logits(*dense(args))), 1e-4)


class Vocabulary(eqx.Module):
    table: jax.Array
    rows: jax.Array

    def __call__(self, ids):
        return jnp.concatenate([self.table, self.rows])[ids]


def test_modules(getkey):
    model = Vocabulary(normal(17, 13), ROWS)
    adapted = lorax.loraify(model, "table", rank=2, key=getkey())
    params, frozen = lorax.partition(adapted, also="rows")

    def loss(fn):
        return lambda params: scalar(fn(eqx.combine(params, frozen)))

    def dense_model(model):
        return Vocabulary(model.table.materialise(), model.rows)

    got = jax.jit(jax.grad(loss(lambda model: model(IDS))))(params)
    want = jax.jit(jax.grad(loss(lambda model: dense_model(model)(IDS))))(params)
    assert_close(got, want, 1e-4)
    assert np.any(got.rows)


# Precision


def test_new_rows_are_exact():
    """For any dtype of the factors, and any values in other rows."""
    table = factored((17, 13))
    narrow = table.replace(w=table.w.astype(jnp.bfloat16))
    rows = normal(2, 13, seed=5).astype(jnp.bfloat16).at[1, 3].set(jnp.inf)
    fn = jax.jit(lorax.lora(lookup, on_materialise="error"))
    got = fn(narrow, rows, IDS)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[3], rows[0])
    np.testing.assert_array_equal(got[4], rows[1])
    np.testing.assert_array_equal(got[0], narrow.materialise()[0])
    # Each row is looked up once or twice.
    total = lambda rows: fn(narrow, rows, IDS)[:, :2].sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(rows)
    assert gradient.dtype == jnp.bfloat16
    expected = np.zeros((2, 13))
    expected[:, :2] = [[1], [2]]
    np.testing.assert_array_equal(gradient, expected)


def test_wide_rows_beside_narrow_factors():
    with jax.enable_x64(True):
        table = factored((17, 13))
        table = table.replace(w=jnp.asarray(table.w, jnp.float64))
        rows, x = (normal(n, 13, dtype="float64") for n in (2, 5))

        def gradient(fn):
            loss = lambda rows: jnp.sin(fn(table, rows, x)).sum()  # noqa: E731
            return jax.jit(jax.grad(loss))(rows)

        got = gradient(lorax.lora(logits))
        want = gradient(lambda table, rows, x: x @ rows.T)
        assert_close(got, want, 1e-12)

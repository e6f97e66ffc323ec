"""Materialisation, and the warnings about it."""

import functools
import inspect
import pickle
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import dense, factored, normal
from helpers import assert_close, trained

import eqx_lorax as lorax


W = factored((11, 13))
x13 = normal(13)


def exponential(w, x):
    return jnp.exp(w) @ x


def line_of(fn, text):
    lines, start = inspect.getsourcelines(fn)
    return start + next(i for i, line in enumerate(lines) if text in line)


def caught(fn, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = fn(*args)
    assert all(w.category is lorax.MaterialiseWarning for w in found)
    return result, found


def test_says_what_and_where():
    result, (warning,) = caught(lorax.lora(exponential), W, x13)
    assert_close(result, exponential(dense(W), x13))
    assert warning.filename == __file__
    assert warning.lineno == line_of(exponential, "jnp.exp(w)")
    message = str(warning.message)
    for part in ("`exp`", "(11, 13)", __file__, "on_materialise='allow'"):
        assert part in message


def test_choices():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = lorax.lora(exponential, on_materialise="allow")(W, x13)
    assert_close(silent, exponential(dense(W), x13))
    with pytest.raises(lorax.MaterialiseWarning, match="`exp`"):
        lorax.lora(exponential, on_materialise="error")(W, x13)


@pytest.mark.own_errors
def test_bad_arguments():
    with pytest.raises(ValueError, match="'allow', 'warn', 'error'"):
        lorax.lora(exponential, on_materialise="never")
    with pytest.raises(ValueError, match="must be a function"):
        lorax.lora(W)


def test_one_warning_a_call_site():
    def twice(w, x):
        for _ in range(3):
            x = jnp.sin(w) @ x[:13]
            x = jnp.concatenate([x, x])
        return jnp.cos(w) @ x[:13]

    for run in (lorax.lora(twice), jax.jit(lorax.lora(twice))):
        _, found = caught(run, W, x13)
        assert sorted(w.lineno for w in found) == sorted(
            [line_of(twice, "jnp.sin"), line_of(twice, "jnp.cos")]
        )


@jax.jit
def jitted_sine(w):
    return jnp.sin(w)


def test_inside_programs():
    """Also if JAX cached the inner program in an earlier call. For library code the
    warning points to the user's call."""

    def fn(w, x):
        a = jitted_sine(w)
        b = jnp.tril(w)
        return (a + b) @ x

    def other(w, x):
        return jnp.tril(w) @ x

    for _ in range(2):
        _, found = caught(lorax.lora(fn), W, x13)
        lines = {w.lineno for w in found}
        assert line_of(jitted_sine, "jnp.sin") in lines
        assert line_of(fn, "jnp.tril") in lines
        assert len(found) == 2
    _, found = caught(lorax.lora(other), W, x13)
    assert [w.lineno for w in found] == [line_of(other, "jnp.tril")]


def test_error_comes_before_anything_runs():
    seen = []

    @jax.jit
    def inner(w, x):
        jax.debug.callback(lambda _: seen.append(None), x)
        return jnp.exp(w) @ x

    def loop(w, x):
        return jax.lax.scan(lambda x, _: (inner(w, x), None), x, length=2)[0]

    square = factored((13, 13))
    for fn in (inner, loop):
        with pytest.raises(lorax.MaterialiseWarning, match="`exp`"):
            lorax.lora(fn, on_materialise="error")(square, x13)
    jax.effects_barrier()
    assert not seen


def test_in_loops():
    stack = factored((3, 13, 13), seed=1)

    def loop(w, x):
        return jax.lax.scan(lambda x, w: (jnp.abs(w) @ x, None), x, w)[0]

    for run in (lorax.lora(loop), jax.jit(lorax.lora(loop))):
        result, found = caught(run, stack, x13)
        assert [w.lineno for w in found] == [line_of(loop, "jnp.abs")]
        assert_close(result, loop(dense(stack), x13))

    def rows(w, x):
        return jax.lax.scan(lambda x, row: (x + row, None), x, w)[0]

    result, (warning,) = caught(lorax.lora(rows), W, x13)
    assert "along its rows" in str(warning.message)
    assert_close(result, rows(dense(W), x13))

    def changed(w, x):
        body = lambda i, carry: (carry[0] + 1.0, carry[0] @ carry[1])  # noqa: E731
        return jax.lax.fori_loop(0, 2, body, (w, x))[1]

    square = factored((13, 13))
    result, found = caught(lorax.lora(changed), square, x13)
    assert len(found) == 1 and "hand it on" in str(found[0].message)
    assert_close(result, changed(dense(square), x13))


def test_in_branches():
    def pick(w, x, i):
        same = jax.lax.cond(i > 0, lambda w: w, lambda w: w * 2, w)
        return same @ x

    for i in (0, 1):
        result, found = caught(lorax.lora(pick), W, x13, jnp.int32(i))
        assert len(found) == 1 and "branches" in str(found[0].message)
        assert_close(result, pick(dense(W), x13, i))


def test_in_solvers():
    """Solvers have their own derivative rules."""

    def solve(w, b):
        return jax.scipy.sparse.linalg.cg(lambda v: w.T @ (w @ v) + v, b)[0]

    result, (warning,) = caught(lorax.lora(solve), W, x13)
    assert "`custom_linear_solve`" in str(warning.message)
    assert_close(result, solve(dense(W), x13), 1e-4)
    silent = lorax.lora(solve, on_materialise="allow")
    got = jax.grad(lambda w: silent(w, x13).sum())(W)
    want = jax.grad(lambda w: solve(dense(w), x13).sum())(W)
    assert_close((got.b, got.a), (want.b, want.a), 1e-3)


@pytest.mark.parametrize(
    "fn, reason",
    [
        (lambda w: w.reshape(-1), "merges column axes and row axes"),
        (lambda w: w + 1, "no factored form"),
        (lambda w: w * w, "both operands are weights"),
        (lambda w: w * jnp.ones((11, 13)), "varies along rows and columns"),
        (lambda w: 1 / w, "divides by a weight"),
        (lambda w: w.astype(jnp.int32), "int32"),
        (lambda w: w, "the function returns it"),
        (lambda w: jnp.linalg.norm(w), "both operands are weights"),
        (lambda w: jnp.where(w > 0, w, 0.0), "no factored form"),
    ],
)
def test_reasons(fn, reason):
    result, found = caught(lorax.lora(fn), W)
    assert any(reason in str(w.message) for w in found)
    expected = fn(dense(W))
    assert_close(result, expected)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)


def test_gradient_where_it_is_materialised():
    def loss(fn):
        return lambda w: fn(w, x13).sum()

    got = jax.grad(loss(lorax.lora(exponential, on_materialise="allow")))(W)
    want = jax.grad(loss(lambda w, x: exponential(dense(w), x)))(W)
    assert_close(got, want)
    assert not np.any(got.w)


# Where weights can be, beside other things.


def test_weights_anywhere():
    params = {
        "layers": [(W, None, "tanh"), (factored((13, 11), seed=1), 3, print)],
        "bias": normal(11),
    }

    def fn(scale, *, params, flag, names=("a", "b")):
        x, activation = x13, None
        for (w, static, activation), name in zip(params["layers"], names):
            assert static in (None, 3) and name in "ab"
            x = w @ x if flag else x
        assert activation is print
        return {"x": x * scale, "names": names, "flag": flag, "none": None}

    out = lorax.lora(fn, on_materialise="error")(2.0, params=params, flag=True)
    expected = fn(2.0, params=dense(params), flag=True)
    assert out["names"] == ("a", "b") and out["flag"] is True and out["none"] is None
    assert_close(out["x"], expected["x"])


def test_without_weights_it_is_the_function():
    assert lorax.lora(lambda x: float(x) + 1)(jnp.ones(())) == 2.0


class Encoder(eqx.Module):
    weight: jax.Array
    scale: float

    def __call__(self, x):
        return jnp.einsum("ij,j->i", self.weight, x) * self.scale

    def decode(self, y):
        return y @ self.weight

    @property
    def transposed(self):
        return self.weight.T


def test_holders_of_weights():
    """Modules, bound methods and partial functions that hold weights."""
    adapted = eqx.tree_at(lambda m: m.weight, Encoder(jnp.zeros((11, 13)), 2.0), W)
    plain = dense(adapted)
    y = normal(11)

    def module_and_input(module, x, *, power):
        return module(x) ** power

    class Plain:
        def __init__(self, w):
            self.w = w

        def method(self, x):
            return self.w @ x

    for fn, expected, x in [
        (adapted, plain, x13),
        (adapted.decode, plain.decode, y),
        (
            functools.partial(module_and_input, adapted, power=2),
            functools.partial(module_and_input, plain, power=2),
            x13,
        ),
        (jax.tree_util.Partial(adapted), plain, x13),
    ]:
        assert_close(lorax.lora(fn, on_materialise="error")(x), expected(x))
    # JAX cannot look inside it, so it computes with the weight itself.
    assert_close(lorax.lora(Plain(W).method)(x13), dense(W) @ x13)


def test_control_flow_on_values_is_explained():
    def fn(w, x):
        return w @ x if x.sum() > 0 else x

    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        lorax.lora(fn)(W, x13)
    assert "jax.lax.cond" in "".join(error.value.__notes__)

    def by_python_value(w, x, n):
        for _ in range(n):
            x = w.T @ (w @ x)
        return x

    assert_close(
        lorax.lora(by_python_value)(W, x13, 2), by_python_value(dense(W), x13, 2)
    )


def test_keeps_name_and_signature():
    adapted = lorax.lora(exponential)
    assert adapted.__name__ == "exponential"
    assert str(inspect.signature(adapted)) == "(w, x)"
    assert lorax.lora(functools.partial(exponential, W)) is not None


# `LoraModule`: any module through `lorax.lora`.


class Unusual(eqx.Module):
    """Uses its arrays in unusual ways, in several methods."""

    kernel: jax.Array
    stacked: jax.Array
    bias: jax.Array

    def __call__(self, x):
        def body(x, w):
            return jnp.tanh(jnp.einsum("ij,j->i", w, x)), None

        return jax.lax.scan(body, self.project(x), self.stacked)[0]

    @jax.named_scope("project")
    def project(self, x):
        return jnp.tensordot(self.kernel, x, 1) + self.bias


def test_module_of_any_kind(getkey):
    model = [Unusual(normal(11, 13), normal(3, 11, 11, seed=2), normal(11, seed=3))]
    adapted = lorax.loraify(model, ["kernel", "stacked"], rank=2, key=getkey())
    assert type(adapted[0]) is lorax.LoraModule
    adapted = trained(adapted)
    merged = lorax.unloraify(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(adapted[0](x13), merged[0](x13))
        assert_close(adapted[0].project(x13), merged[0].project(x13))
        assert_close(pickle.loads(pickle.dumps(adapted))[0](x13), merged[0](x13))
    assert adapted[0].kernel is adapted[0].wrapped.kernel


def test_dropout_is_the_layers_own(getkey):
    """Layers that drop inputs of the low-rank branch do so under `lora(model)` too."""
    model = [eqx.nn.Linear(13, 11, key=getkey())]
    adapted = trained(lorax.loraify(model, rank=2, dropout=0.5, key=getkey()))
    key = getkey()

    def fn(model, x):
        return model[0](x, key=key)

    got = lorax.lora(fn)(adapted, x13)
    assert np.array_equal(got, fn(adapted, x13))
    assert not np.allclose(got, dense(adapted)[0].wrapped(x13))
    evaluated = eqx.nn.inference_mode(adapted)
    assert_close(lorax.lora(fn)(evaluated, x13), fn(evaluated, x13))


def test_norm_wrappers_are_silent(getkey):
    norm = eqx.nn.WeightNorm(eqx.nn.Linear(13, 11, key=getkey()))
    adapted = trained(lorax.loraify([norm], "weight", rank=2, key=getkey()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(adapted[0](x13), lorax.unloraify(adapted)[0](x13))

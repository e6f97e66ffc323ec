"""Helpers for the tests of all rooms: references, comparisons, random numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

import eqx_lorax as lorax
from eqx_lorax._factored import trace_sum


def is_weight(x: Any) -> bool:
    return isinstance(x, lorax.AbstractLoraWeight)


def weights(model: Any) -> list[lorax.LoraWeight]:
    """The adapted weights of a model, in order."""
    return [x for x in jax.tree.leaves(model, is_leaf=is_weight) if is_weight(x)]


def filled(make, dtype, key) -> Any:
    """`make(dtype, key)` with random numbers from NumPy, so that nothing is
    compiled."""
    random = np.random.default_rng(np.asarray(key).ravel().tolist())
    model = eqx.filter_eval_shape(make, dtype, key)
    return jax.tree.map(
        lambda x: _random(random, x) if isinstance(x, jax.ShapeDtypeStruct) else x,
        model,
    )


def trained(model: Any) -> Any:
    """The model with random factors instead of `b = 0`, as after training."""
    random = np.random.default_rng(0)

    def randomise(weight):
        return eqx.tree_at(lambda w: w.b, weight, _random(random, weight.b))

    return jax.tree.map(
        lambda x: randomise(x) if is_weight(x) else x, model, is_leaf=is_weight
    )


def _random(random: np.random.Generator, like: Any) -> jax.Array:
    if not jnp.issubdtype(like.dtype, jnp.inexact):
        return jnp.asarray(random.integers(0, 5, like.shape), like.dtype)
    drawn = 0.5 * random.normal(size=like.shape)
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        drawn = drawn + 0.5j * random.normal(size=like.shape)
    return jnp.asarray(drawn, like.dtype)


def wide(x: Any) -> np.ndarray:
    """`x` as a NumPy array in double precision."""
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def dense_weight(weight: Any) -> np.ndarray:
    """`w + scale * b a` in float64 with NumPy, for matrices, stacks, and kernels with
    one row axis followed by the column axes."""
    if not is_weight(weight):
        return wide(weight)
    a, b = wide(weight.a), wide(weight.b)
    batch = b.ndim - 2
    update = b @ a.reshape(*a.shape[: batch + 1], -1)
    return dense_weight(weight.w) + weight.scale * update.reshape(weight.w.shape)


def dense64(model: Any) -> Any:
    """The plain model that is equivalent to `model`, with NumPy arrays in float64."""
    plain = lorax.unloraify(model, merge=False)
    dense = iter([dense_weight(weight) for weight in weights(model)])
    bases = {id(base_of(weight)) for weight in weights(model)}

    def convert(x):
        if id(x) in bases:
            return next(dense)
        return wide(x) if is_inexact(x) else x

    return jax.tree.map(convert, plain)


def base_of(weight: Any) -> Any:
    """The array below all adapters."""
    while is_weight(weight):
        weight = weight.w
    return weight


@eqx.filter_jit
def run(model: Any, *inputs: Any) -> Any:
    """`model(*inputs)`, compiled as a whole, which is faster than op by op."""
    return model(*inputs)


def call64(fn, *args):
    """`fn(*args)`, compiled, with every inexact array in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(
            lambda x: jnp.asarray(wide(x)) if is_inexact(x) else x, args
        )
        return jax.tree.map(np.asarray, eqx.filter_jit(fn)(*args))


def is_inexact(x: Any) -> bool:
    is_array = isinstance(x, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(x.dtype, jnp.inexact)


def assert_close(x: Any, y: Any, tolerance: float = 1e-5) -> None:
    """Asserts that all leaves are close, relative to the largest entry of each.

    A single number has no larger entry beside it, and may be a sum whose terms cancel.
    It is compared relative to 0.1 at least, since the terms in these tests are about 1.
    """
    xs, ys = jax.tree.leaves(x), jax.tree.leaves(y)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        x, y = wide(x), wide(y)
        assert x.shape == y.shape
        size = max(np.abs(y).max(initial=0.0), 0.1 if y.size == 1 else 1e-3)
        np.testing.assert_allclose(x / size, y / size, atol=tolerance, rtol=0)


def assert_identical(x: Any, y: Any) -> None:
    """Asserts that structure, types, dtypes and bits are the same."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for x, y in zip(jax.tree.leaves(x), jax.tree.leaves(y)):
        assert type(x) is type(y)
        if eqx.is_array(x):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x is y or x == y


def equations(jaxpr: Any):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        avals = [atom.aval for atom in equation.invars]
        inner = trace_sum(equation.primitive, equation.params, avals)
        if inner is not None:
            yield from equations(inner.jaxpr)
        for parameter in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def assert_no_dense(fn, model: Any, *args: Any, of: Any = None) -> None:
    """Asserts that `fn(model, *args)` computes no array with the shape of a base in
    `of`, by default `model`. The bases themselves may occur, unchanged, cast or squared
    as for norms."""
    bases = weights(model if of is None else of)
    shapes = {tuple(weight.w.shape) for weight in bases}
    assert shapes
    jaxpr = eqx.filter_make_jaxpr(fn)(model, *args)[0]
    untouched = (
        "stop_gradient",
        "convert_element_type",
        "copy",
        "rev",
        "square",
        "abs",
    )
    untouched += ("pjit", "jit", "custom_jvp_call")  # Inner jaxprs are checked too.
    computed = [
        equation
        for equation in equations(jaxpr.jaxpr)
        for out in equation.outvars
        if tuple(out.aval.shape) in shapes and equation.primitive.name not in untouched
    ]
    assert not computed, computed


# Of a function of three arrays, that returns a number.
DERIVATIVES = {
    "gradients": lambda f: jax.grad(f, (0, 1, 2)),
    "forward": lambda f: lambda *args: jax.jvp(f, args, args),
    "forward over reverse": lambda f: (
        lambda *args: jax.jvp(jax.grad(f, (0, 1, 2)), args, args)
    ),
    "reverse over reverse": lambda f: jax.grad(
        lambda *args: sum(jnp.sum(y**2) for y in jax.grad(f, (0, 1, 2))(*args)),
        (0, 1, 2),
    ),
}

"""Compares `lorax.lora(fn)` with `fn` on the dense weights, for the tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, equations, is_weight, wide

import eqx_lorax as lorax


@dataclasses.dataclass(frozen=True)
class Case:
    """A function and its arguments, for `check`."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    sides: tuple[int, ...] | None = (11, 13)


def factored(shape, rows=(-2,), columns=(-1,), rank=2, dtype="float32", seed=0):
    random = np.random.default_rng(seed)
    owned = {axis % len(shape) for axis in (*rows, *columns)}
    batch = [size for i, size in enumerate(shape) if i not in owned]
    b_shape = (*batch, *(shape[axis] for axis in rows), rank)
    a_shape = (*batch, rank, *(shape[axis] for axis in columns))
    arrays = [
        jnp.asarray(random.normal(size=s), dtype) for s in (shape, b_shape, a_shape)
    ]
    return lorax.LoraWeight(*arrays, 3.0, rows, columns)


def normal(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense(tree):
    return jax.tree.map(
        lambda x: x.materialise() if is_weight(x) else x, tree, is_leaf=is_weight
    )


def trained_part(args):
    """The factors, and every other inexact array."""
    spec = jax.tree.map(
        lambda x: x.trainable() if is_weight(x) else eqx.is_inexact_array(x),
        args,
        is_leaf=is_weight,
    )
    return eqx.partition(args, spec)


def scalar(outputs):
    """A sum over all outputs with a different coefficient for every entry."""
    total = 0.0
    for x in jax.tree.leaves(outputs):
        if eqx.is_inexact_array(x):
            # Irregular, so that no symmetry hides a wrong axis.
            phases = np.exp(1j * (1.0 + 3.7 * np.arange(x.size))).reshape(x.shape)
            signs = phases if jnp.iscomplexobj(x) else phases.real
            x = jnp.real(x * jnp.asarray(signs, x.dtype))
            total += (x + 0.25 * x * x).sum()
    return total


# Operations whose result may have the rows and the columns of a weight: they only move
# the base.
MOVES = {
    "broadcast_in_dim", "checkpoint", "closed_call", "concatenate", "cond",
    "convert_element_type", "copy", "custom_jvp_call", "dynamic_slice", "gather",
    "jit", "optimization_barrier", "pjit", "pvary", "remat", "remat2", "reshape", "rev",
    "scan", "select_n", "shard_map", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "transpose", "while", "while_loop",
}  # fmt: skip


def assert_nothing_dense(jaxpr, sides):
    """No array has both a row and a column axis, except for the base, moved."""
    for equation in equations(jaxpr.jaxpr):
        for out in equation.outvars:
            shape = set(getattr(out.aval, "shape", ()))
            if equation.primitive.name not in MOVES:
                assert not sides <= shape, equation


def check(fn, *args, sides=None, tolerance=1e-4, eagerly=True, forward=True):
    """Values and derivatives of `lora(fn)` are those on the dense weights in float64,
    its outputs have the types of `fn`'s, and nothing dense is computed."""
    adapted = lorax.lora(fn, on_materialise="error")
    params, frozen = trained_part(args)

    def loss_of(fn):
        def loss(params):
            outputs = fn(*eqx.combine(params, frozen))
            return scalar(outputs), outputs

        return loss

    with jax.enable_x64(True):
        args64 = jax.tree.map(
            lambda x: jnp.asarray(wide(x)) if eqx.is_inexact_array(x) else x, args
        )
        params64, frozen64 = trained_part(args64)

        @jax.jit
        def reference(params):
            outputs = fn(*dense(eqx.combine(params, frozen64)))
            return scalar(outputs), outputs

        expected = jax.value_and_grad(reference, has_aux=True)(params64)
        expected = jax.tree.map(np.asarray, expected)
    (_, outputs64), gradient64 = expected

    stepped = jax.jit(jax.value_and_grad(loss_of(adapted), has_aux=True))
    (_, outputs), gradient = stepped(params)
    assert_close(outputs, outputs64, tolerance)
    assert_close(gradient, gradient64, 5 * tolerance)
    shapes = jax.eval_shape(lambda args: fn(*dense(args)), args)
    assert jax.tree.structure(outputs) == jax.tree.structure(shapes)
    for x, y in zip(jax.tree.leaves(outputs), jax.tree.leaves(shapes)):
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)

    if forward:
        # Forward mode, along a direction that changes every parameter.
        direction = jax.tree.map(lambda x: jnp.cos(x) + 0.3, params)
        pushed = jax.jit(lambda p, d: jax.jvp(loss_of(adapted), (p,), (d,))[1][0])
        tangent = pushed(params, direction)
        along = [
            np.real((wide(g) * wide(d)).sum())
            for g, d in zip(jax.tree.leaves(gradient64), jax.tree.leaves(direction))
        ]
        size = sum(map(abs, along)) + 1e-3
        assert abs(float(tangent) - sum(along)) < 10 * tolerance * size

    if eagerly:
        assert_close(adapted(*args), outputs64, tolerance)
    if sides is not None:
        assert_nothing_dense(jax.make_jaxpr(stepped)(params), set(sides))

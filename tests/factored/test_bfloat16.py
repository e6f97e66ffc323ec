"""Models in bfloat16 throughout, including factors, on the CPU. JAX 0.9 and later fail
there with "Unsupported element type for DotThunk" unless the compiler is prevented from
it."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, call64, dense64, trained, wide

import eqx_lorax as lorax


KEY = jax.random.key(0)
ACTIVATIONS = ("relu", "silu", "gelu")
# Width, depth, rows, and what is adapted.
SHAPES = (
    (32, 2, 9, "layers.1"),
    (16, 3, 1, ["layers.0", "layers.2"]),
    (33, 2, 17, None),
)


def normal(*shape):
    random = np.random.default_rng(shape)
    return jnp.asarray(random.normal(size=shape), jnp.bfloat16)


def outputs(model, x):
    return jax.vmap(model)(x)


def total(model, x):
    return jnp.sin(outputs(model, x).astype(jnp.float32)).sum()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "activation, shape", list(itertools.product(ACTIVATIONS, SHAPES)), ids=str
)
def test_between_activations(activation, shape):
    width, depth, rows, adapted = shape
    function = getattr(jax.nn, activation)
    model = eqx.nn.MLP(16, 12, width, depth, function, dtype=jnp.bfloat16, key=KEY)
    model = lorax.loraify(model, adapted, rank=4, dtype=jnp.bfloat16, key=KEY)
    model, x = trained(model), normal(rows, 16)

    @eqx.filter_jit
    def step(model, x):
        return outputs(model, x), lorax.filter_grad(total)(model, x)

    found, gradient = step(model, x)
    assert found.dtype == jnp.bfloat16
    assert_close(found, call64(outputs, dense64(model), x), 0.03)
    # Compared as a whole: near a kink of relu, single entries may be on either side.
    got, want = (
        np.concatenate([wide(x).ravel() for x in jax.tree.leaves(tree)])
        for tree in (gradient, expected_gradient(model, x))
    )
    assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


@eqx.filter_jit
def expected_gradient(model, x):
    """The gradient of the same model in float32."""
    model, x = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, (model, x)
    )
    return lorax.filter_grad(total)(model, x)


class Layers(eqx.Module):
    """A plain layer in one of the usual orders of operands, followed by an adapted
    one."""

    plain: jax.Array
    adapted: lorax.LoraWeight

    def __call__(self, x, kind):
        plain = self.plain
        if kind == "one by one":
            x = jax.vmap(lambda x: plain @ x)(x)
        elif kind == "in float32":
            x = jax.vmap(lambda x: (plain @ x).astype(jnp.float32))(x)
        elif kind == "together":
            x = x @ plain.T
        elif kind == "from the left":
            x = (plain @ x.T).T
        hidden = jax.nn.relu(x).astype(jnp.bfloat16)
        return hidden, hidden @ self.adapted.T


@pytest.mark.parametrize(
    "kind", ["one by one", "in float32", "together", "from the left"]
)
def test_one_rounding(kind):
    """The error is half a unit in the last place, for base and update together."""
    adapted = lorax.LoraWeight(normal(20, 32), normal(20, 4), normal(4, 32))
    model = Layers(normal(32, 16), adapted)
    hidden, found = eqx.filter_jit(model)(normal(9, 16), kind)
    weight = wide(adapted.w) + adapted.scale * wide(adapted.b) @ wide(adapted.a)
    exact = wide(hidden) @ weight.T
    unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
    # The sum is in float32.
    slack = 1e-5 * np.abs(wide(hidden)) @ np.abs(weight).T
    assert np.all(np.abs(wide(found) - exact) <= 0.5 * unit + slack)


def test_no_wide_copy_of_a_base():
    """Casting the operands would also work, but make such a copy."""
    stack = lorax.LoraWeight(normal(3, 64, 64), normal(3, 64, 4), normal(3, 4, 64))

    def loss(b, x):
        layers = stack.replace(b=b)

        def body(x, layer):
            return jax.nn.relu(layer @ x), None

        return jax.lax.scan(body, x, layers)[0].astype(jnp.float32).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(stack.b, normal(64)))
    assert "f32[3,64,64]" not in jaxpr and "f32[64,64]" not in jaxpr

"""`lorax.lora(fn)`: functions over factored weights, rule by rule."""

import functools
import math

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import Case, check, dense, factored, normal, scalar, trained_part
from helpers import assert_close, equations, wide
from hypothesis import given, settings, strategies as st
from jax.ad_checkpoint import checkpoint_name

import eqx_lorax as lorax


# Unique sizes, so that a dense array can be recognised by its shape.
W = factored((11, 13))
V = factored((13, 17), seed=2)
STACK = factored((3, 13, 11), seed=3)
SQUARE = factored((3, 11, 11), seed=4)
HEADS = factored((11, 2, 13), rows=(0,), columns=(1, 2), seed=5)
OUT = factored((2, 13, 11), rows=(0, 1), columns=(2,), seed=6)
TABLE = factored((11, 13), rank=3, seed=7)
NESTED = lorax.LoraWeight(W, normal(11, 2), normal(2, 13, seed=3))
x11, x13, X = normal(11), normal(13), normal(5, 13)
IDS = jnp.array([[0, 3], [10, -1]])


def einsum(form):
    return functools.partial(jnp.einsum, form)


STRUCTURAL = [
    Case("transpose", lambda w, x: x @ w.T, (W, X)),
    Case("transpose-twice", lambda w, x: w.T.T @ x, (W, x13)),
    Case("swapaxes", lambda w, x: jnp.swapaxes(w, 1, 2)[1] @ x, (STACK, x13)),
    Case("reshape-rows", lambda w, x: w.reshape(11, 26).T @ x, (HEADS, x11)),
    Case(
        "reshape-split",
        lambda w, x: x @ w.reshape(11, 2, 13)[:, 1],
        (factored((11, 26)), x11),
    ),
    Case("reshape-flat-out", lambda w, x: x @ w.reshape(26, 11), (OUT, normal(5, 26))),
    Case(
        "reshape-transposed",
        lambda w, x: w.transpose(1, 2, 0).reshape(26, 11) @ x,
        (HEADS, x11),
    ),
    Case(
        "expand-and-squeeze", lambda w, x: w[:, None, :, None][:, 0, :, 0] @ x, (W, x13)
    ),
    Case(
        "broadcast", lambda w, x: jnp.broadcast_to(w, (4, 11, 13)) @ x, (W, x13), None
    ),
    Case(
        "convert",
        lambda w, x: (w.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(x.dtype),
        (W, x13),
        None,
    ),
    Case("slice-rows", lambda w, x: w[2:9:2] @ x, (W, x13)),
    Case("slice-columns", lambda w, x: w[:, 3:] @ x[3:], (W, x13)),
    Case("split", lambda w, x: [part @ x for part in jnp.split(w, [4, 7])], (W, x13)),
    Case("split-columns", lambda w, x: jnp.split(w, [6], axis=1)[1] @ x[6:], (W, x13)),
    Case("row", lambda w: w[3] * 2.0, (W,)),
    Case("column", lambda w: w[:, -1] + 1.0, (W,)),
    Case("entry", lambda w: w[2, 5], (W,)),
    Case("layer", lambda w, x: w[1] @ x, (STACK, x11)),
    Case("traced-layer", lambda w, x, i: w[i] @ x, (STACK, x11, jnp.int32(-1))),
    Case("traced-row", lambda w, i: w[i] * 2.0, (W, jnp.int32(4))),
    Case(
        "dynamic-slice",
        lambda w, x, i: lax.dynamic_slice_in_dim(w, i, 4, 1) @ x[:4],
        (W, x13, jnp.int32(7)),
    ),
    Case("embedding", lambda w, i: w[i], (TABLE, IDS)),
    Case("take", lambda w, i: jnp.take(w, i, axis=0, mode="clip"), (TABLE, IDS)),
    Case("take-by-default", lambda w, i: jnp.take(w, i, axis=0), (TABLE, IDS)),
    Case(
        "take-columns", lambda w, i: jnp.take(w, i, axis=1, mode="wrap"), (TABLE, IDS)
    ),
    Case(
        "take-filled",
        lambda w: jnp.take(w, jnp.array([1, 99]), axis=0, fill_value=0),
        (TABLE,),
    ),
    Case(
        "take-along",
        lambda w, i: jnp.take_along_axis(w, i, axis=1),
        (TABLE, jnp.arange(11)[:, None]),
        None,
    ),
    Case("entries", lambda w, i, j: w[i, j], (TABLE, IDS, IDS)),
    Case(
        "experts",
        lambda w, i, x: jnp.einsum("bij,j->bi", w[i], x),
        (STACK, jnp.array([2, 0, 0, 1]), x11),
        None,
    ),
    Case(
        "vmapped-lookup",
        lambda w, i: jax.vmap(lambda i: w[i])(i),
        (TABLE, jnp.array([4, 2])),
    ),
    Case("reverse", lambda w, x: w[::-1, ::-1] @ x, (W, x13)),
    Case(
        "reverse-scaled", lambda w, x, g: jnp.flip(w * g[:, None], 0) @ x, (W, x13, x11)
    ),
    Case(
        "join-rows",
        lambda w, v, x: jnp.concatenate([w, v, jnp.ones((2, 13), x.dtype)]) @ x,
        (W, factored((7, 13), rank=3, seed=9), x13),
    ),
    Case(
        "join-columns",
        lambda w, v, x: jnp.concatenate([v, w], 1) @ x,
        (W, factored((11, 7), rank=3, seed=9), normal(20)),
    ),
    Case(
        "join-layers",
        lambda s, w, x: jnp.einsum("lij,j->li", jnp.concatenate([s, w[None]]), x),
        (STACK, factored((13, 11), rank=1), x11),
    ),
    Case(
        "stack",
        lambda w, v, x: jnp.stack([w, v])[1] @ x,
        (W, factored((11, 13), seed=9), x13),
    ),
    Case(
        "unstack",
        lambda s, x: sum(w @ x for w in s) + jnp.unstack(s)[0] @ x,
        (STACK, x11),
    ),
    Case(
        "size-one",
        lambda w, x: w.reshape(()) * x,
        (factored((1, 1), rank=1), x13),
        None,
    ),
    Case("scale", lambda w, x: (2.0 * w) @ x, (W, x13)),
    Case("scale-by-array", lambda w, x, c: (w * c) @ x, (W, x13, jnp.float32(0.7))),
    Case("divide", lambda w, x, c: (w / c) @ x, (W, x13, jnp.float32(0.7))),
    Case("negate", lambda w, x: -w @ x, (W, x13)),
    Case("scale-rows", lambda w, x, g: (w * g[:, None]) @ x, (W, x13, x11)),
    Case("scale-columns", lambda w, x, g: (w * g[None]) @ x, (W, x13, x13)),
    Case(
        "scale-then-move",
        lambda w, x, g: (g[:, None] * w[:, None]).reshape(11, 13)[1:].T @ x[1:],
        (W, x11, normal(11)[:, None]),
        None,
    ),
    Case("scale-lookup", lambda w, g: (w * g[None])[jnp.array([1, 2])], (W, x13)),
    Case(
        "scale-then-take-layer",
        lambda w, x, g: (w * g[:, None, None])[2] @ x,
        (STACK, x11, normal(3)),
    ),
    Case("stop-gradient", lambda w, x: lax.stop_gradient(w) @ x + (w @ x), (W, x13)),
    Case("copy", lambda w, x: jnp.copy(w) @ x, (W, x13)),
    Case("barrier", lambda w, x: lax.optimization_barrier((w, x))[0] @ x, (W, x13)),
    Case("name", lambda w, x: checkpoint_name(w, "w") @ x, (W, x13)),
]

LINEAR = [
    Case("matrix-vector", lambda w, x: w @ x, (W, x13)),
    Case("matrix-batch", lambda w, x: jax.vmap(lambda x: w @ x)(x), (W, X)),
    Case("batch-matrix", lambda w, x: x @ w, (V, X), (13, 17)),
    Case("einsum", einsum("ij,bj->bi"), (W, X)),
    Case("einsum-both", einsum("ij,ij->"), (W, normal(11, 13)), None),
    Case("einsum-batched", einsum("lij,lj->li"), (STACK, normal(3, 11))),
    Case("einsum-sums-layers", einsum("lij,lj->i"), (STACK, normal(3, 11))),
    Case("outer", lambda w, x: jnp.tensordot(x, w, 0), (W, normal(2)), None),
    Case("heads", einsum("ihd,bi->bhd"), (HEADS, normal(5, 11))),
    Case("heads-out", einsum("hdo,bhd->bo"), (OUT, normal(5, 2, 13))),
    Case("heads-one-axis", einsum("hdo,bd->bho"), (OUT, X)),
    Case("both-sides", lambda w, v: w @ v, (W, V), (13, 17)),
    Case(
        "both-sides-vector", lambda w, v, x: (w @ v) @ x, (W, V, normal(17)), (13, 17)
    ),
    Case("gram", lambda w: w @ w.T, (W,), None),
    Case(
        "stacks-on-both-sides",
        einsum("lij,ljk->lik"),
        (STACK, factored((3, 11, 5))),
        None,
    ),
    Case("chain", lambda w, v, x: jnp.tanh(w @ jnp.tanh(v @ x)), (W, V, normal(17))),
    Case(
        "both-sides-scaled",
        lambda w, v, c: (w * c) @ v + w @ (v / c),
        (W, V, jnp.float32(0.7)),
        (13, 17),
    ),
    Case("sum-rows", lambda w: w.sum(0), (W,)),
    Case("einsum-sums-first", einsum("bi,bij->"), (normal(3, 13), STACK)),
    Case("nested", lambda w, x: w @ x + w[0] @ x, (NESTED, x13)),
    Case(
        "nested-reshaped",
        lambda w, x: w.reshape(11, 1, 13)[:, 0, 2:] @ x[2:],
        (NESTED, x13),
    ),
    Case(
        "preferred-type",
        lambda w, x: lax.dot(w, x, preferred_element_type=jnp.float32),
        (W, x13),
    ),
    Case("precision", lambda w, x: jnp.matmul(w, x, precision="highest"), (W, x13)),
]

every = pytest.mark.parametrize(
    "case", [*STRUCTURAL, *LINEAR], ids=lambda case: case.name
)


@every
def test_primitives(case):
    tolerance = 2e-2 if case.name == "convert" else 1e-4
    check(case.fn, *case.args, sides=case.sides, tolerance=tolerance)


KERNELS = {
    # Different factors may have the window: PyTorch's layout, jax-lorax's, and inputs
    # mixed first.
    "outputs-mixed": ((0,), (1, 2, 3)),
    "outputs-mixed-swapped": ((1, 2, 3), (0,)),
    "inputs-mixed": ((1,), (0, 2, 3)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", KERNELS.values(), ids=KERNELS)
def test_convolutions(axes, groups):
    rows, columns = axes
    kernel = factored((4, 3, 3, 2), rows, columns)
    x = normal(2, 3 * groups, 6, 5)

    def strided(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, (2, 1), [(1, 1), (0, 2)], rhs_dilation=(1, 2),
            feature_group_count=groups,
        )  # fmt: skip

    def channels_last(kernel, x):
        return lax.conv_general_dilated(
            x.transpose(2, 3, 0, 1), kernel.transpose(2, 3, 1, 0), (1, 1),
            [(1, 2), (1, 0)], lhs_dilation=(2, 1),
            dimension_numbers=("HWNC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    check(strided, kernel, x)
    check(channels_last, kernel, x, eagerly=False)
    check(lambda k, x, c: strided(k * c, x), kernel, x, normal(4, 1, 1, 1))
    jaxpr = jax.make_jaxpr(lorax.lora(strided))(kernel, x)
    computed = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "add"]
    assert all(tuple(e.outvars[0].aval.shape) != kernel.shape for e in computed)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_the_real_part_of_a_complex_weight():
    """It is materialised: the real part of `b · a` is not a product of the factors'
    real parts."""
    w = jax.tree.map(lambda x: (1 + 2j) * x, factored((5, 3), dtype="complex64"))
    x = 1j * normal(4, 5, dtype="complex64")

    def fn(w, x):
        return x @ lax.convert_element_type(w, jnp.float32).astype(x.dtype)

    expected = np.asarray(x) @ np.asarray(w.materialise()).real
    assert_close(lorax.lora(fn, on_materialise="allow")(w, x), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes(dtype):
    """Narrow products are rounded once, from float32, to the dtype of the plain ones.
    Float32 factors on a narrow base are the default of `loraify`."""
    is_complex = dtype == "complex64"
    weight = factored((11, 13), dtype=dtype)
    if not is_complex:
        single = factored((11, 13), seed=1)
        weight = eqx.tree_at(lambda w: (w.b, w.a), weight, (single.b, single.a))
    x = normal(5, 13, dtype=dtype)

    def fn(w, x):
        return x @ w.T, w[jnp.array([1, 2])], (w / 3)[3:5] @ x[0], -w.T

    def without_view(w, x):
        return fn(w, x)[:3]

    tolerance = {"bfloat16": 1e-2, "float16": 2e-3, "complex64": 1e-5}[dtype]
    outputs = lorax.lora(without_view, on_materialise="error")(weight, x)
    expected = without_view(dense(weight), x)
    assert [y.dtype for y in outputs] == [y.dtype for y in expected]
    assert_close(outputs, expected, tolerance)
    if not is_complex:
        exact = (
            wide(x)
            @ (wide(weight.w) + weight.scale * wide(weight.b) @ wide(weight.a)).T
        )
        rounded = np.abs(wide(outputs[0]) - exact) / np.abs(exact).max()
        assert rounded.max() < {"bfloat16": 2**-8, "float16": 2**-11}[dtype]


@st.composite
def products(draw):
    """A weight and another operand (an array or another weight), with axes to sum over
    and batch axes."""

    def operand(ndim):
        axes = draw(st.permutations(range(ndim)))
        split = draw(st.integers(1, ndim - 1))
        end = draw(st.integers(split + 1, ndim))
        return tuple(axes[:split]), tuple(axes[split:end])

    ndim, other = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    both = other >= 2 and draw(st.booleans())
    pairs = draw(st.integers(0, min(ndim, other)))
    mine = draw(st.permutations(range(ndim)))[:pairs]
    theirs = draw(st.permutations(range(other)))[:pairs]
    batch = draw(st.integers(0, pairs))
    shape = [draw(st.integers(1, 3)) for _ in range(ndim)]
    shape2 = [draw(st.integers(1, 3)) for _ in range(other)]
    for i, j in zip(mine, theirs):
        shape2[j] = shape[i]
    return dict(
        shapes=(tuple(shape), tuple(shape2)),
        axes=(operand(ndim), operand(other) if both else None),
        numbers=((mine[batch:], theirs[batch:]), (mine[:batch], theirs[:batch])),
        swapped=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(TOLERANCES))),
    )


# The tolerance relative to the largest entry of the result; for gradients it is five
# times as large.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3, "complex64": 1e-4}


def check_product(shapes, axes, numbers, swapped, dtype):
    weight = factored(shapes[0], *axes[0], dtype=dtype)
    if axes[1] is None:
        other = normal(*shapes[1], dtype=dtype)
    else:
        other = factored(shapes[1], *axes[1], dtype=dtype)
    if swapped:
        numbers = tuple(pair[::-1] for pair in numbers)

    def product(w, x):
        return lax.dot_general(*((x, w) if swapped else (w, x)), numbers)

    check(
        product, weight, other,
        tolerance=TOLERANCES[dtype], eagerly=False, forward=False,
    )  # fmt: skip


@pytest.mark.heavy
@given(products())
@settings(deadline=None, max_examples=12)
def test_any_dot_general(case):
    check_product(**case)


@pytest.mark.nightly
@given(products())
@settings(deadline=None, max_examples=500)
def test_any_dot_general_at_length(case):
    check_product(**case)


@st.composite
def convolutions(draw):
    """Options of a convolution, with operands in any layout, and a kernel for which one
    of the factors has only the outputs or only the inputs."""
    spatial = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 2))

    def each(strategy):
        return tuple(draw(strategy) for _ in range(spatial))

    specs = [draw(st.permutations(range(spatial + 2))) for _ in range(3)]
    lhs_spec, rhs_spec, out_spec = map(tuple, specs)
    channels = draw(st.integers(1, 3))
    sizes = {
        "kernel": (
            groups * draw(st.integers(1, 3)),
            channels,
            *each(st.integers(1, 3)),
        ),
        "images": (
            draw(st.integers(1, 2)),
            groups * channels,
            *each(st.integers(5, 6)),
        ),
    }

    def laid_out(sizes, spec):
        return tuple(sizes[spec.index(i)] for i in range(len(spec)))

    alone = rhs_spec[draw(st.integers(0, 1))]
    others = tuple(i for i in range(spatial + 2) if i != alone)
    return dict(
        kernel=laid_out(sizes["kernel"], rhs_spec),
        images=laid_out(sizes["images"], lhs_spec),
        axes=draw(st.permutations([(alone,), others])),
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        window_strides=each(st.integers(1, 2)),
        padding=each(st.tuples(st.integers(-1, 2), st.integers(0, 2))),
        lhs_dilation=each(st.integers(1, 2)),
        rhs_dilation=each(st.integers(1, 2)),
        dimension_numbers=lax.ConvDimensionNumbers(lhs_spec, rhs_spec, out_spec),
        feature_group_count=groups,
    )


def check_convolution(kernel, images, axes, dtype, **options):
    check(
        lambda kernel, x: lax.conv_general_dilated(x, kernel, **options),
        factored(kernel, *axes, dtype=dtype), normal(*images, dtype=dtype),
        tolerance=TOLERANCES[dtype], eagerly=False, forward=False,
    )  # fmt: skip


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups, channels", [(1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("padding, window", [((-1, 1), 1), ((-1, 1), 3), ((-2, 1), 2)])
def test_edges_that_are_cut_off(padding, window, groups, channels, dilation):
    """XLA for the CPU is wrong at the gradients of some of these kernels."""
    check_convolution(
        (groups if channels == 1 else 2 * groups, channels, window),
        (2, channels * groups, 6),
        [(0,), (1, 2)],
        "float32",
        window_strides=(1,),
        padding=(padding,),
        lhs_dilation=(dilation,),
        rhs_dilation=(1,),
        dimension_numbers=lax.ConvDimensionNumbers(*[(0, 1, 2)] * 3),
        feature_group_count=groups,
    )


@pytest.mark.heavy
@given(convolutions())
@settings(deadline=None, max_examples=12)
def test_any_convolution(case):
    check_convolution(**case)


@pytest.mark.nightly
@given(convolutions())
@settings(deadline=None, max_examples=300)
def test_any_convolution_at_length(case):
    check_convolution(**case)


@st.composite
def moves(draw):
    """A weight, and a sequence of structural operations on it."""
    ndim = draw(st.integers(2, 4))
    axes = draw(st.permutations(range(ndim)))
    split = draw(st.integers(1, ndim - 1))
    end = draw(st.integers(split + 1, ndim))
    shape = [draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(ndim)]
    shown = list(shape)
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["permute", "reshape", "slice", "expand", "scale", "pick"])
        )
        if kind == "permute":
            order = draw(st.permutations(range(len(shown))))
            steps.append(("permute", tuple(order)))
            shown = [shown[i] for i in order]
        elif kind == "reshape":
            shown = draw(st.permutations(_factors(math.prod(shown), draw)))
            steps.append(("reshape", tuple(shown)))
        elif kind == "slice" and shown:
            bounds = []
            for size in shown:
                low = draw(st.integers(0, size - 1))
                high = draw(st.integers(low + 1, size))
                bounds.append((low, high, draw(st.integers(1, 2))))
            steps.append(("slice", tuple(bounds)))
            shown = [-(-(high - low) // step) for low, high, step in bounds]
        elif kind == "expand" and len(shown) < 5:
            at = draw(st.integers(0, len(shown)))
            steps.append(("expand", at))
            shown.insert(at, 1)
        elif kind == "scale":
            along = draw(st.integers(0, len(shown)))
            steps.append(("scale", along))
        elif kind == "pick" and len(shown) > 1:
            at = draw(st.integers(0, len(shown) - 1))
            picked = draw(
                st.lists(st.integers(0, shown[at] - 1), min_size=1, max_size=3)
            )
            steps.append(("pick", at, tuple(picked)))
            shown[at] = len(picked)
    return tuple(shape), tuple(axes[:split]), tuple(axes[split:end]), steps


def _factors(size, draw):
    """At most four numbers with this product."""
    factors = []
    for prime in (2, 3):
        while size % prime == 0:
            factors.append(prime)
            size //= prime
    while len(factors) > draw(st.integers(1, 4)):
        factors = sorted(factors)
        factors = [factors[0] * factors[1], *factors[2:]]
    return factors or [1]


def check_moves(shape, rows, columns, steps):
    weight = factored(shape, rows, columns, rank=1)

    def fn(w, c):
        for kind, *details in steps:
            if kind == "permute":
                w = lax.transpose(w, *details)
            elif kind == "reshape":
                w = lax.reshape(w, *details)
            elif kind == "slice":
                w = lax.slice(w, *zip(*details[0]))
            elif kind == "expand":
                w = lax.expand_dims(w, details)
            elif kind == "scale":
                (along,) = details
                gain = c
                if along < w.ndim:
                    size = w.shape[along]
                    gain = c * jnp.arange(1.0, size + 1)
                    gain = lax.broadcast_in_dim(
                        gain,
                        [size if i == along else 1 for i in range(w.ndim)],
                        [along],
                    )
                w = w * gain
            else:
                at, picked = details
                w = jnp.take(w, jnp.array(picked), axis=at)
        return w, jnp.tensordot(w, jnp.ones(w.shape[-1:]), 1) if w.ndim else w

    got = lorax.lora(fn, on_materialise="allow")
    c = jnp.float32(0.5)
    assert_close(got(weight, c), fn(dense(weight), c), 1e-4)
    params, frozen = trained_part((weight, c))

    def gradient(fn):
        return jax.grad(lambda p: scalar(fn(*eqx.combine(p, frozen))))(params)

    assert_close(gradient(got), gradient(lambda w, c: fn(dense(w), c)), 1e-3)


@pytest.mark.heavy
@given(moves())
@settings(deadline=None, max_examples=10)
def test_any_structure(case):
    check_moves(*case)


@pytest.mark.nightly
@given(moves())
@settings(deadline=None, max_examples=300)
def test_any_structure_at_length(case):
    check_moves(*case)

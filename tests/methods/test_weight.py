"""`LoraWeight` as an array: `@`, `.T`, indexing, casts, batch axes, row and column
axes."""

import functools
import itertools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_no_dense, dense_weight, equations, run, wide
from hypothesis import given, settings, strategies as st

import eqx_lorax as lorax
from eqx_lorax._factored.primitives import product_with_factor
from eqx_lorax._methods import FactoredWeight


def make(key, shape=(5, 7), rank=2, dtype=jnp.float32, rows=(-2,), columns=(-1,)):
    rows = [axis % len(shape) for axis in rows]
    columns = [axis % len(shape) for axis in columns]
    batch = [n for i, n in enumerate(shape) if i not in (*rows, *columns)]
    keys = jr.split(key, 3)
    return lorax.LoraWeight(
        jr.normal(keys[0], shape, dtype),
        jr.normal(keys[1], (*batch, *(shape[i] for i in rows), rank)),
        jr.normal(keys[2], (*batch, rank, *(shape[i] for i in columns))),
        alpha=3.0,
        rows=rows,
        columns=columns,
    )


def test_reads_like_an_array(getkey):
    weight = make(getkey(), (3, 5, 7))
    assert weight.shape == (3, 5, 7)
    assert weight.ndim == 3
    assert weight.size == 105
    assert weight.dtype == jnp.float32
    assert len(weight) == 3
    assert weight.rank == 2
    assert weight.scale == 1.5
    assert_close(weight.materialise(), dense_weight(weight))


def test_scale():
    arrays = jnp.zeros((9, 8)), jnp.zeros((9, 4)), jnp.zeros((4, 8))
    assert lorax.LoraWeight(*arrays).scale == 1 / 4
    assert lorax.LoraWeight(*arrays, alpha=8).scale == 2
    assert lorax.LoraWeight(*arrays, alpha=8, rank_stabilised=True).scale == 4


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize(
    "shape, x_shape",
    [
        ((5, 7), (7,)),
        ((5, 7), (7, 4)),
        ((5, 7), (2, 3, 7, 4)),
        ((2, 5, 7), (7,)),
        ((2, 5, 7), (7, 4)),
        ((2, 5, 7), (2, 7, 4)),
        ((2, 5, 7), (3, 1, 7, 4)),
        ((1, 5, 7), (3, 7, 4)),
        ((3, 1, 5, 7), (2, 7, 4)),
    ],
)
def test_matmul(shape, x_shape, transposed, getkey):
    weight, x = make(getkey(), shape), jr.normal(getkey(), x_shape)
    dense = dense_weight(weight)
    if transposed:
        weight, dense = weight.mT, np.swapaxes(dense, -1, -2)
    left = (lambda w, x: w @ x) if not transposed else None
    if left is None:
        x = x if x.ndim == 1 else jnp.swapaxes(x, -1, -2)
        assert_close(x @ weight, wide(x) @ dense)
        assert_close(np.asarray(x) @ weight, wide(x) @ dense)
        assert_no_dense(lambda w, x: x @ w, weight, x)
    else:
        assert_close(left(weight, x), dense @ wide(x))
        assert_close(weight @ np.asarray(x), dense @ wide(x))
        assert_no_dense(left, weight, x)


def test_every_way_a_layer_may_be_written(getkey):
    weight, x = make(getkey()), jr.normal(getkey(), (7,))
    xs = jr.normal(getkey(), (4, 7))
    dense = dense_weight(weight)
    assert_close(weight @ x, dense @ wide(x))
    assert_close(x @ weight.T, dense @ wide(x))
    assert_close(xs @ weight.T, wide(xs) @ dense.T)
    assert_close((weight @ xs.T).T, wide(xs) @ dense.T)
    assert_close(jax.vmap(lambda x: weight @ x)(xs), wide(xs) @ dense.T)
    assert_close(weight.T.T @ x, dense @ wide(x))
    assert_close(weight.T.materialise(), dense.T)


def test_the_product_is_x_first(getkey):
    """Under `vmap` over a batch, each product is one of the batch with a matrix. Under
    `scan`, no transposed copy of the base is made."""
    weight, xs = make(getkey()), jr.normal(getkey(), (4, 7))
    jaxpr = jax.make_jaxpr(jax.vmap(lambda x: x @ weight.T))(xs)
    primitives = [equation.primitive.name for equation in equations(jaxpr.jaxpr)]
    assert "transpose" not in primitives
    assert primitives.count("dot_general") == 3


def test_transposes_are_views(getkey):
    weight = make(getkey(), (2, 5, 7))
    for view in (weight.T, weight.mT, weight.T.T):
        assert view.w is weight.w
    assert weight.T.shape == (7, 5, 2)
    assert weight.mT.shape == (2, 7, 5)
    sliced = jax.tree.map(lambda x: x[1], weight.mT)
    assert_close(sliced.materialise(), dense_weight(weight)[1].T)


def test_astype(getkey):
    weight = make(getkey())
    narrow = weight.astype(jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert narrow.b.dtype == jnp.float32
    assert (narrow @ jnp.ones(7, jnp.bfloat16)).dtype == jnp.bfloat16
    assert_close(narrow.astype(jnp.float32).materialise(), weight.materialise(), 1e-2)


@pytest.mark.parametrize(
    "index",
    [
        1,
        -2,
        slice(1, 4),
        slice(None, None, 2),
        (slice(None), slice(2, 5)),
        (..., slice(2, 5)),
        (slice(1, 3), 2),
        (..., 2),
        np.int32(3),
        np.array([3, 0, 3]),
        jnp.array([[1, 2], [3, 4]]),
        (jnp.array([1, 2]), slice(0, 3)),
        (slice(None), jnp.array([1, 2])),
        ...,
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", (False, True))
def test_indexing(index, transposed, getkey):
    weight = make(getkey(), (5, 6))
    dense = dense_weight(weight)
    if transposed:
        weight, dense = weight.T, dense.T
    found = weight[index]
    if isinstance(found, lorax.AbstractLoraWeight):
        found = found.materialise()
    assert_close(found, dense[index])


@pytest.mark.parametrize(
    "index",
    [
        1,
        (1, 2),
        (1, np.array([2, 0])),
        (0, slice(1, 3)),
        (0, slice(1, 3), slice(2, 5)),
        slice(1, 3),
        np.array([2, 0]),
        jnp.array([[1, 2], [2, 1]]),
        jnp.int32(2),
        (0, jnp.int32(2)),
        (0, ..., 3),
    ],
    ids=str,
)
def test_indexing_a_stack(index, getkey):
    weight = make(getkey(), (3, 5, 6))
    dense = dense_weight(weight)
    found = weight[index]
    if isinstance(found, lorax.AbstractLoraWeight):
        assert found.w.shape == dense[index].shape
        found = found.materialise()
    assert_close(found, dense[index])
    picked = weight.mT[1]
    assert_close(picked.materialise(), dense[1].T)


def test_indexing_is_traceable_and_factored(getkey):
    weight = make(getkey(), (11, 7))
    ids = jnp.array([3, 1, 3])
    assert_close(run(lambda w, i: w[i], weight, ids), dense_weight(weight)[ids])
    assert_close(
        jax.vmap(lambda i: weight[i])(ids), dense_weight(weight)[np.asarray(ids)]
    )
    assert_no_dense(lambda w, i: w[i], weight, ids)


def test_iterates_over_rows(getkey):
    weight = make(getkey(), (3, 5, 7))
    assert len(list(weight)) == 3
    assert len(list(weight[0])) == 5


@pytest.mark.parametrize("index", [None, jnp.array([True] * 5), "a", 1.5, (0, None)])
def test_indexing_says_what_it_cannot(index, getkey):
    with pytest.raises(TypeError, match="materialise"):
        make(getkey())[index]


def test_indexing_out_of_range(getkey):
    weight = make(getkey())
    for index in (5, -6, (0, 0, 0)):
        with pytest.raises(IndexError):
            weight[index]


def test_never_turns_into_an_array_unseen(getkey):
    weight, x = make(getkey()), jnp.ones(7)
    silently = [
        lambda: jnp.asarray(weight),
        lambda: np.asarray(weight),
        lambda: jnp.matmul(weight, x),
        lambda: jnp.dot(weight, x),
        lambda: weight * 2,
        lambda: jnp.ones((5, 7)) * weight,
        lambda: jnp.einsum("ij,j", weight, x),
        lambda: jnp.sum(weight),
    ]
    for form in silently:
        # Some versions of JAX warn about the fields of the weight.
        with pytest.raises((TypeError, ValueError)):
            form()


def test_shapes_that_do_not_fit():
    w, b, a = jnp.zeros((5, 7)), jnp.zeros((5, 2)), jnp.zeros((2, 7))
    for wrong in ((w, b.T, a), (w, b, a.T), (w, b, jnp.zeros((3, 7))), (w.T, b, a)):
        with pytest.raises(ValueError, match="do not fit"):
            lorax.LoraWeight(*wrong)
    with pytest.raises(ValueError, match="do not fit"):
        lorax.LoraWeight(jnp.zeros((3, 5, 7)), b, a)
    with pytest.raises(ValueError, match="do not fit"):
        lorax.LoraWeight(w, jnp.zeros((5, 0)), jnp.zeros((0, 7)))
    with pytest.raises(ValueError, match="different axes"):
        lorax.LoraWeight(w, b, a, rows=(0,), columns=(0,))
    with pytest.raises(ValueError, match="has not"):
        lorax.LoraWeight(w, b, a, rows=(2,))
    for x in (jnp.zeros(5), jnp.zeros((5, 7)), jnp.zeros(())):
        with pytest.raises(ValueError, match=r"Cannot multiply shapes \(5, 7\) @"):
            lorax.LoraWeight(w, b, a) @ x


@st.composite
def contractions(draw):
    """A weight with rows, columns and batch axes in any order, and an `x` that shares
    any of them."""
    ndim = draw(st.integers(2, 4))
    axes = draw(st.permutations(range(ndim)))
    split = draw(st.integers(1, ndim - 1))
    end = draw(st.integers(split + 1, ndim))
    rows, columns = axes[:split], axes[split:end]
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    shared = [axis for axis in range(ndim) if draw(st.booleans())]
    kept = [axis for axis in shared if draw(st.booleans())]
    free = [f"free {i}" for i in range(draw(st.integers(0, 2)))]
    x_labels = draw(st.permutations([*shared, *free]))
    out = [axis for axis in range(ndim) if axis not in shared or axis in kept]
    out_labels = draw(st.permutations([*out, *free]))
    sizes = {axis: shape[axis] for axis in range(ndim)} | {x: 3 for x in free}
    order = draw(st.permutations(range(ndim)))
    rank = draw(st.integers(1, 3))
    return shape, rows, columns, rank, order, x_labels, out_labels, sizes


@pytest.mark.heavy
@given(contractions(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_any_contraction(contraction, seed):
    _check_contraction(contraction, seed)


@pytest.mark.nightly
@given(contractions(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=1000)
def test_any_contraction_at_length(contraction, seed):
    _check_contraction(contraction, seed)


def _check_contraction(contraction, seed):
    shape, rows, columns, rank, order, x_labels, out_labels, sizes = contraction
    key, x_key = jr.split(jr.key(seed))
    weight = make(key, shape, rank, rows=rows, columns=columns)
    x = jr.normal(x_key, [sizes[label] for label in x_labels])
    letters = dict(zip(sizes, "abcdefghij"))

    def spell(labels):
        return "".join(letters[label] for label in labels)

    batch = [i for i in range(len(shape)) if i not in (*rows, *columns)]
    b, a = spell([*batch, *rows]) + "z", spell(batch) + "z" + spell(columns)
    everything = spell(range(len(shape)))
    update = np.einsum(f"{b},{a}->{everything}", wide(weight.b), wide(weight.a))
    dense = wide(weight.w) + weight.scale * update
    assert_close(weight.materialise(), dense)
    expected = np.einsum(
        f"{spell(x_labels)},{everything}->{spell(out_labels)}", wide(x), dense
    )
    assert_close(
        weight.contract(x, x_labels, range(len(shape)), out_labels), expected, 1e-4
    )
    # It is the same weight with the axes in another order.
    view = FactoredWeight(weight.factored().transpose(order))
    assert view.shape == tuple(shape[i] for i in order)
    assert_close(view.contract(x, x_labels, order, out_labels), expected, 1e-4)
    assert_close(view.materialise(), dense.transpose(order))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_scan_over_a_stack(layers, rank, seed):
    key, x_key = jr.split(jr.key(seed))
    weight = make(key, (layers, 4, 4), rank)
    x = jr.normal(x_key, (4,))
    out, _ = jax.lax.scan(lambda x, w: (w @ x, None), x, weight)
    expected = wide(x)
    for dense in dense_weight(weight):
        expected = dense @ expected
    assert_close(out, expected)


def test_frozen_base_gets_no_gradient(getkey):
    weight, x = make(getkey()), jnp.ones(7)
    gradient = jax.grad(lambda w: (w @ x).sum() + w.materialise().sum())(weight)
    assert not gradient.w.any()
    assert gradient.a.any() and gradient.b.any()
    tangent = jax.jvp(
        lambda w: w @ x,
        (weight,),
        (eqx.tree_at(lambda w: (w.a, w.b), weight, replace_fn=jnp.zeros_like),),
    )[1]
    assert not tangent.any()


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("size", (1e-4, 1e-3, 1e-2))
def test_small_adapters_survive_narrow_dtypes(dtype, size, getkey):
    """A plain bfloat16 sum loses about half of an adapter of relative size 1e-3. The
    remaining share is measured along the adapter's own effect."""
    n, rank, count = 256, 8, 1024
    w = (jr.normal(getkey(), (n, n)) / math.sqrt(n)).astype(dtype)
    a = jr.normal(getkey(), (rank, n)) / math.sqrt(n)
    b = jr.normal(getkey(), (n, rank))
    b = b * size * jnp.linalg.norm(w.astype(jnp.float32)) / jnp.linalg.norm(b @ a)
    weight = lorax.LoraWeight(w, b, a, alpha=rank)
    xs = jr.normal(getkey(), (count, n)).astype(dtype)
    out = jax.vmap(lambda x: weight @ x)(xs)
    assert out.dtype == dtype
    exact_base = wide(xs) @ wide(w).T
    effect = wide(xs) @ (weight.scale * wide(b) @ wide(a)).T
    share = ((wide(out) - exact_base) * effect).sum() / (effect**2).sum()
    # At 1e-4 the rounding of the output itself causes noise of this size.
    assert abs(share - 1) < (0.2 if size < 1e-3 else 0.03)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_narrow_tangents_stay_narrow(dtype, getkey):
    """The gradient of the product with the base is a product of narrow arrays."""
    weight = make(getkey(), (5, 7), dtype=dtype)
    loss = lambda x: (weight @ x).astype(jnp.float32).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones(7, dtype))
    base_products = [
        equation
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
        and any(v.aval.shape == (5, 7) for v in equation.invars)
    ]
    assert base_products
    for equation in base_products:
        assert all(v.aval.dtype == dtype for v in equation.invars)


def test_higher_derivatives(getkey):
    for dtype in (jnp.float32, jnp.bfloat16):
        weight = make(getkey(), (3, 3), dtype=dtype)
        x = jnp.ones(3, dtype)
        loss = lambda x: jnp.sin(weight @ x).astype(jnp.float32).sum()  # noqa: E731
        dense = weight.materialise()
        other = lambda x: jnp.sin(dense @ x).astype(jnp.float32).sum()  # noqa: E731
        tolerance = 1e-4 if dtype == jnp.float32 else 0.1
        assert_close(jax.hessian(loss)(x), jax.hessian(other)(x), tolerance)
        assert_close(jax.jacfwd(loss)(x), jax.jacrev(loss)(x), tolerance)


def test_numpy_bases(getkey):
    weight = make(getkey())
    numpy = eqx.tree_at(lambda w: w.w, weight, np.asarray(weight.w))
    x = jnp.ones(7)
    assert_close(numpy @ x, weight @ x)
    assert_close(numpy[2], weight[2])
    assert_close(numpy.materialise(), weight.materialise())
    assert_close(jax.jit(lambda w, x: w @ x)(numpy, x), weight @ x)


def test_all_orders_of_a_kernel_with_two_column_axes(getkey):
    """A Flax attention kernel `(in, heads, dim)`: `in` is the rows, the rest the
    columns."""
    for rows, columns in itertools.permutations([(0,), (1, 2)], 2):
        weight = make(getkey(), (4, 2, 3), rows=rows, columns=columns)
        x = jr.normal(getkey(), (5, 4))
        out = weight.contract(x, ("n", 0), (0, 1, 2), ("n", 1, 2))
        dense = wide(weight.materialise())
        assert_close(out, np.einsum("ni,ihd->nhd", wide(x), dense))
        x = jr.normal(getkey(), (5, 2, 3))
        out = weight.contract(x, ("n", 1, 2), (0, 1, 2), ("n", 0))
        assert_close(out, np.einsum("nhd,ihd->ni", wide(x), dense))


def compiled_gradient(call, x):
    """The compiled program for the gradient of a weight's factors."""
    w, b, a = jnp.ones((64, 32)), jnp.ones((64, 4)), jnp.ones((4, 32))

    def loss(factors, x):
        return (call(lorax.LoraWeight(w, *factors), x) ** 2).sum()

    return str(jax.jit(jax.grad(loss)).lower((b, a), x).compile().as_text())


def per_token(weight, x):
    return jax.vmap(lambda x: weight @ x)(x)


@pytest.mark.cpu
def test_the_gradient_of_b_is_computed_with_its_rank_first():
    """With the other order of operands XLA on the CPU needs seven times as long, and it
    changes the order unless prevented."""
    text = compiled_gradient(per_token, jnp.ones((128, 32)))
    # The rank is the major axis in memory, by shape or by layout.
    assert re.search(r"= f32\[(4,64\]\{1,0|64,4\]\{0,1)\} dot\(", text)
    assert not re.search(r"= f32\[(64,4\]\{1,0|4,64\]\{0,1)\} dot\(", text)


def test_a_gradient_below_two_vmaps_transposes_no_activations():
    """Sequences and tokens are merged into one axis."""

    def per_sequence(weight, x):
        return jax.vmap(functools.partial(per_token, weight))(x)

    text = compiled_gradient(per_sequence, jnp.ones((8, 16, 32)))
    assert "[128,64]" in text or "[8,16,64]" in text
    assert "[64,128]" not in text and "[64,8,16]" not in text
    assert "[32,128]" not in text and "[32,8,16]" not in text


@pytest.mark.parametrize("rows", [3, 6])
def test_product_with_factor(rows):
    """It is `dot_general` for every transformation."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 4, 5)), jnp.float32)
    factor = jnp.asarray(random.normal(size=(rows, 5)), jnp.float32)
    factors = jnp.stack([factor, 2 * factor])

    def plain(x, factor):
        return jnp.tensordot(x, factor, [[-1], [1]])

    def twice(product, x, factor):
        return (jnp.sin(product(x, factor)) ** 2).sum()

    def gradient(product):
        return jax.grad(functools.partial(twice, product), (0, 1))

    for transformed in (
        lambda f: f,
        jax.jit,
        gradient,
        lambda f: jax.vmap(gradient(f), (0, None)),
        lambda f: jax.vmap(f, (1, None), 1),
        lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, None)),
        lambda f: jax.jacfwd(gradient(f), 1),
    ):
        got = transformed(product_with_factor)(x, factor)
        assert_close(got, transformed(plain)(x, factor))
    assert_close(jax.vmap(product_with_factor)(x, factors), jax.vmap(plain)(x, factors))
    assert_close(
        jax.vmap(product_with_factor, (None, 0))(x, factors),
        jax.vmap(plain, (None, 0))(x, factors),
    )


def test_no_tokens(getkey):
    """An empty batch has a gradient of zeros."""
    weight = make(getkey())

    def loss(weight):
        return (jnp.ones((0, 7)) @ weight.T).sum()

    gradient = jax.grad(loss)(weight)
    assert gradient.b.shape == weight.b.shape and not gradient.b.any()
    assert gradient.a.shape == weight.a.shape and not gradient.a.any()

"""`QuantisedArray` as an array: what it does is done by the dense one, bit for bit."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stored import make_file, make_tensor

import eqx_lorax as lorax


def quantise(**options):
    return lorax.quantise({"w": jr.normal(jr.key(0), (6, 64))}, block=16, **options)[
        "w"
    ]


def read_file(*args):
    return lorax.quantised.from_bitsandbytes(make_file(*args)[0], "a")


def read_tensor(kind, blocks):
    return lorax.quantised.from_gguf(make_tensor(kind, 6, blocks)[0])


# Whatever parts there are: one plane and two, offsets, scales that are nested in blocks
# of a row and in blocks over the ends of rows.
ARRAYS = {
    "nf4": quantise(format="nf4"),
    "nested offsets": quantise(format="int4", nested=True),
    "bitsandbytes": read_file("nf4", True, (6, 128)),
    "q5_1": read_tensor("Q5_1", 2),
    "q4_k": read_tensor("Q4_K", 1),
}
OVER_ENDS = read_file("nf4", False, (6, 32))

IDS = np.array([[0, 5], [-1, 2]])
OUTSIDE = np.array([4, 6, -7, 100])


def dense(x):
    return x.dequantise() if isinstance(x, lorax.QuantisedArray) else x


def at(**options):
    return lambda w: w.at[OUTSIDE].get(**options)


PICKED = {
    "rows": lambda w: w[IDS],
    "a row": lambda w: w[-2],
    "a slice": lambda w: w[1:5:2],
    "backwards": lambda w: w[::-1],
    "outside": lambda w: w[OUTSIDE],
}
TAKEN = {
    "clip": at(mode="clip"),
    "fill": at(mode="fill"),
    "fill with zeros": at(mode="fill", fill_value=0),
    "wrap": lambda w: jnp.take(w, OUTSIDE, axis=0, mode="wrap"),
}
STACKED = {
    "layers": lambda w: w[np.array([1, 0])],
    "rows of a layer": lambda w: w[1, IDS],
    "rows of each": lambda w: jax.vmap(lambda each: dense(each[IDS]))(w),
    "vmap": jax.vmap(dense),
    "scan": lambda w: jax.lax.scan(lambda _, each: (None, dense(each)), None, w)[1],
}


def assert_same(x, y):
    x, y = dense(x), dense(y)
    for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def run(fns, w):
    """Compiled as a whole, where sums and products are fused in other ways."""
    return jax.jit(lambda w: {name: dense(fn(w)) for name, fn in fns.items()})(w)


@pytest.mark.parametrize("name", ARRAYS)
def test_lookups(name):
    array = ARRAYS[name]
    w = array.dequantise()
    assert_same(run(PICKED, array), run(PICKED, w))
    taken = lorax.lora(lambda w: run(TAKEN, w), on_materialise="error")
    assert_same(taken(array), run(TAKEN, w))
    stack = jax.tree.map(lambda *x: jnp.stack(x), array, array)
    assert_same(run(STACKED, stack), run(STACKED, jnp.stack([w, w])))


@pytest.mark.parametrize("name", ARRAYS)
def test_views(name):
    array = ARRAYS[name]
    w = array.dequantise()
    assert_same(array.T, w.T)
    assert (array.T.shape, array.T.nbytes) == (w.T.shape, array.nbytes)
    assert jax.tree.structure(array.T.mT) == jax.tree.structure(array)
    narrow = array.astype(jnp.bfloat16)
    assert narrow.nbytes == array.nbytes
    assert_same(narrow, w.astype(jnp.bfloat16))
    stack = jax.tree.map(lambda x: x[None], array)
    assert_same(stack.transpose((1, 0, 2)), w[None].transpose((1, 0, 2)))


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_of_all_parts(name):
    array = ARRAYS[name]
    for rows in (np.array([3, 1]), np.arange(6)[::-1]):
        picked = jax.tree.map(lambda x, rows=rows: x[rows], array)
        if name in ("nested offsets", "bitsandbytes"):
            # Their scales are in blocks over the ends of rows.
            with pytest.raises(ValueError, match="do not belong together"):
                picked.dequantise()
        else:
            assert_same(picked, array.dequantise()[rows])


def test_blocks_over_the_ends_of_rows():
    w = OVER_ENDS.dequantise()
    stack = jax.tree.map(lambda *x: jnp.stack(x), OVER_ENDS, OVER_ENDS)
    assert_same(stack[1], w)
    assert_same(OVER_ENDS.T, w.T)
    for pick in PICKED.values():
        with pytest.raises(TypeError, match="Axis 0 of .6, 32. cannot .*dequantise"):
            pick(OVER_ENDS)
    found = lorax.lora(lambda w: run(PICKED, w), on_materialise="allow")(OVER_ENDS)
    assert_same(found, run(PICKED, w))
    picked = jax.tree.map(lambda x: x[np.array([2, 0])], OVER_ENDS)
    with pytest.raises(ValueError, match="do not belong together"):
        picked.dequantise()


def test_what_it_does_not_do():
    array = ARRAYS["nf4"]
    with pytest.raises(TypeError, match="does not turn into an array.*dequantise"):
        np.asarray(array)
    with pytest.raises(TypeError, match="to floats, not to int32"):
        array.astype(jnp.int32)
    with pytest.raises(TypeError, match="Axis 1 .*cannot be indexed"):
        array[:, IDS]

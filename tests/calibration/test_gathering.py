"""What is gathered of a model, against float64 NumPy."""

import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, wide
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax


KEY = jr.key(0)


class Twice(eqx.Module):
    """A layer that is used twice, after another one."""

    first: eqx.nn.Linear
    shared: eqx.nn.Linear

    def __init__(self):
        keys = jr.split(KEY, 2)
        self.first = eqx.nn.Linear(5, 6, key=keys[0])
        self.shared = eqx.nn.Linear(6, 6, key=keys[1])

    def __call__(self, x):
        return self.shared(jnp.tanh(self.shared(jnp.tanh(self.first(x)))))


def linear64(linear, x):
    return x @ wide(linear.weight).T + wide(linear.bias)


def random(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).normal(size=shape)


BATCHES = [np.float32(random(n, 5)) for n in (4, 4, 3)]


def loss(model, xs):
    return jnp.mean(jax.vmap(model)(xs) ** 2)


def inputs64(model, xs):
    """The inputs of both layers."""
    first = np.tanh(linear64(model.first, wide(xs)))
    second = np.tanh(linear64(model.shared, first))
    return wide(xs), np.concatenate([first, second])


def gradients64(model, xs):
    """The gradients of the loss in both weights."""
    x = wide(xs)
    first = np.tanh(linear64(model.first, x))
    second = np.tanh(linear64(model.shared, first))
    out = linear64(model.shared, second)
    slope = 2 * out / out.size
    back = slope @ wide(model.shared.weight) * (1 - second**2)
    in_shared = slope.T @ second + back.T @ first
    back = back @ wide(model.shared.weight) * (1 - first**2)
    return back.T @ x, in_shared


def check_all(calibration, model):
    each = [np.concatenate(x) for x in zip(*(inputs64(model, x) for x in BATCHES))]
    gradients = zip(*(gradients64(model, xs) for xs in BATCHES))
    for name, x, gradient in zip(["first", "shared"], each, gradients):
        record = calibration.inputs[f"{name}.weight"]
        assert record.count == len(x)
        assert_close(record.energy, np.sum(x**2))
        assert_close(record.total, x.sum(0), 1e-5)
        assert_close(record.product, x.T @ x)
        assert_close(calibration.covariance(f"{name}.weight"), x.T @ x / len(x))
        u, s, v = map(wide, calibration.gradient(f"{name}.weight"))
        assert_close((u * s) @ v, np.mean(gradient, 0), 1e-4)


@pytest.mark.parametrize("form", ["jit and checkpoint", "a pair"])
def test_inputs_and_gradients(form):
    fn = {
        "jit and checkpoint": eqx.filter_jit(eqx.filter_checkpoint(loss)),
        "a pair": lambda model, xs: (loss(model, xs), "something else"),
    }[form]
    model = Twice()
    calibration = lorax.calibrate(fn, model, BATCHES, key=KEY)
    check_all(calibration, model)
    assert list(calibration.inputs) == list(calibration.gradients)


def test_a_forward_pass_will_do():
    def forward(model, xs):
        return {"y": jax.vmap(model)(xs), "n": 3}

    model = Twice()
    calibration = lorax.calibrate(forward, model, iter(BATCHES), gather="inputs")
    x = np.concatenate([inputs64(model, xs)[1] for xs in BATCHES])
    assert_close(calibration.inputs["shared.weight"].product, x.T @ x)
    assert not calibration.gradients


def stacked(count):
    return eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(
        jr.split(KEY, count)
    )


def test_a_stack_has_statistics_for_each_layer():
    layers = stacked(3)

    def run(layers, xs):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def body(x, layer):
            return jnp.tanh(eqx.combine(layer, static)(x)), None

        out = jax.vmap(lambda x: jax.lax.scan(jax.checkpoint(body), x, arrays)[0])(xs)
        return jnp.sum(out**3)

    xs = np.float32(random(5, 4))
    calibration = lorax.calibrate(run, layers, [xs, 2 * xs], key=KEY)
    expected = np.zeros((3, 4, 4))
    slopes = np.zeros((3, 4, 4))
    for x in (wide(xs), 2 * wide(xs)):
        acts = [x]
        for i in range(3):
            y = acts[-1] @ wide(layers.weight)[i].T + wide(layers.bias)[i]
            acts.append(np.tanh(y))
        back = 3 * acts[-1] ** 2
        for i in (2, 1, 0):
            back = back * (1 - acts[i + 1] ** 2)
            expected[i] += acts[i].T @ acts[i]
            slopes[i] += back.T @ acts[i] / 2
            back = back @ wide(layers.weight)[i]
    record = calibration.inputs["weight"]
    assert_close(record.product, expected)
    assert_close(record.count, np.full(3, 10))
    u, s, v = map(wide, calibration.gradient("weight"))
    assert_close((u * s[:, None]) @ v, slopes, 1e-4)


def test_a_stack_that_is_indexed():
    layers = jnp.asarray(random(3, 4, 4), jnp.float32)

    def run(params, x):
        for i in range(3):
            x = x @ params["w"][i]
        return x

    x = np.float32(random(2, 4))
    spec = {"w": lorax.LoraSpec(2, batch=(0,))}
    found = lorax.calibrate(run, {"w": layers}, [x], spec=spec, gather="inputs")
    first = wide(x) @ wide(layers[0])
    second = first @ wide(layers[1])
    expected = [x.T @ x for x in (wide(x), first, second)]
    assert_close(found.inputs["w"].product, np.array(expected), 1e-4)


def test_a_tree_of_parameters():
    """Kernels `(in, out)`, also with two axes for outputs or for inputs."""
    params = {
        "dense": {"kernel": jnp.asarray(random(5, 7), jnp.float32)},
        "heads": {"kernel": jnp.asarray(random(7, 2, 3), jnp.float32)},
        "join": {"kernel": jnp.asarray(random(2, 3, 4), jnp.float32)},
    }

    def run(params, x):
        hidden = jnp.tanh(x @ params["dense"]["kernel"])
        heads = jnp.einsum("bi,ihd->bhd", hidden, params["heads"]["kernel"])
        return jnp.sum(jnp.einsum("bhd,hdo->bo", heads, params["join"]["kernel"]))

    spec = {
        "dense": {"kernel": 2},
        "heads": {"kernel": lorax.LoraSpec(2, rows=(0,), columns=(1, 2))},
        "join": {"kernel": 2},
    }
    x = np.float32(random(6, 5))
    found = lorax.calibrate(run, params, [x], spec=spec, key=KEY)
    kernels = [wide(params[name]["kernel"]) for name in params]
    hidden = np.tanh(wide(x) @ kernels[0])
    assert_close(found.inputs["dense.kernel"].product, wide(x).T @ wide(x))
    assert_close(found.inputs["heads.kernel"].product, hidden.T @ hidden)
    heads = hidden @ kernels[1].reshape(7, 6)
    assert_close(found.inputs["join.kernel"].product, heads.T @ heads)
    u, s, v = map(wide, found.gradient("dense.kernel"))
    slope = kernels[1].reshape(7, 6) @ kernels[2].sum(2).reshape(6)
    slope = slope * (1 - hidden**2)
    assert u.shape[0] == 7 and v.shape[1] == 5
    assert_close((u * s) @ v, (wide(x).T @ slope).T, 1e-4)
    with pytest.raises(ValueError, match="heads.kernel is summed over a part.*Spec"):
        lorax.calibrate(run, params, [x], spec=2, gather="inputs")


def test_convolutions_have_patches():
    groups = 2
    conv = eqx.nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=groups, key=KEY)
    images = np.float32(random(2, 4, 5, 6))

    def run(conv, images):
        return jnp.sum(jax.vmap(conv)(images) ** 2)

    found = lorax.calibrate(run, conv, [images], key=KEY)
    padded = np.pad(wide(images), [(0, 0), (0, 0), (1, 1), (1, 1)])
    patches = [
        image[group : group + 4 // groups, i : i + 2, j : j + 3].reshape(-1)
        for image in padded
        for group in range(0, 4, 4 // groups)
        for i in range(0, 7 - 1, 2)
        for j in range(0, 8 - 2, 2)
    ]
    x = np.array(patches)
    assert_close(found.inputs["weight"].product, x.T @ x)
    assert found.inputs["weight"].count == len(x)
    gradient = jax.grad(lambda w: run(eqx.tree_at(lambda c: c.weight, conv, w), images))
    u, s, v = map(wide, found.gradient("weight"))
    expected = wide(gradient(conv.weight)).reshape(6, -1)
    assert_close((u * s) @ v, expected, 1e-4)


def test_one_array_that_is_cast_and_split():
    """It has no path, and its parts see the same inputs, summed in float32."""
    kernel, x = jr.normal(KEY, (5, 6)), np.float32(random(7, 5))

    def run(kernel, x):
        parts = jnp.split(kernel.astype(jnp.bfloat16), 2, axis=1)
        return [x.astype(jnp.bfloat16) @ part for part in parts]

    found = lorax.calibrate(run, kernel, [x], spec=2, gather="inputs")
    narrow = wide(jnp.asarray(x, jnp.bfloat16))
    product = found.inputs["the root"].product
    assert product.dtype == jnp.float32
    assert_close(product, 2 * narrow.T @ narrow, 1e-6)
    adapted = lorax.init_lora(kernel, 2, KEY, init=found.eva())
    _, _, right = np.linalg.svd(narrow)
    assert_close(np.abs(wide(adapted.b).T @ right[:2].T), np.eye(2), 1e-3)


def test_a_table_has_a_gradient_but_no_inputs():
    table = eqx.nn.Embedding(9, 5, key=KEY)

    def run(table, indices):
        return jnp.sum(jax.vmap(table)(indices) ** 2)

    arguments = run, table, [np.array([1, 3, 3])], "weight"
    with pytest.raises(ValueError, match="weight is looked up in. Leave these out"):
        lorax.calibrate(*arguments, key=KEY)
    found = lorax.calibrate(*arguments, gather="gradients", rank=2, key=KEY)
    expected = np.zeros((9, 5))
    expected[1], expected[3] = wide(table.weight)[[1, 3]] * [[2], [4]]
    u, s, v = map(wide, found.gradient("weight"))
    assert_close((u * s) @ v, expected.T, 1e-4)


@pytest.mark.eight_devices
def test_on_several_devices():
    """The inputs lie along two axes of a mesh, and so does what is summed."""
    kind = AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    place = lambda x: jax.device_put(  # noqa: E731
        x, NamedSharding(mesh, P("data", "model"))
    )
    kernel, x = np.float32(random(6, 8)), np.float32(random(4, 8))

    def run(kernel, x):
        out = jnp.einsum("bi,oi->bo", x, kernel, out_sharding=P("data", None))
        return jnp.sum(out**2)

    with jax.set_mesh(mesh):
        found = lorax.calibrate(run, place(kernel), [place(x)], spec=2, key=KEY)
    assert_close(found.inputs["the root"].product, wide(x).T @ wide(x))
    u, s, v = map(wide, found.gradient("the root"))
    expected = 2 * (wide(x) @ wide(kernel).T).T @ wide(x)
    assert_close((u * s) @ v, expected, 1e-4)


def test_dropout_and_attention_run_as_they_do():
    attention = eqx.nn.MultiheadAttention(2, 6, dropout_p=0.5, key=KEY)
    seen = []

    def run(attention, batch):
        x, key = batch
        out = attention(x, x, x, key=key)
        jax.debug.callback(seen.append, out)
        return jnp.sum(out**2)

    x = jnp.asarray(random(3, 6), jnp.float32)
    found = lorax.calibrate(run, attention, [(x, KEY)], key=KEY)
    jax.effects_barrier()
    assert_close(seen[-1], wide(attention(x, x, x, key=KEY)), 1e-5)
    assert_close(found.inputs["query_proj.weight"].product, wide(x).T @ wide(x))


def test_sketches_of_inputs():
    """The directions of inputs of low rank, and nothing of their size squared."""
    linear = eqx.nn.Linear(40, 3, key=KEY)
    x = np.float32(random(100, 4) @ random(4, 40))

    def run(linear, xs):
        return jax.vmap(linear)(xs)

    found = lorax.calibrate(run, linear, [x], gather="inputs", sketch=8, key=KEY)
    record = found.inputs["weight"]
    assert record.product.shape == (40, 8)
    for centred in (False, True):
        values, vectors, energy = record.spectrum(centred)
        dense = wide(x) - (wide(x).mean(0) if centred else 0)
        expected, basis = np.linalg.eigh(dense.T @ dense / len(x))
        assert_close(values[:4], expected[::-1][:4], 1e-3)
        assert_close(energy, expected.sum(), 1e-4)
        overlap = np.abs(wide(vectors[:4]) @ basis[:, ::-1][:, :4])
        assert_close(overlap, np.eye(4), 1e-2)
    covariance = wide(x).T @ wide(x) / len(x)
    error = np.abs(wide(found.covariance("weight")) - covariance).max()
    assert error < 1e-3 * np.abs(covariance).max()


def test_gradients_of_low_rank_are_exact():
    """A gradient of rank 4, seen from 16 and 33 directions."""
    linear = eqx.nn.Linear(60, 50, key=KEY)
    x, y = np.float32(random(4, 60)), np.float32(random(4, 50))

    def run(linear, batch):
        x, y = batch
        return jnp.sum(jax.vmap(linear)(x) * y)

    found = lorax.calibrate(run, linear, [(x, y)], rank=2, gather="gradients", key=KEY)
    record = found.gradients["weight"]
    assert record.right.shape == (50, 16) and record.left.shape == (33, 60)
    u, s, v = map(wide, found.gradient("weight"))
    gradient = wide(y).T @ wide(x)
    assert_close((u * s) @ v, gradient, 1e-4)
    assert_close(s[:4], np.linalg.svd(gradient)[1][:4], 1e-4)


def count(model, xs):
    return jax.vmap(model)(xs)


def test_the_progress_bar(monkeypatch):
    """That of tqdm, where it is installed; by default on terminals only."""
    bars = []

    def bar(batches, **options):
        bars.append(options["disable"])
        return batches

    linear, arguments = eqx.nn.Linear(5, 3, key=KEY), dict(gather="inputs")
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=bar))
    for progress in (None, True, False):
        lorax.calibrate(count, linear, BATCHES[:1], **arguments, progress=progress)
    assert bars == [None, False]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    lorax.calibrate(count, linear, BATCHES[:1], **arguments)
    with pytest.raises(ImportError, match="not installed: `pip install tqdm`"):
        lorax.calibrate(count, linear, BATCHES[:1], **arguments, progress=True)


ERRORS = {
    "no batches": (dict(batches=[]), "`batches` is empty"),
    "no loss": (
        dict(fn=lambda model, xs: jax.vmap(model)(xs)),
        "must return a scalar loss, or a tuple .* float32 .4, 6.*gather='inputs'",
    ),
    "no key": (dict(key=None), "`key=None`, but gradients and sketches"),
    "what is gathered": (dict(gather="weights"), "must be 'inputs', 'gradients' or"),
    "sketch": (dict(sketch=0), "`sketch=0` must be a positive number"),
    "not used": (
        dict(fn=lambda model, xs: jnp.sum(jax.vmap(model.first)(xs))),
        "shared.weight is not used. .*`exclude`",
    ),
    "no product": (
        dict(fn=lambda m, xs: loss(m.first, xs) + jnp.sum(m.shared.weight**2)),
        "shared.weight is used as a whole, not in a product",
    ),
    "both sides": (
        dict(fn=lambda m, xs: jnp.sum((xs @ m.first.weight.T) @ m.first.weight)),
        "first.weight is multiplied from both sides",
    ),
    "no derivative": (
        dict(fn=lambda m, xs: jax.lax.stop_gradient(loss(m, xs)), gather="inputs"),
        "No result of `fn` depends on first.weight, shared.weight, .*`stop_gradient`",
    ),
    "spec and filter": (dict(spec=2, filter="first"), "leave out `filter`"),
}


@pytest.mark.own_errors
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    change, message = ERRORS[name]
    arguments = dict(fn=loss, batches=BATCHES[:1], key=KEY) | change
    fn, batches = arguments.pop("fn"), arguments.pop("batches")
    with pytest.raises(ValueError, match=message):
        lorax.calibrate(fn, Twice(), batches, **arguments)


def test_a_loop_without_a_derivative_is_explained():
    def run(linear, x):
        step = lambda carry: (carry[0] + 1, linear(carry[1]))  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, x))[1]

    linear = eqx.nn.Linear(4, 4, key=KEY)
    with pytest.raises(ValueError) as caught:
        lorax.calibrate(run, linear, [np.ones(4, np.float32)], gather="inputs")
    assert "which a `while_loop` has not" in caught.value.__notes__[0]


def test_one_batch_is_no_list_of_batches():
    for batches in (BATCHES[0], {"xs": BATCHES[0]}):
        with pytest.raises(TypeError, match=r"`batches` is one .* list of batches"):
            lorax.calibrate(loss, Twice(), batches, key=KEY)


def test_adapted_targets_are_refused():
    model = lorax.loraify(Twice(), "first", rank=2, key=KEY)
    with pytest.raises(ValueError, match="first.weight has an adapter"):
        lorax.calibrate(loss, model, BATCHES, key=KEY)
    found = lorax.calibrate(loss, model, BATCHES[:1], "shared", gather="inputs")
    assert list(found.inputs) == ["shared.weight"]

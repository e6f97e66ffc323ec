"""Checkpoints: bit for bit, onto any mesh, complete or not at all, and for one base."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fixture import fixture_adapter
from helpers import assert_identical, trained
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from running import running

import eqx_lorax as lorax
from eqx_lorax._methods import FactoredWeight


ERRORS = (lorax.AdapterFileError,)

# From TensorStore: after one read has failed, the others return when the event loop of
# Orbax is closed.
reads_fail = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def on(sharding, tree):
    return jax.device_put(tree, sharding)


@pytest.fixture
def run(getkey):
    """The frozen arrays, and the state of a run: params, Adam, keys, and unusual
    leaves."""
    model = eqx.nn.MLP(8, 4, 16, 2, key=getkey())
    model = trained(lorax.loraify(model, rank=2, key=getkey()))
    params, frozen = lorax.partition(model, also="layers.2.bias")
    optimizer_state = optax.MultiSteps(optax.adamw(1e-2), 2).init(params)
    rest = {
        "key": getkey(),
        "keys": jr.split(jr.key(3, impl="rbg"), 3),
        "a/b.c": np.arange(3.0) * 1e-300,
        "scalar": np.float64(0.1),
        "empty": jnp.zeros((0, 3)),
        "half": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "nan": jnp.array([jnp.nan, jnp.inf, -0.0]),
        "numbers": (3, 0.1, float("inf"), 1 + 2j, True, "name", None),
        "function": jax.nn.relu,
    }
    return frozen, (params, optimizer_state, rest)


def blank(state):
    """The same structure with other values."""

    def other(x):
        if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jr.split(jr.key(9, impl=jr.key_impl(x)), x.shape or 1).reshape(
                x.shape
            )
        if isinstance(x, np.generic):
            return type(x)(7)
        return x * 0 if isinstance(x, jax.Array | np.ndarray) else x

    return jax.tree.map(other, state)


def restored(checkpoints, state, **settings):
    found = checkpoints.restore(state, **settings)
    assert found is not None
    return found


def same(found, state):
    keys = [
        jax.tree.map(
            lambda x: (
                jr.key_data(x)
                if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                else x
            ),
            tree,
        )
        for tree in (found, state)
    ]
    assert_identical(*keys)


def test_round_trip(run, tmp_path):
    frozen, state = run
    with lorax.Checkpoints(tmp_path / "a" / "b", frozen) as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.restore(state) is None
        checkpoints.save(7, state)
    with lorax.Checkpoints(tmp_path / "a" / "b", frozen) as checkpoints:
        assert checkpoints.latest == 7
        step, found = restored(checkpoints, blank(state))
    assert step == 7
    same(found, state)
    assert found[2]["function"] is jax.nn.relu
    # They can be used beside arrays on a mesh, like new ones.
    assert not found[2]["key"].committed


def test_into_shapes(run, tmp_path):
    frozen, (params, optimizer_state, _) = run
    state = params, optimizer_state, jr.key(3)
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, state)
        shapes = jax.eval_shape(lambda: state)
        _, found = restored(checkpoints, shapes)
    same(found, state)


@pytest.mark.eight_devices
@pytest.mark.parametrize("shape", ((8, 1), (2, 4), (1, 8)), ids=str)
def test_onto_another_mesh(shape, tmp_path, getkey):
    spec = {"b": P("model"), "a": P(None, "model"), "key": P(), "keys": P("data")}
    state = {
        "b": jr.normal(getkey(), (16, 3)),
        "a": jr.normal(getkey(), (3, 8)),
        "key": getkey(),
        "keys": jr.split(getkey(), 8),
    }
    one, other = (
        {name: NamedSharding(m, p) for name, p in spec.items()}
        for m in (mesh(4, 2), mesh(*shape))
    )
    state = on(one, state)
    with lorax.Checkpoints(tmp_path, state) as checkpoints:
        checkpoints.save(1, state)
    # The base counts as the same for any sharding.
    with lorax.Checkpoints(tmp_path, on(other, state)) as checkpoints:
        _, found = restored(checkpoints, on(other, blank(state)))
        same(found, state)
        assert all(found[name].sharding == other[name] for name in spec)
        kinds = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            other,
        )
        _, found = restored(checkpoints, kinds)
        same(found, state)
        assert all(found[name].sharding == other[name] for name in spec)
        # Also onto a single device.
        _, found = restored(
            checkpoints, jax.tree.map(lambda x: x, blank(on(None, state)))
        )
        same(found, state)


def test_every_keep_and_force(tmp_path):
    with lorax.Checkpoints(tmp_path, None, every=3, keep=2) as checkpoints:
        for step in range(11):
            checkpoints.save(step, {"x": jnp.full(3, step)})
        assert checkpoints.latest == 9
        checkpoints.save(10, {"x": jnp.full(3, 10)}, force=True)
        assert checkpoints.latest == 10
        with pytest.raises(ValueError, match=r"`step=9` is not after 10.*`restore`"):
            checkpoints.save(9, {"x": jnp.full(3, 9)})
    assert sorted(x.name for x in tmp_path.iterdir()) == ["10", "9"]
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        step, found = restored(checkpoints, {"x": jnp.zeros(3, int)})
    assert step == 10 and found["x"][0] == 10


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = jnp.ones(200_000)
    with lorax.Checkpoints(tmp_path, None, keep=4) as checkpoints:
        for i in range(1, 4):
            checkpoints.save(i, x)
            x = step(x)
        # The digest is computed when `save` is called.
        assert checkpoints.restore(x) is not None


def test_another_base(run, tmp_path, getkey):
    frozen, state = run
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, state)
    other = eqx.tree_at(
        lambda m: m.layers[1].wrapped.bias, frozen, jr.normal(getkey(), 16)
    )
    match = r"another base than `frozen`: layers\.1\.bias differs\. .*allow_other_base"
    with lorax.Checkpoints(tmp_path, other) as checkpoints:
        with pytest.raises(ERRORS, match=match):
            checkpoints.restore(state)
        _, found = restored(checkpoints, state, allow_other_base=True)
    same(found, state)
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        with pytest.raises(ERRORS, match=r"layers\.0\.weight is missing"):
            checkpoints.restore(state)
    # A plain model has the same base, except for the trained arrays.
    plain = lorax.unloraify(eqx.combine(state[0], frozen), merge=False)
    with lorax.Checkpoints(tmp_path, plain) as checkpoints:
        with pytest.raises(ERRORS, match=r": layers\.2\.bias is not of it\. "):
            checkpoints.restore(state)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: {**s, "y": jnp.ones(2)}, r"state\['y'\] is not in it"),
        (lambda s: {"n": 1}, r"state\['x'\] is not in `state`"),
        (lambda s: {**s, "x": jnp.ones(3)}, r"float32 \(2,\) in it, float32 \(3,\)"),
        (lambda s: {**s, "x": jnp.ones(2, int)}, r"float32 \(2,\) in it, int32 \(2,\)"),
        (lambda s: {**s, "x": 1.0}, r"state\['x'\] is an array in it"),
        (lambda s: {**s, "n": jnp.ones(2)}, r"state\['n'\] is a number in it"),
        (lambda s: {**s, "k": jr.key(0)}, r"key<rbg> \(\) in it, key<fry> \(\) in"),
        (lambda s: [], r"and 0 more|is not in `state`"),
    ],
)
def test_another_structure(change, match, tmp_path):
    state = {"x": jnp.ones(2), "n": 1, "k": jr.key(0, impl="rbg")}
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(ERRORS, match=match) as error:
            checkpoints.restore(change(state))
    assert str(error.value).endswith("or use another folder.")


@pytest.mark.parametrize(
    "state, error, match",
    [
        ({}, ValueError, "no arrays"),
        ({"f": jax.nn.relu, "n": 1}, ValueError, "no arrays"),
        ({"x": jnp.zeros((0, 2))}, ValueError, "no arrays"),
        ({"x": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, r"`state\['x'\]`"),
    ],
)
def test_what_cannot_be_saved(state, error, match, tmp_path):
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        with pytest.raises(error, match=match):
            checkpoints.save(1, state)
        assert checkpoints.latest is None


@pytest.mark.parametrize("argument", ("every", "keep"))
def test_bad_numbers(argument, tmp_path):
    with pytest.raises(ValueError, match=f"`{argument}=0` must be at least 1"):
        lorax.Checkpoints(tmp_path, None, **{argument: 0})


@reads_fail
def test_damaged(tmp_path):
    """Each file of a checkpoint: missing, truncated, or with a flipped bit."""
    state = {"x": jr.normal(jr.key(0), (64, 64)), "k": jr.key(1), "n": 3}
    with lorax.Checkpoints(tmp_path / "good", None) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    files = [x for x in (tmp_path / "good" / "2").rglob("*") if x.is_file()]
    noticed = 0
    for i, file in enumerate(files):
        for damage in ("gone", "cut", "changed"):
            folder = tmp_path / f"{i}{damage}"
            shutil.copytree(tmp_path / "good", folder)
            copy = folder / file.relative_to(tmp_path / "good")
            content = bytearray(copy.read_bytes())
            content[len(content) // 2] ^= 4
            if damage == "gone":
                copy.unlink()
            else:
                copy.write_bytes(content if damage == "changed" else content[:-9])
            with lorax.Checkpoints(folder, None) as checkpoints:
                try:
                    _, found = restored(checkpoints, blank(state))
                except lorax.AdapterFileError as error:
                    noticed += 1
                    assert str(error).endswith("Delete it to resume from step 1.")
                else:
                    same(found, state)
            shutil.rmtree(folder)
    # The other damage does no harm: the restored arrays are correct.
    assert noticed >= 10


@reads_fail
def test_the_last_one_left_is_damaged(tmp_path):
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        checkpoints.save(1, jnp.ones(2))
    shutil.rmtree(tmp_path / "1" / "arrays")
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        with pytest.raises(ERRORS, match=r"1 is damaged.* Delete it to begin again\.$"):
            checkpoints.restore(jnp.ones(2))


@reads_fail
def test_something_else(tmp_path):
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "notes.txt").write_text("mine")
    with lorax.Checkpoints(tmp_path, None) as checkpoints:
        with pytest.raises(ERRORS, match="no checkpoint of this library"):
            checkpoints.restore(jnp.ones(2))


def _steps(folder):
    return [int(x.name) for x in folder.iterdir() if x.name.isdigit()]


@pytest.mark.heavy
@pytest.mark.processes
def test_killed_at_any_moment(tmp_path):
    """A killed run leaves only complete checkpoints, which do not pile up. Half-deleted
    ones do no harm."""
    script = """
        import sys
        import jax
        import jax.numpy as jnp
        import eqx_lorax as lorax

        state = {"x": jnp.arange(4000.0), "y": jnp.ones((50, 50))}
        with lorax.Checkpoints(sys.argv[1], state, keep=2) as checkpoints:
            found = checkpoints.restore(state)
            first, state = found or (0, state)
            assert float(state["x"][0]) == first
            for step in range(first + 1, 10_000):
                state = {**state, "x": state["x"] + 1}
                checkpoints.save(step, state)
    """
    latest, steps = 0, []
    for i in range(4):
        with running(script, tmp_path) as program:
            assert program.wait_until(
                lambda: max(_steps(tmp_path), default=0) > latest
            ), program.err
            time.sleep(0.13 * i)
        steps = _steps(tmp_path)
        assert len(list(tmp_path.iterdir())) <= 5
        assert max(steps) > latest
        latest = max(steps)
    # As if the run had been killed while it deleted an old checkpoint.
    broken = tmp_path / str(min(steps))
    for file in list(broken.rglob("*")):
        if file.is_file():
            file.unlink()
    state = {"x": jnp.arange(4000.0), "y": jnp.ones((50, 50))}
    with lorax.Checkpoints(tmp_path, state, keep=2) as checkpoints:
        step, found = restored(checkpoints, state)
        assert step == latest and found["x"][0] == latest
        checkpoints.save(step + 1, found)
        checkpoints.save(step + 2, found)
    left = sorted(x.name for x in tmp_path.iterdir())
    assert left == sorted([str(latest + 1), str(latest + 2)])


@pytest.mark.heavy
@pytest.mark.processes
def test_on_another_number_of_processes(tmp_path):
    """Two processes write and one reads; then one of the two has another state."""
    script = """
        import launch

        launch.start(__file__)

        import argparse
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import eqx_lorax as lorax

        parser = argparse.ArgumentParser()
        parser.add_argument("folder")
        launch.add_flags(parser)
        args = parser.parse_args()
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
        mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
        x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
        on_mesh = jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, P("x")), lambda index: x[index]
        )
        state = {"x": on_mesh, "key": jax.random.key(5), "count": jnp.array(3)}
        with lorax.Checkpoints(args.folder, state) as checkpoints:
            checkpoints.save(1, state)
            step, found = checkpoints.restore({**state, "count": jnp.array(0)})
            assert int(found["count"]) == 3
            assert found["x"].sharding == on_mesh.sharding
            try:
                checkpoints.save(2, {**state, "count": jnp.array(args.process)})
            except ValueError as error:
                assert "Processes differ in state['count']. Put it on" in str(error)
                print("refused")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XLA_FLAGS")
    folder = tmp_path / "checkpoints"
    with running(script, folder, "--devices", 2, environment=environment) as program:
        program.finish()
        assert "refused" in program.out

    state = {
        "x": jnp.arange(32.0).reshape(8, 4),
        "key": jr.key(5),
        "count": jnp.array(3, jnp.int32),
    }
    with lorax.Checkpoints(folder, state) as checkpoints:
        step, found = restored(checkpoints, blank(state))
    assert step == 1
    same(found, state)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Name a folder"):
        lorax.Checkpoints(tmp_path / "file", None)


def test_relative_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with lorax.Checkpoints(Path("run"), None) as checkpoints:
        checkpoints.save(1, jnp.ones(2))
    assert os.listdir(tmp_path / "run") == ["1"]


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint$"):
        lorax.Checkpoints(tmp_path, None)


# Static settings


def adapted_square(**settings: Any) -> Any:
    """Two layers whose sides are all equal."""
    plain = eqx.nn.MLP(4, 4, 4, 1, key=jr.key(0))
    return trained(lorax.loraify(plain, rank=2, key=jr.key(1), **settings))


def state_of(model: Any) -> Any:
    params, frozen = lorax.partition(model)
    return (params, optax.adam(1e-2).init(params)), frozen


def with_axes(model: Any) -> Any:
    weight = lambda m: m.layers[0].wrapped.weight  # noqa: E731
    old = weight(model)
    turned = lorax.LoraWeight(old.w, old.b, old.a, rows=(-1,), columns=(-2,))
    return eqx.tree_at(weight, model, turned, is_leaf=lambda x: x is old)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            lambda: adapted_square(alpha=2),
            r"`alpha` was 16\.0 and is 2\.0 at layers\.0\.weight, layers\.1\.weight, "
            r"state\[0\]\.layers\[0\]\.wrapped\.weight, .* and 4 more\. Adapt",
        ),
        (
            lambda: adapted_square(alpha={"layers.1": 3, "*": 16}),
            r"`alpha` was 16\.0 and is 3\.0 at layers\.1\.weight, state\[0\]\.layers",
        ),
        (
            lambda: adapted_square(alpha=16, rank_stabilised=True),
            "`rank_stabilised` was False and is True at layers.0.weight, ",
        ),
        (
            lambda: with_axes(adapted_square(alpha=16)),
            r"`rows` was \[-2\] and is \[-1\] at layers\.0\.weight, .*; `columns` was",
        ),
        (
            lambda: adapted_square(alpha=16, dropout=0.5),
            r"`dropout` was 0\.0 and is 0\.5 at layers\.0, layers\.1\. Adapt",
        ),
        (
            lambda: eqx.tree_at(
                lambda m: m.layers[0].wrapped.weight,
                adapted_square(alpha=16),
                replace_fn=lambda w: w.T,
                is_leaf=lambda x: isinstance(x, lorax.LoraWeight),
            ),
            r"`order` was None and is \[-1, -2\] at layers\.0\.weight, ",
        ),
    ],
)
def test_other_settings(change, match, tmp_path):
    """Settings that are in no array but change the meaning of the arrays."""
    state, frozen = state_of(adapted_square(alpha=16))
    other, other_frozen = state_of(change())
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, state)
        same(restored(checkpoints, state)[1], state)
    with lorax.Checkpoints(tmp_path, other_frozen) as checkpoints:
        with pytest.raises(ERRORS, match=match) as error:
            checkpoints.restore(other, allow_other_base=True)
        assert "with other settings: " in str(error.value)
        assert str(error.value).endswith("if these differences are meant.")
        _, found = restored(
            checkpoints, other, allow_other_base=True, allow_other_settings=True
        )
        assert jax.tree.structure(found) == jax.tree.structure(other)
        assert jax.tree.leaves(found)[0] is not None


def test_settings_that_only_one_has(tmp_path):
    """A setting that did not exist when the checkpoint was saved is not compared."""
    state, frozen = state_of(adapted_square(alpha=16, dropout=0.1))
    plain = lorax.unloraify(eqx.combine(state[0], frozen), merge=False)
    for written, read in ((plain, frozen), (frozen, plain)):
        folder = tmp_path / str(written is plain)
        with lorax.Checkpoints(folder, written) as checkpoints:
            checkpoints.save(1, state)
        with lorax.Checkpoints(folder, read) as checkpoints:
            same(restored(checkpoints, state)[1], state)
            other, _ = state_of(adapted_square(alpha=2))
            # The settings of `state` are compared.
            with pytest.raises(ERRORS, match=r"`alpha` was 16\.0 and is 2\.0 at state"):
                checkpoints.restore(other)


def test_modes_are_no_settings(tmp_path):
    """Settings without influence on trained arrays may differ, for instance for
    evaluation."""
    model = adapted_square(alpha=16, dropout=0.1)
    state, frozen = state_of(model)
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, state)
    other = lorax.merged_forward(eqx.nn.inference_mode(model))
    other_state, other_frozen = state_of(other)
    with lorax.Checkpoints(tmp_path, other_frozen) as checkpoints:
        assert restored(checkpoints, other_state)[0] == 1


def test_what_is_frozen_besides_the_base(tmp_path):
    weight = lorax.LoraWeight(jnp.ones((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)))
    gates = [
        FactoredWeight(weight.factored().replace(gate=jnp.array([1.0, x])))
        for x in (2.0, 3.0)
    ]
    parts = [eqx.partition(x, lorax.trainable(x)) for x in gates]
    with lorax.Checkpoints(tmp_path, parts[0][1]) as checkpoints:
        checkpoints.save(1, parts[0][0])
    with lorax.Checkpoints(tmp_path, parts[1][1]) as checkpoints:
        with pytest.raises(ERRORS, match="`gate` was"):
            checkpoints.restore(parts[1][0])


def test_a_folder_of_format_1(tmp_path):
    """Old folders must load in all later versions."""
    archive = Path(__file__).parent / "data" / "checkpoint_format_1.zip"
    shutil.unpack_archive(archive, tmp_path)
    params, frozen = lorax.partition(fixture_adapter())
    momentum = optax.sgd(0.1, momentum=0.9).init(params)
    state = params, momentum, jnp.arange(3.0), 7
    with lorax.Checkpoints(tmp_path, frozen) as checkpoints:
        step, found = restored(checkpoints, blank(state))
        assert step == 5
        same(found, state)
        # The next checkpoint has what the old format lacks.
        checkpoints.save(6, found)
        assert restored(checkpoints, blank(state))[0] == 6

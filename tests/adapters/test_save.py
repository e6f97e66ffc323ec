"""Adapters in files: bit for bit, complete, and never into the wrong model."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from cases import every_case
from doubled import Doubled
from fixture import fixture_adapter, fixture_model
from helpers import assert_identical, filled, run, trained, weights
from running import running
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import eqx_lorax as lorax
from eqx_lorax._adapters import save as _save
from eqx_lorax._adapters.fingerprint import fingerprint


HERE = Path(__file__).parent
ERRORS = (lorax.AdapterFileError,)


def mlp(key, width=6):
    return eqx.nn.MLP(4, 3, width, 2, key=key)


@pytest.fixture
def saved(tmp_path, getkey):
    """A plain model, the adapted model, and a file with its adapter and a bias."""
    plain = mlp(getkey())
    adapted = trained(lorax.loraify(plain, rank=2, alpha=3.0, key=getkey()))
    path = tmp_path / "adapter.safetensors"
    lorax.save_adapter(path, adapted, also="layers.2.bias", metadata={"epoch": 3})
    return plain, adapted, path


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=str)
@every_case
def test_round_trip(case, dtype, tmp_path, getkey):
    model = filled(case.make, dtype, getkey())
    adapted = lorax.loraify(model, case.filter, rank=case.rank, alpha=3.0, key=getkey())
    adapted = trained(adapted)
    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", model), adapted)
    other = lorax.loraify(model, case.filter, rank=case.rank, key=getkey())
    assert_identical(lorax.load_adapter(tmp_path / "a", other), adapted)


def test_what_else_was_trained(saved):
    plain, adapted, path = saved
    adapted = eqx.tree_at(lambda m: m.layers[2].bias, adapted, jnp.full(3, jnp.nan))
    lorax.save_adapter(path, adapted, also="layers.2.bias")
    assert_identical(lorax.load_adapter(path, plain), adapted)


def test_info(saved):
    _, _, path = saved
    info = lorax.adapter_info(path)
    assert info["metadata"] == {"epoch": 3}
    assert info["format"] == 1
    assert info["library"] == lorax.__version__
    assert info["others"] == ["layers.2.bias"]
    first = info["targets"][0]
    assert first["path"] == "layers.0.weight"
    assert first["shape"] == (6, 4)
    assert first["alpha"] == 3.0
    assert first["arrays"] == {"b": (6, 2), "a": (2, 4)}


def test_only_what_is_trained_is_in_the_file(saved):
    _, adapted, path = saved
    params, _ = lorax.partition(adapted, also="layers.2.bias")
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in load_file(path).values()) == size
    assert path.stat().st_size < size + 4000


def test_trees_that_are_no_modules(tmp_path, getkey):
    params = {
        "w.x": jr.normal(getkey(), (9, 7)),
        "w": {"x": jr.normal(getkey(), (9, 7))},
    }
    adapted = lorax.init_lora(params, {"w.x": 2, "w": {"x": 3}}, getkey())
    adapted = trained(adapted)
    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", params), adapted)


def test_an_adapter_on_an_adapter(tmp_path, getkey):
    plain = mlp(getkey())
    once = trained(lorax.loraify(plain, rank=2, key=getkey()))
    twice = trained(lorax.loraify(once, rank=1, nested=True, key=getkey()))
    lorax.save_adapter(tmp_path / "a", twice)
    assert_identical(lorax.load_adapter(tmp_path / "a", twice), twice)
    # The lower adapter belongs to the base.
    other = trained(lorax.loraify(plain, rank=2, key=getkey()))
    other = lorax.loraify(other, rank=1, nested=True, key=getkey())
    with pytest.raises(ERRORS, match=r"layers\.0\.weight\.a differs"):
        lorax.load_adapter(tmp_path / "a", other)


def test_another_method(tmp_path, getkey):
    """Only its class is needed."""
    plain = {"w": jr.normal(getkey(), (5, 4))}
    b, a = jr.normal(getkey(), (5, 2)), jr.normal(getkey(), (2, 4))
    adapted = {"w": Doubled(plain["w"], b, a, 4)}
    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", plain), adapted)
    assert lorax.adapter_info(tmp_path / "a")["targets"][0]["method"] == "doubled"


class Buggy(Doubled):
    """A method with a bug in its constructor, which is reported on loading."""

    method = "buggy"
    raises: ClassVar[type[Exception] | None] = None

    def __init__(self, w: Any, b: jax.Array, a: jax.Array, times: int):
        self.w, self.b, self.a, self.times = w, b, a, times
        if self.raises is not None:
            raise self.raises("a bug")


@pytest.mark.parametrize("bug", [TypeError, AttributeError, KeyError, RecursionError])
def test_a_bug_in_a_method_is_no_damaged_file(bug, monkeypatch, tmp_path, getkey):
    plain = {"w": jr.normal(getkey(), (5, 4))}
    b, a = jr.normal(getkey(), (5, 2)), jr.normal(getkey(), (2, 4))
    lorax.save_adapter(tmp_path / "a", {"w": Buggy(plain["w"], b, a, 4)})
    monkeypatch.setattr(Buggy, "raises", bug)
    with pytest.raises(bug, match="a bug") as error:
        lorax.load_adapter(tmp_path / "a", plain)
    assert error.value.__notes__ == ["Raised as a Buggy was made for w."]
    # A `ValueError` of the method is an error in the file.
    monkeypatch.setattr(Buggy, "raises", ValueError)
    with pytest.raises(ERRORS, match="a: a bug"):
        lorax.load_adapter(tmp_path / "a", plain)


def test_dropout_and_options_come_back(tmp_path, getkey):
    plain = mlp(getkey())
    adapted = lorax.loraify(
        plain,
        rank={"layers.0": 1, "*": 2},
        dropout={"layers.1": 0.25},
        rank_stabilised=True,
        dtype=jnp.bfloat16,
        key=getkey(),
    )
    lorax.save_adapter(tmp_path / "a", adapted)
    assert_identical(lorax.load_adapter(tmp_path / "a", plain), adapted)


# Mismatches


def test_another_base_is_refused(saved, getkey):
    plain, adapted, path = saved
    other = eqx.tree_at(
        lambda m: m.layers[1].weight, plain, plain.layers[1].weight.at[2, 3].add(1e-7)
    )
    with pytest.raises(
        ERRORS, match=r"another base.*: layers\.1\.weight differs\. Load.*`also`"
    ):
        lorax.load_adapter(path, other)
    loaded = lorax.load_adapter(path, other, allow_other_base=True)
    x = jnp.ones(4)
    assert np.allclose(run(loaded, x), run(adapted, x), atol=1e-5)
    # The head in the file is not part of the base.
    head = eqx.tree_at(lambda m: m.layers[2].bias, plain, jnp.ones(3))
    assert_identical(lorax.load_adapter(path, head), adapted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: mlp(jr.key(0), 7), r"layers\.0\.weight: \(7, 4\) in the model, not"),
        (lambda m: m.layers[0], r"layers\.0\.weight: there is no such array"),
        (
            lambda m: lorax.loraify(m, rank=3, key=jr.key(0)),
            r"layers\.0\.weight, `b`: float32 \(6, 3\) in the model, float32 \(6, 2\)",
        ),
        (
            lambda m: lorax.loraify(m, rank=2, dtype=jnp.bfloat16, key=jr.key(0)),
            r"`a`: bfloat16 \(2, 4\) in the model, float32 \(2, 4\) in the adapter",
        ),
        (
            lambda m: lorax.loraify(m, "layers.1", rank=2, key=jr.key(0)),
            r"layers\.0\.weight: the model has other adapters, but none here",
        ),
        (
            lambda m: eqx.tree_at(lambda m: m.layers[2].bias, m, jnp.ones((3, 1))),
            r"layers\.2\.bias: float32 \(3, 1\) in the model, float32 \(3,\)",
        ),
    ],
)
def test_another_model_is_refused(saved, change, message):
    plain, _, path = saved
    with pytest.raises(ERRORS, match=message):
        lorax.load_adapter(path, change(plain))


def test_adapters_that_the_file_has_not(tmp_path, getkey):
    plain = mlp(getkey())
    few = lorax.loraify(plain, "layers.0", rank=2, key=getkey())
    lorax.save_adapter(tmp_path / "a", few)
    every = lorax.loraify(plain, rank=2, key=getkey())
    with pytest.raises(ERRORS, match=r"layers\.1\.weight: the adapter has nothing for"):
        lorax.load_adapter(tmp_path / "a", every)


def test_nothing_to_save(tmp_path, getkey):
    plain = mlp(getkey())
    with pytest.raises(ValueError, match="no adapters to save.*loraify.*also"):
        lorax.save_adapter(tmp_path / "a", plain)
    abstract = eqx.filter_eval_shape(lambda: lorax.loraify(plain, rank=1, key=getkey()))
    with pytest.raises(TypeError, match=r"no array to save at layers\.0\.weight"):
        lorax.save_adapter(tmp_path / "a", abstract)
    adapted = lorax.loraify(plain, rank=1, key=getkey())
    with pytest.raises(
        ValueError, match=r"without its base.*lorax\.combine\(params, frozen"
    ):
        lorax.save_adapter(tmp_path / "a", lorax.partition(adapted)[0])
    with pytest.raises(TypeError, match="`metadata` is not what JSON can hold"):
        lorax.save_adapter(tmp_path / "a", adapted, metadata={"x": jnp.ones(2)})
    assert not list(tmp_path.iterdir())


# Damaged and foreign files


def rewritten(path, change, digest=True):
    """The file with another header; `digest` makes its checksum consistent."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    header = json.loads(metadata["eqx_lorax"])
    new = change(header)
    text = json.dumps(header if new is None else new)
    metadata["eqx_lorax"] = text
    if digest:
        metadata["eqx_lorax_digest"] = _save.hash_content(text.encode())
    save_file(load_file(path), path, metadata)


def set_(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (set_("format", 2), "has format 2, of eqx-lorax.*Upgrade"),
        (set_("format", "new"), "does not describe an adapter"),
        (set_("targets", 0, "method", "dorra"), "method 'dorra' is not known"),
        (set_("targets", 0, "path", 3), "does not describe an adapter"),
        (set_("targets", 0, "path", ["..", "..", "etc"]), "no such array"),
        (set_("targets", 0, "settings", "rows", [7]), "an axis that a `w` of 2 axes"),
        (set_("targets", 0, "settings", "evil", 1), "evil"),
        (set_("targets", 0, "settings", {"alpha": {}}), "are no settings"),
        (set_("targets", 0, "settings", "rows", [[]]), "are no settings"),
        (set_("targets", 0, "dropout", 1.5), "are no settings"),
        (set_("targets", 0, "tensors", "b", "x"), "KeyError: 'x'"),
        (set_("targets", 0, "tensors", {}), "some tensors belong to nothing"),
        (set_("targets", 0, "shape", [4, 6]), r"\(6, 4\) in the model, not \(4, 6\)"),
        (set_("targets", "many"), "does not describe an adapter"),
        (set_("others", []), "some tensors belong to nothing"),
        (set_("base", []), "layers.0.weight is not of it"),
        (set_("digests", {}), "is damaged: layers"),
        (lambda header: header.pop("targets") and None, "KeyError: 'targets'"),
        (lambda header: [], "KeyError: 'format'"),
        (lambda header: "x", "does not describe an adapter"),
    ],
)
def test_headers_that_describe_nothing(saved, change, message):
    plain, _, path = saved
    rewritten(path, change)
    with pytest.raises(ERRORS, match=message):
        lorax.load_adapter(path, plain)


def test_info_of_a_header_that_lacks_something(saved):
    _, _, path = saved
    for name in ("base", "library", "metadata"):
        before = path.read_bytes()
        rewritten(path, lambda header: header.pop(name) and None)
        with pytest.raises(ERRORS, match=f"does not describe.*KeyError: '{name}'"):
            lorax.adapter_info(path)
        path.write_bytes(before)


def test_a_header_that_was_changed(saved):
    plain, _, path = saved
    rewritten(path, set_("targets", 0, "settings", "alpha", 4.0), digest=False)
    with pytest.raises(ERRORS, match="header is not as written"):
        lorax.load_adapter(path, plain)


def test_foreign_files(saved, tmp_path):
    plain, _, path = saved
    save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(
        ERRORS, match=r"not written by `lorax.save_adapter`.*lorax\.peft"
    ):
        lorax.load_adapter(path, plain)
    path.write_bytes(b"PK\x03\x04 a pickle, perhaps")
    with pytest.raises(ERRORS, match="is a pickle of PyTorch's"):
        lorax.load_adapter(path, plain)
    path.write_bytes(b"")
    with pytest.raises(ERRORS, match="not a whole safetensors file"):
        lorax.load_adapter(path, plain)
    with pytest.raises(FileNotFoundError):
        lorax.load_adapter(tmp_path / "nothing", plain)
    with pytest.raises(IsADirectoryError):
        lorax.load_adapter(tmp_path, plain)


def deep(levels):
    return b'{"__metadata__":{"eqx_lorax":"' + b"[" * levels + b'"}}'


def tensor(**changes):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    return json.dumps({"../../x": entry}).encode()


@pytest.mark.parametrize(
    "header, length",
    [
        (b"{}", 2**63),
        (b"{}", 2**40),
        (b"{}", 0),
        (b"[" * 100_000, None),
        (deep(100_000), None),
        (tensor(), None),
        (tensor(shape=[2**32, 2**32]), None),
        (tensor(shape=[-1]), None),
        (tensor(data_offsets=[4, 0]), None),
        (tensor(dtype="F8_E4M3", shape=[4]), None),
        (b"\xff\xfe", None),
    ],
)
def test_hostile_headers(saved, header, length):
    plain, _, path = saved
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ERRORS):
        lorax.load_adapter(path, plain)


def test_truncated_anywhere(saved):
    plain, _, path = saved
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for size in {0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9}:
        path.write_bytes(content[:size])
        with pytest.raises(ERRORS, match="not a whole safetensors file"):
            lorax.load_adapter(path, plain)
    for size in (len(content) - 1, len(content) - 4, len(content) + 1):
        path.write_bytes((content + b"\0")[:size])
        with pytest.raises(ERRORS, match="not a whole safetensors file"):
            lorax.load_adapter(path, plain)


def test_a_thousand_corruptions(saved):
    """Each corruption is detected, or changes nothing."""
    plain, adapted, path = saved
    content = path.read_bytes()
    random = np.random.default_rng(0)
    header = int.from_bytes(content[:8], "little")
    unharmed = 0
    for i in range(1000):
        damaged = bytearray(content)
        # Half of them are in the header, which is most of such a small file.
        end = len(content) if i % 2 else 8 + header
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(0, end)] = random.integers(0, 256)
        if i % 10 == 0:
            start, stop = sorted(random.integers(0, len(content), 2))
            del damaged[start:stop]
        path.write_bytes(damaged)
        try:
            loaded = lorax.load_adapter(path, plain)
        except lorax.AdapterFileError:
            continue
        unharmed += 1
        assert_identical(loaded, adapted)
    assert unharmed < 50


# Writing


def test_a_failed_write_leaves_what_was_there(saved, monkeypatch):
    plain, adapted, path = saved
    before = path.read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_save, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            lorax.save_adapter(path, adapted)
    assert path.read_bytes() == before
    assert [x.name for x in path.parent.iterdir()] == [path.name]


WRITER = """
import os, signal, sys
import equinox as eqx, jax
import eqx_lorax as lorax
from eqx_lorax._adapters import atomic as _atomic, save as _save

stage, path = sys.argv[1:]
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
model = lorax.loraify(eqx.nn.Linear(3, 4, key=jax.random.key(0)), rank=2,
                      key=jax.random.key(1))

def half(tensors, path, metadata):
    with open(path, "wb") as file:
        file.write(b"half")
        file.flush()
        die()

match stage:
    case "begin": _save.save_file = die
    case "half": _save.save_file = half
    case "sync": os.fsync = die
    case "replace": os.replace = die
    case "after":
        replace = os.replace
        os.replace = lambda *x: (replace(*x), die())
lorax.save_adapter(path, model)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("stage", ("begin", "half", "sync", "replace", "after"))
def test_a_killed_writer(stage, saved):
    """At every stage the file is complete, either the old or the new one."""
    plain, adapted, path = saved
    before = path.read_bytes()
    with running(WRITER, stage, path) as program:
        program.finish(status=-signal.SIGKILL)
    if stage == "after":
        keys = jr.key(0), jr.key(1)
        linear = eqx.nn.Linear(3, 4, key=keys[0])
        expected = lorax.loraify(linear, rank=2, key=keys[1])
        assert_identical(lorax.load_adapter(path, linear), expected)
    else:
        assert path.read_bytes() == before
        assert_identical(lorax.load_adapter(path, plain), adapted)


def test_two_writers(saved, getkey):
    """Each writes a separate file, so the last one to finish wins."""
    plain, adapted, path = saved
    other = jax.tree.map(
        lambda x: x, lorax.loraify(plain, rank=2, alpha=3.0, key=getkey())
    )
    original = _save.save_file

    def interrupted(tensors, new, metadata):
        original(tensors, new, metadata)
        if _save.save_file is interrupted:
            _save.save_file = original
            lorax.save_adapter(path, other)

    _save.save_file = interrupted
    try:
        lorax.save_adapter(path, adapted)
    finally:
        _save.save_file = original
    found = lorax.load_adapter(path, plain)
    assert_identical(weights(found), weights(adapted))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_those_of_other_files(saved):
    _, _, path = saved
    beside = path.with_name("beside")
    beside.write_bytes(b"")
    assert path.stat().st_mode == beside.stat().st_mode


READER = """
import sys
import equinox as eqx, jax, jax.numpy as jnp
import eqx_lorax as lorax

def used():
    # kilobytes of memory, without pages of files
    lines = open("/proc/self/status").readlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))

plain = eqx.nn.Linear(4, 3, key=jax.random.key(0))
heads = lambda: {"head": [jnp.zeros((1000, 3000)) for _ in range(10)]}
if sys.argv[1] == "write":
    model = [lorax.loraify(plain, rank=1, key=jax.random.key(0)), heads()]
    lorax.save_adapter(sys.argv[2], model, also="head")
else:
    model = [plain, heads()]
    jax.block_until_ready(model[1])
    before = used()
    model = lorax.load_adapter(sys.argv[2], model, allow_other_base=True)
    jax.block_until_ready(model[1])
    print(used() - before)
"""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_file_costs_no_second_copy(tmp_path):
    with running(READER, "write", tmp_path / "a") as program:
        program.finish()
    with running(READER, "read", tmp_path / "a") as program:
        program.finish()
        used = int(program.out)
    size = 10 * 1000 * 3000 * 4 / 1024
    assert used < 1.3 * size


# Digests


@pytest.mark.parametrize(
    "dtype", ("float32", "bfloat16", "float16", "int8", "bool", "complex64", "uint32")
)
def test_digests_are_of_every_bit(dtype):
    random = np.random.default_rng(0)
    x = np.asarray(random.integers(0, 2, (5, 7)), jnp.dtype(dtype))
    seen = {fingerprint(x)}
    assert fingerprint(jnp.asarray(x)) == fingerprint(x)
    for flat in range(0, x.nbytes, max(1, x.nbytes // 20)):
        changed = bytearray(x.tobytes())
        changed[flat] ^= 1
        seen.add(fingerprint(np.frombuffer(bytes(changed), x.dtype).reshape(x.shape)))
    seen.add(fingerprint(x.T.copy()))
    seen.add(fingerprint(x[::-1].copy()))
    seen.add(fingerprint(x.reshape(7, 5)))
    assert len(seen) == 4 + len(range(0, x.nbytes, max(1, x.nbytes // 20)))


def test_digests_do_not_depend_on_x64():
    x = np.arange(12.0).reshape(3, 4)
    with jax.enable_x64(True):
        wide = fingerprint(jnp.asarray(x)), fingerprint(x)
    assert wide == (fingerprint(x), fingerprint(x))
    assert fingerprint(x) != fingerprint(x.astype(np.float32))


# Old files must load in all later versions.


def test_the_file_of_format_1():
    path = HERE / "data" / "adapter_format_1.safetensors"
    loaded = lorax.load_adapter(path, fixture_model())
    assert_identical(loaded, fixture_adapter())
    assert lorax.adapter_info(path)["metadata"] == {"written by": "0.1.0"}

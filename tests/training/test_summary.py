import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import eqx_lorax as lorax


@pytest.fixture
def model(getkey):
    model = [
        eqx.nn.Linear(10, 20, dtype=jnp.bfloat16, key=getkey()),
        eqx.nn.Conv2d(3, 4, 3, key=getkey()),
        eqx.nn.LayerNorm(5),
        jnp.arange(3),
        "text",
    ]
    return lorax.loraify(model, rank=2, alpha=4, key=getkey())


def test_numbers(model):
    summary = lorax.summary(model)
    linear, conv = summary.targets
    assert (linear.path, linear.kind, linear.shape) == ("0.weight", "Linear", (20, 10))
    assert (linear.dtype, linear.rank, linear.scale) == ("bfloat16", 2, 2.0)
    assert (linear.trained, linear.frozen) == (60, 200)
    assert (conv.kind, conv.trained, conv.frozen) == ("Conv2d", 2 * (4 + 27), 108)
    assert summary.trained == 60 + 62
    assert summary.trained_bytes == 4 * (60 + 62)
    assert summary.frozen == 200 + 20 + 108 + 4 + 10 + 3
    assert summary.frozen_bytes == 2 * 220 + 4 * 125
    params, _ = lorax.partition(model)
    state = optax.adam(1e-3).init(params)
    assert summary.adam_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    plain = eqx.filter(lorax.unloraify(model, merge=False), eqx.is_inexact_array)
    state = optax.adam(1e-3).init(plain)
    assert summary.full_adam_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    also = lorax.summary(model, also=eqx.nn.LayerNorm)
    assert also.trained == summary.trained + 10


def _lines(summary):
    return [line.split() for line in str(summary).splitlines() if line.strip()]


def test_table(model):
    lines = _lines(lorax.summary(model))
    row = ["0.weight", "Linear", "20×10", "bfloat16", "2", "2", "60", "200"]
    assert lines[0][:3] == ["target", "module", "shape"]
    assert row in lines
    assert ["trained", "122", "488", "B", "(26.12%", "of", "all)"] in lines


def test_what_else_is_trained(getkey):
    linear, norm = eqx.nn.Linear(4, 4, key=getkey()), eqx.nn.LayerNorm(4)
    blocks = [{"linear": copy.deepcopy(linear), "norm": norm} for _ in range(2)]
    model = {"blocks": blocks, "head": eqx.nn.Linear(4, 3, key=getkey())}
    model = lorax.loraify(model, exclude="head", rank=1, key=getkey())
    plain = lorax.summary(model)
    assert plain.also == () and plain.trained == 16
    summary = lorax.summary(model, also=["head", eqx.nn.LayerNorm])
    assert summary.targets == plain.targets
    paths = ["blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.1.norm.weight"]
    paths += ["blocks.1.norm.bias", "head.weight", "head.bias"]
    assert [array.path for array in summary.also] == paths
    head = summary.also[-2]
    assert (head.kind, head.shape, head.dtype) == ("Linear", (3, 4), "float32")
    assert (head.rank, head.scale, head.trained, head.frozen) == (None, None, 12, 0)
    assert summary.trained == 16 + 4 * 4 + 12 + 3
    assert summary.trained == sum(x.trained for x in (*summary.targets, *summary.also))
    assert _targets(str(summary)) == [
        ("blocks.*.linear.weight × 2", "16", "32"),
        ("blocks.*.norm.weight × 2", "8", "0"),
        ("blocks.*.norm.bias × 2", "8", "0"),
        ("head.weight", "12", "0"),
        ("head.bias", "3", "0"),
    ]
    assert len(_targets(summary.table(full=True))) == 8
    some = lorax.summary(model, also="head", exclude=["blocks.0", "head.bias"])
    assert [target.trained for target in some.targets] == [0, 8]
    assert [array.path for array in some.also] == ["head.weight"]
    assert some.trained == 8 + 12 and some.frozen == summary.frozen + 8 + 3 + 16


def test_table_of_long_paths_is_not_cut(getkey):
    model = {"a" * 150: eqx.nn.Linear(4, 4, key=getkey())}
    text = str(lorax.summary(lorax.loraify(model, rank=2, key=getkey())))
    assert "a" * 150 + ".weight" in text


def _targets(text):
    """The first column, and the last two."""
    lines = text.splitlines()
    table = lines[2 : next(i for i, x in enumerate(lines) if x.startswith("trained "))]
    return [(line[:40].split("  ")[0], *line.split()[-2:]) for line in table]


def test_numbered_siblings_are_one_line(getkey):
    """Siblings share a line if they agree in all columns; the line has the sums of
    their numbers."""
    blocks = [eqx.nn.MLP(4, 4, 4, 1, key=getkey()) for _ in range(4)]
    model = {"blocks": blocks, "head": eqx.nn.Linear(4, 4, key=getkey())}
    summary = lorax.summary(lorax.loraify(model, rank=2, key=getkey()))
    assert _targets(str(summary)) == [
        ("blocks.*.layers.*.weight × 8", "128", "128"),
        ("head.weight", "16", "16"),
    ]
    full = _targets(summary.table(full=True))
    assert [line[0] for line in full] == [target.path for target in summary.targets]
    assert full[0] == ("blocks.0.layers.0.weight", "16", "16") and len(full) == 9
    assert summary.table() == str(summary)


def test_numbers_that_all_share_are_shown(getkey):
    blocks = [[eqx.nn.Linear(4, 4, key=getkey()) for _ in range(2)] for _ in range(2)]
    summary = lorax.summary(lorax.loraify(blocks, "1.*", rank=2, key=getkey()))
    assert _targets(str(summary))[0][0] == "1.*.weight × 2"


def test_siblings_that_differ_are_told_apart(getkey):
    blocks = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(5)]
    rank = {"0": 1, "3": 1, "*": 2}
    summary = lorax.summary(lorax.loraify(blocks, rank=rank, key=getkey()))
    assert _targets(str(summary)) == [
        ("0.weight and 1 like it", "16", "32"),
        ("1.weight and 2 like it", "48", "48"),
    ]


def test_abstract_and_plain_models(model, getkey):
    abstract = eqx.filter_eval_shape(lambda: model)
    assert lorax.summary(abstract) == lorax.summary(model)
    plain = lorax.summary(lorax.unloraify(model, merge=False))
    assert plain.targets == () and plain.trained == 0


def test_stacked_adapters(model, getkey):
    twice = lorax.loraify(model, rank=1, nested=True, key=getkey())
    summary = lorax.summary(twice)
    assert [target.rank for target in summary.targets] == [1, 1]
    assert summary.trained == 61
    assert [target.frozen for target in summary.targets] == [200, 108]
    assert lorax.summary(model).full_adam_bytes == summary.full_adam_bytes


def test_what_is_on_one_device(getkey):
    mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = [eqx.nn.Linear(16, 8, use_bias=False, key=getkey())]
    model = lorax.loraify(model, rank=2, key=getkey())
    whole = lorax.summary(model)
    assert "device" not in str(whole)
    assert whole.device_trained_bytes == whole.trained_bytes
    assert whole.device_adam_bytes == whole.adam_bytes

    specs = {(8, 16): P("model", "data"), (8, 2): P("model"), (2, 16): P(None, "data")}

    def place(x):
        sharding = NamedSharding(mesh, specs[x.shape])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    summary = lorax.summary(jax.tree.map(place, model))
    assert summary.frozen_bytes == whole.frozen_bytes
    assert summary.device_frozen_bytes == 4 * 8 * 16 // 8
    trained = 4 * (8 * 2 // 4 + 2 * 16 // 2)
    assert summary.device_trained_bytes == trained
    assert summary.device_adam_bytes == 2 * trained + 4
    line = ["frozen", "128", "512", "B", "64", "B", "on", "each", "device"]
    assert line in _lines(summary)

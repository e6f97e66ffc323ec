"""Every method on every format of base: what it computes and trains is what it does on
the dense array that the base stands for, and the bits of the base never change."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from family_table import (
    adapt,
    batched,
    DENSE,
    make_model,
    run_stack,
    TABLE,
    TARGETS,
    train,
    without_adapters,
    X,
)
from helpers import (
    assert_close,
    assert_identical,
    call64,
    equations,
    run,
    weights,
    wide,
)

import eqx_lorax as lorax


class Parts(eqx.Module):
    """A kind of base of another package: a whole part, in few bits, and a rest."""

    whole: jax.Array
    rest: jax.Array

    shape = property(lambda self: self.whole.shape)
    ndim = property(lambda self: self.whole.ndim)
    dtype = property(lambda self: jnp.dtype("float32"))


@lorax.register_base(Parts)
def add_parts(x):
    return x.whole.astype(jnp.float32) + x.rest.astype(jnp.float32)


def divide(w):
    whole = jnp.round(w)
    return Parts(whole.astype(jnp.int8), (w - whole).astype(jnp.bfloat16))


# Blocks divide the rows of tables; elsewhere some go over the ends of rows.
FORMATS = {
    "nf4": dict(format="nf4", block=12),
    "nf4 nested": dict(format="nf4", block=6, nested=True),
    "fp4": dict(format="fp4", block=6),
    "int8": dict(format="int8"),
    "int8-block": dict(format="int8-block", block=6),
    "int4": dict(format="int4", block=12),
    "registered": None,
}


def quantise(model, targets, format):
    """The model on another kind of base."""
    options = FORMATS[format]
    if options is not None:
        return lorax.quantise(model, targets, **options)
    # Without adapters not all of its layers run.
    adapted = lorax.loraify(model, targets, rank=1, key=jr.key(0))
    divided = jax.tree.map(
        lambda x: x.with_base(divide(x.w)) if is_weight(x) else x,
        adapted,
        is_leaf=is_weight,
    )
    return lorax.unloraify(divided, merge=False)


def is_weight(x):
    return isinstance(x, lorax.AbstractLoraWeight)


# What the README's test command takes of the table.
DIAGONAL = dict(
    zip(FORMATS, ["lora", "dora", "pissa", "lokr", "ia3", "tokens", "segments"])
)
CELLS = [
    pytest.param(
        name, format, marks=[] if DIAGONAL[format] == name else [pytest.mark.heavy]
    )
    for name in TABLE
    for format in FORMATS
]


def quickly(*names):
    """All methods, of which the README's test command takes these."""
    marks = {name: [] if name in names else [pytest.mark.heavy] for name in TABLE}
    each = [pytest.param(name, marks=marks[name]) for name in TABLE]
    return pytest.mark.parametrize("name", each)


LINEAR = eqx.nn.Linear(6, 8, key=jr.key(5))
VECTOR = jnp.linspace(-1, 1, 6)


def score(params, frozen, x):
    return jnp.sum(lorax.combine(params, frozen)(x) ** 2)


def score_of_definition(params, frozen, x):
    return jnp.sum(without_adapters(lorax.combine(params, frozen))(x) ** 2)


@pytest.mark.parametrize("name, format", CELLS)
def test_linear_layers(name, format):
    model = quantise(LINEAR, None, format)
    adapted = adapt(name, model, None)
    assert_close(adapted(VECTOR), lorax.dequantise(model)(VECTOR), 1e-6)
    trained = train(adapted)
    assert_identical(lorax.unloraify(trained, merge=False), model)

    twin = lorax.dequantise(trained)
    assert type(twin) is lorax.LoraLinear and eqx.is_array(weights(twin)[0].w)
    parts = lorax.partition(trained)
    found = eqx.filter_jit(jax.value_and_grad(score, (0, 2)))(*parts, VECTOR)
    of_twin = lorax.partition(twin)
    expected = call64(jax.value_and_grad(score_of_definition, (0, 2)), *of_twin, VECTOR)
    assert_close(found, expected, 2e-5)
    assert all(np.any(x) for x in jax.tree.leaves(found))

    merged = lorax.unloraify(trained)
    assert type(merged) is eqx.nn.Linear and merged.weight.dtype == jnp.float32
    assert_close(merged.weight, lorax.unloraify(twin).weight, 1e-6)
    # Nothing but what is trained has slots in an optimizer.
    slots = jax.eval_shape(optax.sgd(1e-3, momentum=0.9).init, parts[0])
    like = [(x.shape, x.dtype) for x in jax.tree.leaves(of_twin[0])]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(slots)] == like
    abstract = adapt(name, eqx.filter_eval_shape(lambda: model), None)
    shapes = [
        [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        for tree in (abstract, adapted)
    ]
    assert shapes[0] == shapes[1]
    if name not in DENSE:
        assert_dense_is_not_kept(*parts)
        fused = lorax.merged_forward(trained)
        assert_dense_is_not_kept(*lorax.partition(fused))


def assert_dense_is_not_kept(params, frozen):
    """Asserts that the backward pass holds no array of floats of the base's size."""
    fn = lambda params, x: lorax.combine(params, frozen)(x)  # noqa: E731
    kept = jax.eval_shape(lambda: jax.vjp(fn, params, VECTOR)[1])
    own = [x.shape for x in jax.tree.leaves(frozen) if eqx.is_array(x)]
    for x in jax.tree.leaves(kept):
        is_own = x.dtype == jnp.bfloat16 and x.shape in own
        assert not jnp.issubdtype(x.dtype, jnp.floating) or x.size < 48 or is_own


@pytest.mark.heavy
@pytest.mark.parametrize("name", TABLE)
def test_every_kind_of_layer(name):
    """A table, a bias, a convolution, a stack in a scan, a module of no kind."""
    format = [*FORMATS][[*TABLE].index(name) % len(FORMATS)]
    targets = [x for x in TARGETS if format != "registered" or x != "table"]
    model, shift = make_model(), 0.1 * jr.normal(jr.key(9), (5, 6))
    options = FORMATS[format]
    if options is not None and "block" in options:
        # No block may go over the ends of a table's rows.
        model = lorax.quantise(model, "table", **options | dict(block=6))
        model = quantise(model, [x for x in targets if x != "table"], format)
    else:
        model = quantise(model, targets, format)
    adapted = adapt(name, model, targets)
    assert len(weights(adapted)) == len(targets)
    plain = lorax.dequantise(model)
    assert_close(run(batched, adapted, X, shift), run(batched, plain, X, shift), 2e-6)
    trained = train(adapted)
    assert_identical(lorax.unloraify(trained, merge=False), model)

    def loss(params, frozen, shift):
        return jnp.sum(batched(lorax.combine(params, frozen), X, shift) ** 2)

    def loss_of_definition(params, frozen, shift):
        plain = without_adapters(lorax.combine(params, frozen))
        return jnp.sum(batched(plain, X, shift) ** 2)

    twin = lorax.dequantise(trained)
    found = eqx.filter_jit(jax.value_and_grad(loss, (0, 2)))(
        *lorax.partition(trained), shift
    )
    expected = call64(
        jax.value_and_grad(loss_of_definition, (0, 2)), *lorax.partition(twin), shift
    )
    assert_close(found, expected, 2e-5)
    merged = lorax.unloraify(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(make_model())
    assert_close(merged, lorax.unloraify(twin), 1e-6)


@quickly("lora", "dora", "vera")
def test_stacks(name):
    """In a scan below `jax.checkpoint` no array of floats is of the stack's size."""
    stack = make_model().layers
    trained = train(adapt(name, quantise(stack, None, "nf4 nested"), None))
    params, frozen = lorax.partition(trained)

    def loss(params, x):
        return jnp.sum(run_stack(lorax.combine(params, frozen), x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, VECTOR)
    trains_whole = name in DENSE
    for equation in equations(jaxpr.jaxpr):
        for out in equation.outvars:
            is_float = jnp.issubdtype(out.aval.dtype, jnp.floating)
            assert trains_whole or not is_float or out.aval.size < stack.weight.size
            # The loop slices the codes, and makes no copy of them.
            is_whole = equation.primitive.name == "scan"
            assert not is_whole or out.aval.dtype != jnp.uint8


@quickly("lora", "dora", "full")
def test_trees_of_parameters(name):
    """The function door, with the kernel `(in, out)` of Flax."""
    tree = {"w": jr.normal(jr.key(0), (4, 6)), "bias": jnp.ones(6)}
    tree = lorax.quantise(tree, block=6)
    options = {"method": "lora", **TABLE[name]}
    rank, alpha = options.pop("rank", 2), options.pop("alpha", None)
    is_stabilised = options.pop("rank_stabilised", False)
    spec = lorax.LoraSpec(rank, alpha=alpha, rank_stabilised=is_stabilised)
    specs = {"w": spec, "bias": lorax.LORA_FREEZE}
    params = lorax.init_lora(tree, specs, jr.key(1), **options)
    x = jr.normal(jr.key(2), (3, 4))
    plain = lambda p, x: x @ p["w"] + p["bias"][None]  # noqa: E731
    fn = lorax.lora(plain, on_materialise="error")
    dense = lorax.dequantise(tree)
    assert_close(fn(params, x), plain(dense, x))
    trained = train(params)
    twin = lorax.dequantise(trained)
    assert_close(fn(trained, x), run(lorax.lora(plain), twin, x))
    merged = lorax.merge_params(trained, destructive=False)
    assert_close(merged, lorax.merge_params(twin), 1e-6)
    assert_identical(lorax.unloraify(trained, merge=False), tree)


# What users do with adapters


def test_weight_decay_changes_no_bits(as_for_users):
    """In `lorax.wrap_optimizer`, which is given the whole parameters."""
    tree = lorax.quantise({"w": jr.normal(jr.key(0), (4, 6))}, block=6, nested=True)
    params = lorax.init_lora(tree, {"w": 2}, jr.key(1))
    optimizer = lorax.wrap_optimizer(optax.adamw(0.1, weight_decay=0.5), {"w": 2})
    state = optimizer.init(params)
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (4, 2), (2, 6)}
    fn = lorax.lora(lambda p, x: jnp.sum((x @ p["w"]) ** 2))
    gradient = jax.grad(lambda part: fn(eqx.combine(part, params), jnp.ones((3, 4))))(
        lorax.split_lora_params(params, {"w": 2})
    )
    updates, _ = optimizer.update(gradient, state, params)
    new: Any = optax.apply_updates(params, updates)
    assert np.any(new["w"].b != params["w"].b)
    assert_identical(lorax.unloraify(new, merge=False), tree)


@quickly("lora", "dora")
def test_adapters_move_between_a_quantised_model_and_its_twin(name):
    model = quantise(LINEAR, None, "nf4 nested")
    trained = train(adapt(name, model, None))
    twin = lorax.dequantise(trained)
    (params, frozen), (of_twin, frozen_twin) = map(lorax.partition, (trained, twin))
    assert_identical(lorax.combine(params, frozen_twin), twin)
    assert_identical(lorax.combine(of_twin, frozen), trained)
    assert_identical(lorax.attach(twin, params), twin)
    assert_identical(lorax.attach(trained, of_twin), trained)
    bank = lorax.AdapterBank([params, of_twin])
    for index in (0, jnp.asarray(1)):
        found = lorax.combine(bank[index], frozen)(VECTOR)
        assert_close(found, twin(VECTOR), 1e-6)
    assert lorax.summary(trained).trained == lorax.summary(twin).trained
    assert lorax.summary(trained).frozen == lorax.summary(twin).frozen
    assert lorax.summary(trained).frozen_bytes < lorax.summary(twin).frozen_bytes
    assert str(lorax.spectra(trained)) == str(lorax.spectra(twin))
    plain, plain_twin = (lorax.as_lora(x, rank=6) for x in (trained, twin))
    assert_close(plain.weight.materialise(), plain_twin.weight.materialise())
    assert_identical(plain.weight.w, trained.weight.w)
    over = lorax.loraify(trained, nested=True, rank=2, key=jr.key(7))
    assert_close(over(VECTOR), twin(VECTOR), 1e-6)


def test_a_base_of_another_shape():
    params, _ = lorax.partition(train(adapt("lora", LINEAR, None)))
    wide_layer = eqx.nn.Linear(12, 8, key=jr.key(0))
    _, frozen = lorax.partition(adapt("lora", quantise(wide_layer, None, "nf4"), None))
    with pytest.raises(ValueError, match="`in_features` is 6"):
        lorax.combine(params, frozen)


def test_files_know_which_base_is_quantised(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = quantise(LINEAR, None, "nf4 nested")
    trained = train(adapt("lora", model, None))
    lorax.save_adapter(path, trained)
    assert_identical(lorax.load_adapter(path, model), trained)
    assert lorax.adapter_info(path)["base"]["weight"].startswith("nf4 ")
    others = {
        "nf4 when the adapter was trained, not quantised in": LINEAR,
        "nf4 when the adapter was trained, fp4 in": quantise(LINEAR, None, "fp4"),
        "quantised as nf4 both times": lorax.quantise(LINEAR, block=6),
    }
    for message, other in others.items():
        with pytest.raises(lorax.AdapterFileError, match=message):
            lorax.load_adapter(path, other)
        loaded = lorax.load_adapter(path, other, allow_other_base=True)
        assert_close(loaded(VECTOR), trained(VECTOR), 0.2)
    # The same codes, with another meaning.
    codes = model.weight
    fp4 = quantise(LINEAR, None, "fp4").weight.format
    other = eqx.tree_at(lambda x: x.weight, model, codes.replace(format=fp4))
    with pytest.raises(lorax.AdapterFileError, match="fp4 in `model`"):
        lorax.load_adapter(path, other)


@pytest.mark.parametrize("donate", [False, True])
def test_tied_embeddings(donate):
    class Model(eqx.Module):
        embedding: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __call__(self, x):
            return self.head(self.embedding(x))

    model = eqx.nn.Shared(
        Model(
            eqx.nn.Embedding(8, 6, key=jr.key(0)),
            eqx.nn.Linear(6, 8, use_bias=False, key=jr.key(1)),
        ),
        lambda model: model.head.weight,
        lambda model: model.embedding.weight,
    )
    quantised = quantise(model, "embedding", "nf4 nested")
    adapted = lorax.loraify(quantised, "embedding", rank=2, key=jr.key(0))
    assert_close(adapted()(3), quantised()(3), 1e-6)
    trained = train(adapted)
    twin = lorax.dequantise(trained)
    assert_close(trained()(3), twin()(3), 1e-6)
    assert_close(lorax.unloraify(trained, donate=donate)()(3), twin()(3), 1e-6)


def test_experts():
    """A raw array of a module, with a batch axis that a product has too."""

    class Experts(eqx.Module):
        up: jax.Array

        def __call__(self, x):
            return jnp.einsum("eoi,i->eo", self.up, x)

    model = Experts(jr.normal(jr.key(0), (3, 8, 6)))
    quantised = quantise(model, "up", "int8")
    trained = train(lorax.loraify(quantised, "up", rank=2, key=jr.key(1)))
    twin = lorax.dequantise(trained)
    assert_close(run(trained, VECTOR), run(twin, VECTOR), 1e-6)
    assert_close(lorax.unloraify(trained).up, lorax.unloraify(twin).up, 1e-6)
    assert_identical(lorax.unloraify(trained, merge=False), quantised)


@pytest.mark.parametrize("fused", [False, True])
def test_dropout(fused):
    model = quantise(LINEAR, None, "nf4")
    trained = train(lorax.loraify(model, rank=2, dropout=0.5, key=jr.key(1)))
    twin = lorax.dequantise(trained)
    if fused:
        trained = lorax.merged_forward(trained)
    found = trained(VECTOR, key=jr.key(2))
    assert_close(found, twin(VECTOR, key=jr.key(2)), 1e-6)


def test_calibration():
    model = quantise(LINEAR, None, "nf4")
    twin = lorax.dequantise(model)
    batches = [np.asarray(jr.normal(jr.key(i), (8, 6))) for i in range(2)]

    def adapt_to_data(model, find_start):
        loss = lambda model, batch: jnp.mean(jax.vmap(model)(batch) ** 2)  # noqa: E731
        found = lorax.calibrate(loss, model, batches, rank=2, key=jr.key(0))
        return lorax.loraify(model, rank=2, init=find_start(found), key=jr.key(1))

    for find_start in (
        lambda found: found.eva(),
        lambda found: found.corda("ipm"),
        lambda found: found.lora_ga(),
    ):
        adapted, of_twin = (adapt_to_data(x, find_start) for x in (model, twin))
        assert_close(adapted(VECTOR), model(VECTOR), 1e-6)
        products = [
            np.abs(wide(x.weight.b) @ wide(x.weight.a)) for x in (adapted, of_twin)
        ]
        assert_close(*products, 1e-4)


# What users get wrong


@pytest.mark.own_errors
def test_errors_end_with_the_fix():
    mlp = eqx.nn.MLP(6, 6, 6, 1, key=jr.key(0))
    model = quantise(
        lorax.loraify(mlp, "layers.0", rank=2, key=jr.key(1)), None, "int8"
    )
    for also in ("layers.1", "layers.1.weight"):
        with pytest.raises(ValueError, match="layers.1.weight, which is quantised"):
            lorax.partition(model, also)
    params, _ = lorax.partition(model, "layers.1", exclude="layers.1.weight")
    assert [x.shape for x in jax.tree.leaves(params)] == [(6, 2), (2, 6), (6,)]
    tree = lorax.quantise({"w": jr.normal(jr.key(0), (4, 6))}, block=6)
    with pytest.raises(ValueError, match="LORA_FULL` at w, which is quantised"):
        lorax.init_lora(tree, {"w": lorax.LORA_FULL}, jr.key(0))
    optimizer = lorax.wrap_optimizer(optax.sgd(1e-3), {"w": lorax.LORA_FULL})
    with pytest.raises(ValueError, match="LORA_FULL` at w, which is quantised"):
        optimizer.init(tree)
    table = eqx.nn.Embedding(10, 6, key=jr.key(0))
    with pytest.raises(ValueError, match="rows are looked up in it. Pass `block=6`"):
        lorax.quantise([table], "0", block=12)
    straddling = lorax.quantise({"w": table.weight}, block=12)["w"]
    with pytest.raises(TypeError, match="cannot be indexed.*`block`"):
        straddling[3]
    adapted = lorax.init_lora(straddling, 2, jr.key(0))
    with pytest.raises(TypeError, match="cannot be indexed.*`block`"):
        adapted[jnp.asarray([3])]

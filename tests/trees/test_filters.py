"""What each kind of filter selects, and the errors when it selects nothing."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from cases import OwnLinear, SubLinear
from helpers import weights

import eqx_lorax as lorax


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: list

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[0])
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = [
            eqx.nn.Linear(4, 8, key=keys[1]),
            jax.nn.relu,
            eqx.nn.Linear(8, 4, key=keys[2]),
        ]


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    cell: eqx.nn.GRUCell
    own: OwnLinear
    sub: SubLinear
    heads: dict
    name: str
    position_ids: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 8)
        self.embed = eqx.nn.Embedding(6, 4, key=keys[0])
        self.blocks = [Block(keys[1]), Block(keys[2])]
        self.cell = eqx.nn.GRUCell(4, 4, key=keys[3])
        self.own = OwnLinear(4, 4, key=keys[4])
        self.sub = SubLinear(4, 4, key=keys[5])
        self.heads = {
            "a": eqx.nn.Linear(4, 4, key=keys[6]),
            "b.c": eqx.nn.Linear(4, 4, key=keys[7]),
        }
        self.position_ids = jnp.arange(6)[None]
        self.name = "model"


ATTENTION = ("query_proj", "key_proj", "value_proj", "output_proj")
BLOCK = [
    f"blocks.{i}.{name}"
    for i in range(2)
    for name in (*(f"attention.{x}" for x in ATTENTION), "mlp.0", "mlp.2")
]
BLOCK0 = BLOCK[: len(BLOCK) // 2]
HEADS = ["heads.a", "heads.b.c"]
REST = [*BLOCK[len(BLOCK) // 2 :], "sub", *HEADS]


@pytest.fixture(scope="module")
def model():
    return Model(jax.random.key(0))


def adapted(model, filter, **options):
    options = {"rank": 2, "key": jax.random.key(1), **options}
    model = lorax.loraify(model, filter, **options)
    paths = [target.path for target in lorax.summary(model).targets]
    return [path.removesuffix(".weight") for path in paths]


def _spec(model, *wheres):
    spec = jax.tree.map(lambda _: False, model)
    for where in wheres:
        spec = eqx.tree_at(where, spec, True)
    return spec


FILTERS = {
    "none": (None, [*BLOCK, "sub", *HEADS]),
    "bare name": ("query_proj", [x for x in BLOCK if x.endswith("query_proj")]),
    "bare glob": ("*_proj", [x for x in BLOCK if x.endswith("_proj")]),
    "list": (
        ["query_proj", "heads.a"],
        [x for x in BLOCK if x.endswith("query_proj")] + HEADS[:1],
    ),
    "tuple": (("heads.a",), HEADS[:1]),
    "set": ({"heads.a"}, HEADS[:1]),
    "full path": ("blocks.0.mlp.2", ["blocks.0.mlp.2"]),
    "wildcard": ("blocks.*.mlp.0", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
    "any depth": ("**.mlp.0", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
    "character class": ("blocks.[1-9].mlp.2", ["blocks.1.mlp.2"]),
    "container": ("blocks.0", BLOCK0),
    "container by name": ("attention", [x for x in BLOCK if "attention" in x]),
    "regex": (re.compile(r"blocks\.\d\.mlp\.2"), ["blocks.0.mlp.2", "blocks.1.mlp.2"]),
    "regex is full": (re.compile(r"heads\.."), HEADS[:1]),
    "regex on an array": (re.compile("cell.*_hh"), ["cell.weight_hh"]),
    "regex on arrays and layers": (
        re.compile("(heads|own).*"),
        ["own.kernel", *HEADS],
    ),
    # Containers match these too, but are not selected.
    "regex but a container": (re.compile(r"(?!blocks\.0|cell|own|embed).+"), REST),
    "regex but layers": (
        re.compile(r"blocks\.(?!.*(attention|mlp\.0)).+"),
        ["blocks.0.mlp.2", "blocks.1.mlp.2"],
    ),
    "key with a dot": ("heads.b.c", HEADS[1:]),
    "embedding": ("embed", ["embed"]),
    "weight of a layer": ("heads.a.weight", HEADS[:1]),
    "array": ("cell.weight_hh", ["cell.weight_hh"]),
    "arrays": ("cell.*", ["cell.weight_ih", "cell.weight_hh"]),
    "array by name": ("kernel", ["own.kernel"]),
    "subclass": ("sub", ["sub"]),
    "type": (eqx.nn.MultiheadAttention, [x for x in BLOCK if "attention" in x]),
    "types": ([eqx.nn.Embedding, SubLinear], ["embed", "sub"]),
    "predicate": (lambda x: isinstance(x, eqx.nn.Linear), [*BLOCK, "sub", *HEADS]),
    "predicate on values": (
        lambda x: type(x) is eqx.nn.Linear and x.out_features == 8,
        ["blocks.0.mlp.0", "blocks.1.mlp.0"],
    ),
    "true": (True, [*BLOCK, "sub", *HEADS]),
    "spec of a leaf": (
        lambda m: _spec(m, lambda m: m.heads["a"].weight),
        HEADS[:1],
    ),
    "spec of leaves": (
        lambda m: _spec(
            m,
            lambda m: m.own.kernel,
            lambda m: m.heads["a"].weight,
            lambda m: m.heads["a"].bias,
        ),
        ["own.kernel", *HEADS[:1]],
    ),
    "spec prefix": (lambda m: _spec(m, lambda m: m.blocks[0]), BLOCK0),
    "spec with a predicate": (
        lambda m: eqx.tree_at(
            lambda m: m.blocks,
            _spec(m),
            lambda x: isinstance(x, eqx.nn.Linear) and x.out_features == 8,
        ),
        ["blocks.0.mlp.0", "blocks.1.mlp.0"],
    ),
    "spec of matrices in linear layers": (
        lambda m: eqx.tree_at(
            lambda m: m.heads,
            _spec(m),
            jax.tree.map(lambda x: eqx.is_array(x) and x.ndim == 2, m.heads),
        ),
        HEADS,
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_selects(name, model):
    filter, expected = FILTERS[name]
    if name.startswith("spec"):
        filter = filter(model)
    assert adapted(model, filter) == expected


UNMATCHED = {
    "typo": ("query_prj", "Did you mean 'query_proj'"),
    "one of a list": (["query_proj", "keyy_proj"], "'keyy_proj'.*mean 'key_proj'"),
    "part of a name": ("proj", "matched nothing"),
    "not from the root": ("attention.query_proj", r"'\*\*\.attention.query_proj'"),
    "typo in a path": ("blocks.0.mpl.2", "Did you mean 'blocks.0.mlp.2'"),
    "index": ("blocks.2", r"Available: .*blocks\.\*\.mlp\.\*\.weight \(8, 4\) or"),
    "regex of a part": (re.compile("query"), "matched nothing"),
    "regex of a container": (
        re.compile(r"blocks\.0"),
        r"not that of a container. 'blocks\\.0\\..\*' matches what is beneath",
    ),
    "regex of a module of arrays": (
        re.compile("cell"),
        r"Name them: 'cell.weight_ih' \(12, 4\)",
    ),
    "PEFT's word": ("all-linear", "PEFT's word: here `filter=None` adapts all"),
    "PEFT's word in a list": (["all-linear"], "PEFT's word"),
    "empty string": ("", "matched nothing"),
    "empty list": ([], "empty"),
    "vector": ("norm", "LayerNorm without a matrix"),
    "vectors": ("bias", r"vector \(4,\).*`also`"),
    "scalar leaf": ("name", "cannot be adapted"),
    "integers": ("position_ids", "of dtype int32"),
    "which array": ("cell", r"Name them: 'cell.weight_ih' \(12, 4\)"),
    "which array, predicate": (
        lambda x: isinstance(x, eqx.nn.GRUCell),
        "'cell.weight_hh'",
    ),
    "predicate on arrays": (eqx.is_array, "sees the modules, not the arrays"),
    "type": (eqx.nn.Conv2d, "Conv2d.*matched nothing"),
    "all false": (lambda m: _spec(m), "marks nothing"),
    "false": (False, "marks nothing"),
    "spec of a vector": (
        lambda m: _spec(m, lambda m: m.blocks[0].norm, lambda m: m.heads["a"]),
        r"blocks\.0\.norm is a LayerNorm",
    ),
    "spec of a lone bias": (lambda m: _spec(m, lambda m: m.heads["a"].bias), "vector"),
    "spec that does not fit": (
        lambda m: eqx.tree_at(lambda m: m.heads, _spec(m), {"a": True}),
        "does not fit the model: at heads it has a dict",
    ),
    "spec of another model": ({"a": True}, "at the root it has a dict"),
}


@pytest.mark.own_errors
@pytest.mark.parametrize("name", UNMATCHED)
def test_says_what_did_not_match(name, model):
    filter, message = UNMATCHED[name]
    if (
        "false" in name
        and callable(filter)
        or name.startswith("spec")
        and callable(filter)
    ):
        filter = filter(model)
    with pytest.raises(ValueError, match=message):
        adapted(model, filter)


EXCLUDED = {
    "name": (None, "sub", BLOCK + HEADS),
    "container": (None, "blocks", ["sub", *HEADS]),
    "list": (None, ["blocks.0", "heads", "mlp"], [*BLOCK[6:10], "sub"]),
    "regex": (None, re.compile(r".*_proj|sub"), [*BLOCK[4:6], *BLOCK[10:], *HEADS]),
    "array": (None, "heads.a.weight", [*BLOCK, "sub", *HEADS[1:]]),
    "array of a module": ("cell.*", "weight_ih", ["cell.weight_hh"]),
    "array of a module of arrays": (["cell.*", "sub"], re.compile("cell"), ["sub"]),
    "type": (None, SubLinear, BLOCK + HEADS),
    "types": (
        None,
        [SubLinear, eqx.nn.MultiheadAttention],
        [*BLOCK[4:6], *BLOCK[10:], *HEADS],
    ),
    "predicate": (
        "blocks.1",
        lambda x: isinstance(x, eqx.nn.Linear) and x.out_features == 8,
        [x for x in BLOCK[6:] if x != "blocks.1.mlp.0"],
    ),
    "spec": (None, lambda m: _spec(m, lambda m: m.blocks), ["sub", *HEADS]),
    "of what no name covers": (["embed", "heads"], "embed", HEADS),
    # A container whose arrays were ambiguous.
    "the module whose arrays were not said": ([eqx.nn.GRUCell, "sub"], "cell", ["sub"]),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_excludes(name, model):
    filter, exclude, expected = EXCLUDED[name]
    if name == "spec":
        exclude = exclude(model)
    assert adapted(model, filter, exclude=exclude) == expected


NOT_EXCLUDED = {
    "typo": (None, "subb", "`exclude='subb'` matched nothing. Did you mean 'sub'"),
    "not chosen": ("heads", "sub", "excludes nothing: what it names, sub, was not.*a"),
    "one of a list": (None, ["sub", "embed"], "`exclude='embed'` excludes nothing"),
    "a vector": (None, "heads.a.bias", "excludes nothing"),
    "a container, by regex": (None, re.compile("blocks"), "not that of a container"),
    "empty": (None, [], "names nothing: it is empty"),
    "no place": (None, eqx.nn.Conv2d, "Conv2d` matched nothing"),
    "all": ("heads", "heads", "leaves nothing of what was chosen: heads.a.weight"),
}


@pytest.mark.own_errors
@pytest.mark.parametrize("name", NOT_EXCLUDED)
def test_says_what_was_not_excluded(name, model):
    filter, exclude, message = NOT_EXCLUDED[name]
    with pytest.raises(ValueError, match=message):
        adapted(model, filter, exclude=exclude)


def test_only_what_can_be_adapted_is_available(model):
    with pytest.raises(ValueError, match="Available") as error:
        adapted(model, "nothing")
    listed = str(error.value).split("Available: ")[1]
    assert "cell.weight_hh (12, 4)" in listed and "embed.weight" in listed
    assert "position_ids" not in listed and "bias" not in listed


class Computed(eqx.Module):
    """Acts as an array, which it computes on request."""

    held: jax.Array

    def __jax_array__(self):
        return 2 * self.held


def _without_weights():
    keys = jax.random.split(jax.random.key(0), 6)
    linear = lambda i, *shape: eqx.nn.Linear(*(shape or (4, 4)), key=keys[i])  # noqa: E731
    where = lambda linear: linear.weight  # noqa: E731
    return {
        "plain": linear(0),
        "none": eqx.tree_at(where, linear(1), None),
        "computed": eqx.tree_at(where, linear(2), replace_fn=Computed),
        "inputs": linear(3, 0, 4),
        "outputs": linear(4, 4, 0),
        "text": eqx.tree_at(where, linear(5), "not an array"),
    }


UNFIT = {
    "none": "none has no `weight`",
    "computed": "computed.weight is not an array but a Computed: it holds compu.*held",
    "inputs": r"inputs.weight has shape \(4, 0\): a layer without inputs",
    "outputs": r"outputs.weight has shape \(0, 4\): a layer without",
    "text": "text.weight is not an array but a str: not adaptable",
}


@pytest.mark.own_errors  # The check adds frames to the stack.
def test_passes_over_what_has_no_weight():
    model = _without_weights()
    with pytest.warns(UserWarning, match="Not adapted: ") as caught:
        assert adapted(model, None) == ["plain"]
    assert caught[0].filename == __file__
    for message in UNFIT.values():
        assert re.search(message, str(caught[0].message))
    # There is no warning for layers that are excluded explicitly.
    assert adapted(model, None, exclude=list(UNFIT)) == ["plain"]


@pytest.mark.own_errors
@pytest.mark.parametrize("name", UNFIT)
def test_naming_what_has_no_weight(name):
    model = _without_weights()
    with pytest.raises(ValueError, match=UNFIT[name]):
        adapted(model, ["plain", name])
    del model["plain"]
    with pytest.raises(ValueError, match=f"nothing to adapt.*{UNFIT[name]}"):
        adapted({name: model[name]}, None)


def test_the_array_that_a_weight_is_computed_from(getkey):
    linear = _without_weights()["computed"]
    layer = lorax.loraify(
        {"a": linear}, "a.weight.held", rank=2, alpha=6, key=jax.random.key(0)
    )["a"]
    assert type(layer) is lorax.LoraModule and isinstance(layer, eqx.nn.Linear)
    (weight,) = weights(layer)
    layer = eqx.tree_at(lambda x: x.weight.held.b, layer, jnp.ones((4, 2)))
    x = jnp.arange(4.0)
    dense = 2 * (weight.w + 3 * jnp.ones((4, 2)) @ weight.a)
    assert jnp.allclose(layer(x), dense @ x + linear.bias, atol=1e-5)
    assert jax.tree.structure(lorax.unloraify(layer)) == jax.tree.structure(linear)


@pytest.mark.own_errors
@pytest.mark.parametrize("filter", (3, 1.5, object()))
def test_not_a_filter(filter, model):
    with pytest.raises(TypeError, match="is not a filter"):
        adapted(model, filter)


def test_nothing_to_adapt_by_default():
    with pytest.raises(ValueError, match="Name what to adapt: weight_ih"):
        lorax.loraify(
            eqx.nn.GRUCell(2, 3, key=jax.random.key(0)), key=jax.random.key(0)
        )
    with pytest.raises(ValueError, match="no array in this model that could be"):
        lorax.loraify(eqx.nn.LayerNorm(3), key=jax.random.key(0))


def test_arrays_outside_modules(model):
    key, w = jax.random.key(0), jnp.ones((3, 4))
    for filter in (None, "w"):
        with pytest.raises(ValueError, match="`lorax.init_lora"):
            lorax.loraify({"w": w}, filter, rank=1, key=key)
    with pytest.raises(ValueError, match="not an array of an `eqx.Module`"):
        lorax.loraify({"w": w, "model": model}, "w", rank=1, key=key)


def test_the_same_target_twice_is_one(model):
    assert adapted(model, ["heads.a", "heads", "a"]) == HEADS


def test_specs_fit_adapted_models_too(model):
    once = lorax.loraify(model, "heads.a", rank=2, key=jax.random.key(0))
    spec = _spec(once, lambda m: m.heads["b.c"].weight)
    twice = lorax.loraify(once, spec, rank=2, key=jax.random.key(1))
    assert len(weights(twice)) == 2


OPTIONS = {
    "one": (3, [3, 3, 3, 3]),
    "mapping": ({"query_proj": 1, "attention": 2}, [1, 2, 2, 2]),
    "first counts": ({"query_proj": 1, "*": 3}, [1, 3, 3, 3]),
    "regex": ({re.compile(".*(key|value)_proj"): 1, "*": 2}, [2, 1, 1, 2]),
    "regex on the array": ({re.compile(".*key_proj.weight"): 1, "*": 2}, [2, 1, 2, 2]),
    "regex but one": ({re.compile("(?!.*key_proj).+"): 1, "*": 2}, [1, 2, 1, 1]),
    "path": ({"blocks.0.attention.key_proj": 1, "blocks": 4}, [4, 1, 4, 4]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_per_target(name, model):
    option, expected = OPTIONS[name]
    key = jax.random.key(0)
    where = "blocks.0.attention"
    by_rank = weights(lorax.loraify(model, where, rank=option, key=key))
    assert [x.rank for x in by_rank] == expected
    by_alpha = weights(lorax.loraify(model, where, alpha=option, rank=2, key=key))
    assert [x.alpha for x in by_alpha] == expected


def test_options_default_where_nothing_matches():
    model = eqx.nn.MLP(16, 16, 16, 1, key=jax.random.key(0))
    key = jax.random.key(0)
    some = lorax.loraify(
        model,
        rank={"layers.1": 2},
        alpha={"layers.1": 4},
        dropout={"layers.0": 0.1},
        key=key,
    )
    assert [x.rank for x in weights(some)] == [8, 2]
    assert [x.scale for x in weights(some)] == [1, 2]
    assert [layer.dropout and layer.dropout.p for layer in some.layers] == [0.1, None]


@pytest.mark.own_errors
def test_options_that_match_nothing(model):
    key = jax.random.key(0)
    for name in ("rank", "alpha", "dropout"):
        with pytest.raises(ValueError, match=f"`{name}='queryy'`.*'blocks|heads"):
            lorax.loraify(model, "heads", **{name: {"queryy": 0.5, "*": 2}}, key=key)
        with pytest.raises(ValueError, match="put the general ones last"):
            lorax.loraify(model, "heads", **{name: {"*": 1, "a": 1}}, key=key)
        # Around the targets.
        regex = {re.compile("heads"): 0.5, "*": 2}
        with pytest.raises(ValueError, match="'heads'` matched nothing"):
            lorax.loraify(model, "heads", **{name: regex}, key=key)
        # In the model, but not a target.
        with pytest.raises(ValueError, match="It has to match a target"):
            lorax.loraify(model, "heads", **{name: {"mlp": 1}}, key=key)

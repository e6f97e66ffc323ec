"""PEFT's format with the real PEFT, on PyTorch: adapters trained here give the same
outputs there, and the reverse."""

import json
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import tiny_llama
from helpers import trained
from peft_helpers import (
    AGAINST_PEFT,
    by_peft,
    filled_from,
    in_peft,
    llama_pair,
    numpy,
    ours_on,
    tensor,
    through_layers,
)
from running import running
from safetensors.numpy import load_file

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT


# Each kind of layer


def make_theirs():
    import torch
    from torch import nn

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.layer = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
            self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
            self.grouped = nn.Conv1d(8, 4, 3, padding=1, groups=2)
            self.classifier = nn.Linear(4, 3)

        def forward(self, tokens):
            x = self.words(tokens)
            for layer in self.layer:
                x = torch.tanh(layer(x))
            x = self.grouped(self.conv(x.transpose(1, 2)))
            return self.classifier(x.mean(-1))

    torch.manual_seed(0)
    return Theirs()


class Ours(eqx.Module):
    words: eqx.nn.Embedding
    layers: eqx.nn.Linear
    conv: eqx.nn.Conv1d
    grouped: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 5)
        make = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))
        self.words = eqx.nn.Embedding(11, 6, key=keys[0])
        self.layers = make(jr.split(keys[1], 3))
        self.conv = eqx.nn.Conv1d(6, 8, 3, padding=1, stride=2, key=keys[2])
        self.grouped = eqx.nn.Conv1d(8, 4, 3, padding=1, groups=2, key=keys[3])
        self.head = eqx.nn.Linear(4, 3, key=keys[4])

    def __call__(self, tokens):
        x = through_layers(self.layers, jnp.tanh, jax.vmap(self.words)(tokens))
        return self.head(self.grouped(self.conv(x.T)).mean(-1))


NAMES = {
    "words": "words",
    "layers": "layer.{}",
    "conv": "conv",
    "grouped": "grouped",
    "head": "classifier",
}
TOKENS = np.random.default_rng(0).integers(0, 11, (5, 8))


@pytest.fixture
def pair(getkey):
    theirs = make_theirs()
    named = dict(theirs.named_parameters())
    return filled_from(Ours(getkey()), named, NAMES), theirs


@pytest.mark.parametrize("options", [{}, {"rank_stabilised": True}], ids=str)
def test_every_kind_of_layer_to_peft(pair, options, tmp_path, getkey):
    ours, theirs = pair
    adapted = lorax.loraify(
        ours,
        ["words", "layers", "conv", "grouped"],
        rank={"layers": 3, "*": 2},
        alpha={"words": 5, "layers": 4.5},
        key=getkey(),
        **options,
    )
    adapted = trained(adapted)
    adapted = eqx.tree_at(lambda m: m.head.weight, adapted, jnp.ones((3, 4)))
    lorax.peft.save(tmp_path, adapted, names=NAMES, also="head")
    found = numpy(in_peft(theirs, tmp_path)(tensor(TOKENS)))
    np.testing.assert_allclose(ours_on(adapted, TOKENS), found, atol=1e-5)
    assert np.abs(ours_on(ours, TOKENS) - found).max() > 0.1


@pytest.mark.parametrize("stabilised", (False, True))
def test_every_kind_of_layer_from_peft(pair, stabilised, tmp_path):
    ours, theirs = pair
    model = by_peft(
        theirs,
        tmp_path,
        r=4,
        lora_alpha=7,
        target_modules=["words", "layer.0", "layer.1", "layer.2", "conv"],
        modules_to_save=["classifier"],
        rank_pattern={"conv": 2},
        alpha_pattern={"words": 3},
        use_rslora=stabilised,
    )
    loaded = lorax.peft.load(tmp_path, ours, names=NAMES)
    expected = numpy(model(tensor(TOKENS)))
    np.testing.assert_allclose(ours_on(loaded, TOKENS), expected, atol=1e-5)
    assert np.abs(ours_on(ours, TOKENS) - expected).max() > 0.1


def test_groups_of_peft_that_no_kernel_has(pair, tmp_path):
    ours, theirs = pair
    by_peft(theirs, tmp_path, r=4, target_modules=["grouped"])
    with pytest.raises(lorax.AdapterFileError, match="grouped.*each other's inputs"):
        lorax.peft.load(tmp_path, ours, names=NAMES)


# Experts


class OurExperts(eqx.Module):
    up: jax.Array
    down: jax.Array
    is_in_out: bool

    def __call__(self, x):
        axes = "eio" if self.is_in_out else "eoi"
        hidden = jnp.einsum(f"{axes},i->eo", self.up, x)
        return jnp.einsum(f"{axes},ei->o", self.down, jnp.tanh(hidden))


def experts(*, square=False, here=False, there=False, order=("up", "down")):
    """The same experts twice. `here` and `there` say which are stored `(e, in, out)`,
    and `order` is the order in which the PyTorch module defines them."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.is_transposed = there
            for name in order:
                sides = {"up": (5, 4), "down": (4, 5)}[name] if not square else (4, 4)
                sides = sides[::-1] if there else sides
                self.register_parameter(name, nn.Parameter(torch.randn(3, *sides)))

        def forward(self, x):
            axes = "eio" if there else "eoi"
            hidden = torch.einsum(f"{axes},bi->ebo", self.up, x)
            return torch.einsum(f"{axes},ebi->bo", self.down, torch.tanh(hidden))

    torch.manual_seed(0)
    theirs = nn.Sequential(Experts())
    up, down = (jnp.asarray(numpy(getattr(theirs[0], x))) for x in ("up", "down"))
    if here is not there:
        up, down = up.mT, down.mT
    return [OurExperts(up, down, here)], theirs


EXPERTS = {"0.up": "0.up", "0.down": "0.down"}
INPUTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
ORDERS_OF_SIDES = [
    dict(square=square, here=here, there=there)
    for square in (False, True)
    for here in (False, True)
    for there in (False, True)
]


@pytest.mark.parametrize("targets", (["up"], ["up", "down"]))
def test_experts_to_peft(targets, tmp_path, getkey):
    ours, theirs = experts()
    adapted = trained(lorax.loraify(ours, targets, rank=2, alpha=3, key=getkey()))
    lorax.peft.save(tmp_path, adapted, names=EXPERTS)
    expected = numpy(in_peft(theirs, tmp_path)(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(adapted[0])(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("targets", (["up"], ["up", "down"]))
def test_experts_from_peft(targets, tmp_path):
    ours, theirs = experts()
    model = by_peft(theirs, tmp_path, r=2, lora_alpha=5, **parameters(targets))
    loaded = lorax.peft.load(tmp_path, ours, names=EXPERTS)
    expected = numpy(model(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(loaded[0])(INPUTS), expected, atol=1e-5)


def parameters(targets):
    names = [f"0.{name}" for name in targets]
    return dict(target_modules=[], target_parameters=names)


def said(options):
    """The arguments that are needed because the file is ambiguous."""
    return dict(
        transposed=["up", "down"] if options["here"] else None,
        parameter_order=["up", "down"] if options["square"] else None,
    )


@pytest.mark.parametrize("options", ORDERS_OF_SIDES, ids=str)
def test_sides_of_experts_to_peft(options, tmp_path, getkey):
    ours, theirs = experts(**options)
    rank = lorax.LoraSpec(2, rows=(1,), columns=(2,), batch=(0,))
    adapted = trained(lorax.loraify(ours, ["up", "down"], rank=rank, key=getkey()))
    lorax.peft.save(tmp_path, adapted, names=EXPERTS, **said(options))
    expected = numpy(in_peft(theirs, tmp_path)(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(adapted[0])(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("options", ORDERS_OF_SIDES, ids=str)
def test_sides_of_experts_from_peft(options, tmp_path):
    ours, theirs = experts(**options)
    model = by_peft(theirs, tmp_path, r=2, **parameters(["up", "down"]))
    loaded = lorax.peft.load(tmp_path, ours, names=EXPERTS, **said(options))
    expected = numpy(model(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(loaded[0])(INPUTS), expected, atol=1e-5)


# Square experts with another layout here cannot be detected.
@pytest.mark.parametrize(
    "options",
    [x for x in ORDERS_OF_SIDES if not x["square"] or x["here"] == x["there"]],
    ids=str,
)
def test_experts_from_before_0_19(options, tmp_path):
    ours, theirs = experts(**options)
    # Every module was like this then: `A` belongs to the first stored axis.
    theirs[0].is_transposed = True
    model = by_peft(theirs, tmp_path, r=2, **parameters(["up", "down"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"peft_version": "0.18.1"})
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # With another layout there, the two could be confused.
        said_of_old = said(options) | dict(parameter_order=["up", "down"])
        loaded = lorax.peft.load(tmp_path, ours, names=EXPERTS, **said_of_old)
    has_warned = any("before PEFT 0.19" in str(x.message) for x in caught)
    assert has_warned == options["square"]
    expected = numpy(model(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(loaded[0])(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("order", (["up", "down"], ["down", "up"]))
def test_ranks_tell_parameters_apart(order, tmp_path):
    ours, theirs = experts(square=True, order=order)
    options = dict(r=2, rank_pattern={"0.up": 3})
    model = by_peft(theirs, tmp_path, **options, **parameters(order))
    loaded = lorax.peft.load(tmp_path, ours, names=EXPERTS)
    expected = numpy(model(tensor(INPUTS)))
    np.testing.assert_allclose(jax.vmap(loaded[0])(INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("square", (False, True))
@pytest.mark.parametrize("listed", (["up", "down"], ["down", "up"]))
@pytest.mark.parametrize("order", (["up", "down"], ["down", "up"]))
def test_order_of_parameters(square, listed, order, tmp_path):
    ours, theirs = experts(square=square, order=order)
    model = by_peft(theirs, tmp_path / "theirs", r=2, **parameters(listed))
    expected = numpy(model(tensor(INPUTS)))
    theirs = model.unload()
    said = dict(parameter_order=order) if square else {}
    loaded = lorax.peft.load(tmp_path / "theirs", ours, names=EXPERTS, **said)
    np.testing.assert_allclose(jax.vmap(loaded[0])(INPUTS), expected, atol=1e-5)
    if square:
        with pytest.raises(lorax.AdapterFileError, match="parameters up, down.*order="):
            lorax.peft.load(tmp_path / "theirs", ours, names=EXPERTS)
        with pytest.raises(ValueError, match="cannot tell the adapters of 0.up"):
            lorax.peft.save(tmp_path / "ours", loaded, names=EXPERTS)
    folder = tmp_path / "ours"
    lorax.peft.save(folder, loaded, names=EXPERTS, parameter_order=order)
    found = numpy(in_peft(theirs, folder)(tensor(INPUTS)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Arguments of saving are not needed again.
    again = lorax.peft.load(folder, ours, names=EXPERTS)
    np.testing.assert_allclose(jax.vmap(again[0])(INPUTS), expected, atol=1e-5)


# MiniLM


def bert_folder():
    import minilm

    return minilm._file("config.json").parent


def bert():
    import transformers

    model = transformers.BertModel.from_pretrained(
        bert_folder(), add_pooling_layer=False
    )
    return model.eval()


@pytest.fixture(scope="module")
def minilm_tokens():
    return np.random.default_rng(0).integers(0, 30_000, (3, 12))


def outputs(model, tokens):
    mask = jnp.ones(tokens.shape[1], bool)
    return jax.jit(jax.vmap(lambda tokens: model(tokens, mask)))(jnp.asarray(tokens))


def test_minilm_to_peft(minilm_tokens, tmp_path, getkey):
    import minilm

    plain = minilm.load_minilm()
    adapted = trained_a_little(
        lorax.loraify(
            plain, ["attention", "feed_forward", "words"], rank=4, key=getkey()
        )
    )
    lorax.peft.save(tmp_path, adapted, names=minilm.torch_name)
    model = in_peft(bert(), tmp_path)
    expected = numpy(model(tensor(minilm_tokens)).last_hidden_state)
    found = outputs(adapted, minilm_tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(outputs(plain, minilm_tokens) - expected).max() > 0.1


def trained_a_little(model):
    """Like `trained`, but with updates small enough for a deep model."""
    model = trained(model)
    return lorax.scale(model, 0.1)


def test_minilm_from_a_script_of_pefts_own(tmp_path):
    import minilm

    script = Path(__file__).parent / "peft_script.py"
    with running(script, bert_folder(), tmp_path) as program:
        program.finish()
    loaded = lorax.peft.load(tmp_path, minilm.load_minilm(), names=minilm.torch_name)
    with np.load(tmp_path / "expected.npz") as file:
        tokens, expected = file["tokens"], file["outputs"]
    loaded = eqx.nn.inference_mode(loaded)
    found = outputs(loaded, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    plain = outputs(minilm.load_minilm(), tokens)
    assert np.abs(plain - expected).max() > 0.1


# A causal model with stacked layers


@pytest.fixture
def causal(getkey):
    ours, theirs = llama_pair(
        getkey(),
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
    )
    tokens = np.random.default_rng(0).integers(0, 61, (2, 10))
    expected = numpy(theirs(tensor(tokens)).logits)
    np.testing.assert_allclose(ours_on(ours, tokens), expected, atol=1e-5)
    return ours, theirs, tokens


def test_a_causal_model_to_peft(causal, tmp_path):
    ours, theirs, tokens = causal
    # The same numbers in each run, since they change the rounding errors of three
    # layers by a factor of ten.
    key = jr.key(1)
    adapted = trained(lorax.loraify(ours, "blocks", rank=4, alpha=2, key=key))
    lorax.peft.save(
        tmp_path, adapted, names=tiny_llama.NAMES, also="norm", task_type="CAUSAL_LM"
    )
    expected = numpy(in_peft(theirs, tmp_path)(tensor(tokens)).logits)
    found = ours_on(adapted, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(ours_on(ours, tokens) - expected).max() > 0.1


def test_a_causal_model_from_peft(causal, tmp_path):
    ours, theirs, tokens = causal
    model = by_peft(
        theirs,
        tmp_path,
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    expected = numpy(model(tensor(tokens)).logits)
    loaded = lorax.peft.load(tmp_path, ours, names=tiny_llama.NAMES)
    np.testing.assert_allclose(ours_on(loaded, tokens), expected, atol=1e-5)
    assert np.abs(ours_on(ours, tokens) - expected).max() > 0.1


def test_what_is_exchanged_of_a_causal_model(causal, tmp_path):
    """Adapters on the embedding and the head, whose bases PEFT saves too; on some
    layers of the stack, with several ranks; with dropout."""
    ours, theirs, tokens = causal
    model = by_peft(
        theirs,
        tmp_path / "theirs",
        r=4,
        lora_alpha=2,
        lora_dropout=0.1,
        target_modules=["embed_tokens", "lm_head", "layers.0.mlp.up_proj", "q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.2.self_attn.q_proj": 3},
    )
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    bases = [name for name in load_file(path) if name.endswith("base_layer.weight")]
    assert len(bases) == 2
    expected = numpy(model(tensor(tokens)).logits)
    loaded = lorax.peft.load(tmp_path / "theirs", ours, names=tiny_llama.NAMES)
    np.testing.assert_allclose(ours_on(loaded, tokens), expected, atol=2e-5)
    assert np.abs(ours_on(ours, tokens) - expected).max() > 0.1
    lorax.peft.save(tmp_path / "ours", loaded, names=tiny_llama.NAMES)
    theirs = in_peft(model.unload(), tmp_path / "ours")
    found = numpy(theirs(tensor(tokens)).logits)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    other = eqx.tree_at(lambda m: m.words.weight, ours, replace_fn=lambda x: 2 * x)
    with pytest.raises(lorax.AdapterFileError, match="embed_tokens.base_layer.weight"):
        lorax.peft.load(tmp_path / "theirs", other, names=tiny_llama.NAMES)

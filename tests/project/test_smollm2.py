"""SmolLM2 from its GGUF file: text, blocks, logits, and the examples at small size,
against `gguf`, the template of the file, and the real `transformers` and PEFT."""

import json
import operator

import equinox as eqx
import jax
import numpy as np
import pytest

import eqx_lorax as lorax


pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("as_for_users"),
]

TEXT = "In 2024 it's  fine,\n\n100% sure"


@pytest.fixture(scope="module")
def file():
    import smollm2

    return smollm2.open_file()


@pytest.fixture(scope="module")
def tokenizer(file):
    import smollm2

    return smollm2.load_tokenizer(file)


@pytest.fixture(scope="module")
def plain(file):
    import smollm2

    return smollm2.load_model(file)


@pytest.fixture(scope="module")
def theirs(plain, tmp_path_factory):
    """A folder with the dequantised weights, as `transformers` reads them."""
    import llama

    folder = tmp_path_factory.mktemp("smollm2")
    lorax.peft.save_weights(
        folder,
        lorax.dequantise(plain),
        names=llama.torch_name,
        tied={"embed_tokens": "lm_head"},
    )
    config = plain.config
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
    ]
    options = {name: getattr(config, name) for name in names}
    options |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(options))
    assert llama.LlamaConfig.from_file(folder) == config
    return folder


def test_tokens(tokenizer):
    tokens = tokenizer.encode(TEXT).tokens
    assert tokens[:6] == ["In", "Ġ", "2", "0", "2", "4"]
    assert tokens[6:10] == ["Ġit", "'s", "Ġ", "Ġfine"]
    assert tokens[-5:] == ["1", "0", "0", "%", "Ġsure"]
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|im_start|>user").ids == [1, 4093]
    assert tokenizer.decode([1, 4093], skip_special_tokens=True) == "user"


def test_prompts_are_those_of_the_template(file):
    import jinja2
    import smollm2

    template = file.fields["tokenizer.chat_template"].contents()
    whole = jinja2.Template(template).render(
        messages=[{"role": "user", "content": TEXT}], add_generation_prompt=True
    )
    system, end, rest = whole.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n") and end
    assert rest == smollm2.ask(TEXT)


def test_padding_and_batches():
    import smollm2

    rows = [smollm2.Row([5, 6], [7, 8, 9]), smollm2.Row([5] * 50, [7, 9])]
    batch = smollm2.collate(rows)
    assert batch.tokens.shape == batch.mask.shape == (2, 64)
    assert batch.mask.sum(1).tolist() == [5, 52]
    assert batch.answers.tolist() == [[7, 8, 9, -1], [7, 9, -1, -1]]
    # The token at each position is the one before that of the answer.
    before = np.take_along_axis(batch.tokens, batch.positions, 1)
    assert before[0, :3].tolist() == [6, 7, 8] and before[1, :2].tolist() == [5, 7]

    lengths = np.random.default_rng(0).integers(5, 60, 90)
    batches = smollm2.batches(lengths, 8, seed=0)
    epochs = [np.stack([next(batches) for _ in range(11)]) for _ in range(2)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 88
        assert np.mean([np.ptp(lengths[chosen]) for chosen in epoch]) < 10
    assert not np.array_equal(*epochs)


def test_weights_are_those_of_the_file(file, plain):
    import gguf
    import smollm2

    tensors = {tensor.name: tensor for tensor in file.tensors}
    for path, name in smollm2._NAMES.items():
        weight = operator.attrgetter(f"{path}.weight")(plain)
        if path.startswith("layers."):
            weight = jax.tree.map(lambda x: x[7], weight)
            name = f"blk.7.{name}"
        tensor = tensors[f"{name}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q" in name or "attn_k" in name:
            # As llama.cpp's converter from Hugging Face's order, backwards.
            heads = expected.reshape(-1, 32, 2, expected.shape[1])
            expected = heads.swapaxes(1, 2).reshape(expected.shape)
        if isinstance(weight, lorax.QuantisedArray):
            assert weight.format.name in ("q4_1", "q8_0")
            weight = weight.dequantise()
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("format, error", [("nf4", 0.13), ("int8", 0.02)])
def test_other_formats(format, error, file, plain, tokenizer):
    import smollm2

    model = smollm2.load_model(file, format)
    weights = [x.layers.mlp.down_proj.weight for x in (model, plain)]
    assert weights[0].format.name == format
    found, expected = (np.asarray(weight.dequantise()) for weight in weights)
    assert np.std(found - expected) < error * np.std(expected)
    question = "What is the capital of France? Answer in one word."
    (answer,) = smollm2.generate(model, tokenizer, [question], most=8)
    assert "Paris" in answer


def test_logits_are_those_of_transformers(plain, theirs, tokenizer):
    import smollm2
    import torch
    import transformers

    ids = tokenizer.encode(smollm2.ask("What is the capital of France?")).ids
    model = transformers.LlamaForCausalLM.from_pretrained(theirs).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = eqx.filter_jit(plain)(np.array(ids))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    answers = smollm2.generate(plain, tokenizer, ["What is the capital of France?"])
    assert answers == ["The capital of France is Paris."]


def test_finetune(tmp_path, capsys, theirs, plain, file):
    import finetune_smollm2
    import llama
    import peft
    import torch
    import transformers

    small = "--steps 2 --batch-size 2 --accumulate 2 --rank 2 --length 8"
    small += " --train-rows 64 --test-rows 16 --learning-rate 1e-2"
    result = finetune_smollm2.main([*small.split(), "--output", str(tmp_path)])
    assert len(result.losses) == 2
    assert 0 <= result.accuracy_before <= 1 and 0 <= result.accuracy_after <= 1
    assert len(result.answers_before) == len(result.answers_after) == 3
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "layers.mlp.gate_proj.weight" in printed
    assert "Growth of the peak memory by training" in printed

    # Both files give the same logits here, and the folder gives them in the real PEFT.
    tokens = np.arange(1000, 1012)
    run = eqx.filter_jit(lambda model, tokens: model(tokens))
    base = run(plain, tokens)
    adapted = lorax.load_adapter(result.adapters[0], plain)
    found = run(adapted, tokens)
    again = lorax.peft.load(result.adapters[1], plain, names=llama.torch_name)
    np.testing.assert_allclose(run(again, tokens), found, atol=1e-4)
    assert np.abs(found - base).max() > 0.1
    model = transformers.LlamaForCausalLM.from_pretrained(theirs)
    model = peft.PeftModel.from_pretrained(model, result.adapters[1]).eval()
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None])).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_prefer(tmp_path, capsys):
    import prefer_smollm2

    small = "--steps 2 --batch-size 2 --rank 2 --length 8 --train-pairs 16"
    small += " --test-pairs 8 --learning-rate 1e-2"
    result = prefer_smollm2.main([*small.split(), "--output", str(tmp_path)])
    # Policy and reference are one model before, whose rewards are zero.
    assert result.before == prefer_smollm2.Rewards(margin=0, accuracy=0.5)
    assert result.losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert result.after.margin != 0
    assert "8 held-out pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("finetune_smollm2", "--rank 1000", "exceeds the smaller side"),
        ("finetune_smollm2", "--train-rows 9000", "reviews to split"),
        ("finetune_smollm2", "--method lota", "lota"),
        ("finetune_smollm2", "--format q5", "invalid choice"),
        ("prefer_smollm2", "--train-pairs 9000", "fewer than asked for"),
        ("prefer_smollm2", "--beta 0", "must be positive"),
    ],
)
def test_bad_flags_are_one_line(program, flags, message, capsys):
    import importlib

    with pytest.raises(SystemExit):
        importlib.import_module(program).main(flags.split())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

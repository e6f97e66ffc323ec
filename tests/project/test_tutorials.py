"""The tutorials run at small size, and their notebooks are those of the programs."""

import base64
import importlib.util
import json
import re
import runpy
import sys

import jax
import pytest
from paths import ROOT


FOLDER = ROOT / "docs" / "tutorials"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _load("make")
SOURCES = make.SOURCES
# The lines of each program that say how much it does, as they are in the tests.
SMALL = {
    "convolutional-network": [
        "STEPS = 20",
        "upright_test = toolbox.rows(upright_test, slice(64))",
    ],
    "eight-devices": ["STEPS, WIDTH = 3, 32"],
    "film-reviews": ["STEPS, LENGTH = 6, 16", "TRAIN_ROWS, TEST_ROWS = 96, 64"],
    "flax-model": ["PRETRAIN_STEPS, STEPS = 4, 4"],
    "language-model": [
        "STEPS, BATCH, LENGTH = 2, 2, 8",
        "TRAIN_ROWS, TEST_ROWS, MOST_TOKENS = 64, 4, 1",
    ],
    "many-adapters": [
        "STEPS = 15",
        "test = toolbox.rows(test, slice(64))",
        "count, some = 32, 2",
    ],
    "neural-operator": ["PRETRAIN_STEPS, STEPS, MANY = 4, 4, 32", "counts = [16]"],
}
# What needs no data and no package but the extras of the tests.
PLAIN = {"eight-devices": [pytest.mark.heavy, pytest.mark.eight_devices]}
RUN = [
    pytest.param(
        source, marks=PLAIN.get(source.stem, [pytest.mark.interop]), id=source.stem
    )
    for source in SOURCES
]


@pytest.mark.own_errors
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("source", RUN)
def test_program(source, tmp_path, monkeypatch, as_for_users):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    # Nearly all of the time goes to compiling.
    optimised = not jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        program = tmp_path / source.name
        program.write_text(_small(source))
        runpy.run_path(str(program))
        assert plt.get_fignums()
    finally:
        jax.config.update("jax_disable_most_optimizations", not optimised)
        plt.close("all")


def _small(source):
    text = source.read_text()
    for line in SMALL[source.stem]:
        name = line.partition(" = ")[0]
        text, count = re.subn(rf"^{name} = [^=\n]+$", line, text, flags=re.MULTILINE)
        assert count == 1, f"{source.name} has {count} lines that set `{name}`."
    return text


def test_there_is_a_notebook_for_each_program():
    notebooks = {file.stem for file in FOLDER.glob("*.ipynb")}
    assert notebooks == {source.stem for source in SOURCES} and notebooks


def test_all_are_listed():
    listed = (FOLDER / "index.md").read_text()
    navigation = (ROOT / "mkdocs.yml").read_text()
    for source in SOURCES:
        assert f"]({source.stem}.ipynb)" in listed, source.stem
        assert f" tutorials/{source.stem}.ipynb" in navigation, source.stem


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_notebook(source):
    """It was made from this program, by a run that came to its end."""
    file = source.with_suffix(".ipynb")
    found, expected = json.loads(file.read_text()), make.notebook(source)
    kept = "id", "cell_type", "metadata", "source"
    assert [{key: _joined(cell[key]) for key in kept} for cell in found["cells"]] == [
        {key: cell[key] for key in kept} for cell in expected["cells"]
    ]
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert "JAX" in found["metadata"]["run"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    assert file.stat().st_size < 300_000


def _joined(text):
    return "".join(text) if isinstance(text, list) else text


def test_cells():
    text = """# %% [markdown]
# # A title
#
# Text.

# %%
import a


# %% tags=["picture"] alt="A line."
b = 1
"""
    assert make.cells(text) == [
        ("markdown", "# A title\n\nText.", {}),
        ("code", "import a", {}),
        ("code", "b = 1", {"tags": ["picture"], "alt": "A line."}),
    ]


def test_page():
    """What the site shows of a notebook."""
    text, png = "A #333333 line on #fefefe.", base64.b64encode(b"dots").decode()
    outputs = [
        [{"output_type": "stream", "text": ["1\n", "2\n"]}],
        [
            {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
            {"output_type": "display_data", "data": {"image/svg+xml": [text]}},
            {"output_type": "display_data", "data": {"image/png": png}},
        ],
    ]
    cells = [
        {"cell_type": "markdown", "source": "# A title\n\nText.", "metadata": {}},
        {"cell_type": "code", "source": "a", "metadata": {}},
        {
            "cell_type": "code",
            "source": "b",
            "metadata": {"tags": ["picture"], "alt": "Dots."},
        },
    ]
    for cell, output in zip(cells[1:], outputs):
        cell["outputs"] = output
    page, pictures = _load("pages").page(
        {"cells": cells, "metadata": {"run": "on two cores"}}, "name"
    )
    assert page.endswith("*This page ran on two cores.*")
    assert page.startswith("# A title\n\nText.\n\n[Download")
    assert "(download/name.ipynb)" in page
    assert "```python\na\n```\n\n```{ .text .output .no-copy }\n1\n2\n```" in page
    assert "    ```python\n    b\n    ```" in page and "3\n```" in page
    assert page.count("![Dots.](name/1-dark.svg#only-dark)") == 1
    assert pictures == {
        "name/1-light.svg": b"A #333333 line on none.",
        "name/1-dark.svg": b"A #d9dbe0 line on none.",
        "name/2-light.png": b"dots",
        "name/2-dark.png": b"dots",
    }

"""Make the notebooks of the tutorials: run each program at full size, cell by cell, and
keep what it prints and draws.

    python docs/tutorials/make.py --only flax-model

A tutorial is a program in which `# %%` begins a cell of code, and `# %% [markdown]` a
cell of text. It takes from a minute to a quarter of an hour on two cores. Where nothing
but text has changed, `--text` writes it into the notebook without a run. What the
programs need is in the extra `tutorials`.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple


FOLDER = Path(__file__).resolve().parent
TOOLS = {"make.py", "pages.py"}
SOURCES = sorted(x for x in FOLDER.glob("*.py") if x.name not in TOOLS)


class Cell(NamedTuple):
    kind: str
    """`"code"` or `"markdown"`."""
    source: str
    metadata: dict[str, Any]
    """`tags`: `"picture"` folds the code, and `"prose"` wraps what is printed. `alt`: what
    the picture shows."""


def cells(text: str) -> list[Cell]:
    """The cells of a program."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        pairs = re.findall(r'(\w+)=(\[.*?\]|".*?")', head)
        metadata = {key: json.loads(value) for key, value in pairs}
        body = body.strip("\n")
        if "[markdown]" in head:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        kind = "markdown" if "[markdown]" in head else "code"
        found.append(Cell(kind, body, metadata))
    return found


def notebook(source: Path) -> dict[str, Any]:
    """The notebook of a program that has not run."""
    rows = []
    for index, cell in enumerate(cells(source.read_text())):
        row: dict[str, Any] = {
            "cell_type": cell.kind,
            "id": f"cell-{index}",
            "metadata": cell.metadata,
            "source": cell.source,
        }
        if cell.kind == "code":
            row |= {"execution_count": None, "outputs": []}
        rows.append(row)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": rows, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


# Vector graphics without the date, so that the same picture is the same file.
_SETUP = """
%config InlineBackend.figure_formats = ["svg"]
%config InlineBackend.print_figure_kwargs = {"metadata": {"Date": None}}
"""


def run(source: Path, machine: str) -> None:
    """Runs a program and writes its notebook."""
    import jax
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.from_dict(notebook(source))
    client = NotebookClient(
        book, timeout=None, resources={"metadata": {"path": FOLDER}}
    )
    began = time.monotonic()
    with client.setup_kernel():
        assert client.kc is not None
        client.kc.execute(_SETUP, silent=True)
        code = [i for i, cell in enumerate(book.cells) if cell.cell_type == "code"]
        for place, index in enumerate(code, 1):
            _tell(f"{source.stem}: cell {place} of {len(code)}")
            client.execute_cell(book.cells[index], index)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell)
    seconds = time.monotonic() - began
    where = f"on {machine} with JAX {jax.__version__}"
    book.metadata["run"] = f"{where}, in {max(1, round(seconds / 60))} minutes"
    file = source.with_suffix(".ipynb")
    nbformat.write(book, file)
    kilobytes = file.stat().st_size / 1e3
    _tell(f"{file.name}: {kilobytes:.0f} kB, in {seconds:.0f} s\n")


def rewrite(source: Path) -> None:
    """Writes the text of a program into its notebook, whose code is the same."""
    file = source.with_suffix(".ipynb")
    book, fresh = json.loads(file.read_text()), notebook(source)
    done = {"".join(x["source"]): x for x in book["cells"] if x["cell_type"] == "code"}
    for cell in fresh["cells"]:
        if cell["cell_type"] == "code":
            if cell["source"] not in done:
                raise SystemExit(f"{source.name}: the code has changed, so run it.")
            cell |= {x: done[cell["source"]][x] for x in ("execution_count", "outputs")}
    # As Jupyter writes it.
    for cell in fresh["cells"]:
        if isinstance(cell["source"], str):
            cell["source"] = cell["source"].splitlines(keepends=True)
    book["cells"] = fresh["cells"]
    text = json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n")


def _kept(cell: Any) -> list[Any]:
    """The outputs that are shown: no warnings, which go to the terminal, and of a
    picture not what the last line returns."""
    kept: list[Any] = []
    for output in cell.outputs:
        if output.get("name") == "stderr":
            print(f"\n{output.text}", file=sys.stderr)
        elif output.output_type == "stream" and kept and "text" in kept[-1]:
            kept[-1].text += output.text
        elif output.output_type != "execute_result" or not cell.metadata.get("alt"):
            kept.append(output)
    return kept


def _tell(text: str) -> None:
    print(f"\r{text:60}", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [source.stem for source in SOURCES]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}; all by default",
    )
    parser.add_argument(
        "--machine",
        default="two busy cores of an AMD EPYC with AVX-512",
        help="where it runs, for the last line of the page",
    )
    parser.add_argument("--text", action="store_true", help="text alone, without a run")
    args = parser.parse_args()
    # This library as it is here, also where another one is installed.
    paths = [str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONUTF8"] = "1"
    for source in SOURCES:
        if source.stem in args.only:
            rewrite(source) if args.text else run(source, args.machine)


if __name__ == "__main__":
    main()

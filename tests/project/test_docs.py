"""Every code block in the README and the docs is executed, page by page, and on the
pages of the API the examples in docstrings too.

A block of `output` is what the code since the last one prints.
"""

import contextlib
import functools
import inspect
import io
import re
import runpy
import subprocess

import pytest
from paths import ROOT

import eqx_lorax as lorax


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_CODE = ("changelog.md",)
# The pages take more than a minute in all. What a page shows is tested elsewhere too.
RUN = [
    pytest.param(page, marks=[pytest.mark.heavy] * (page.parent != ROOT))
    for page in PAGES
]
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>python|output)\n(?P<text>.*?)^(?P=indent)```"
    r"|^::: lorax\.(?P<entry>\S+)$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d+\.\d+")
EXAMPLE = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def find_entry(name):
    """What `lorax.name` is. A class may leave an attribute to its subclasses."""
    return functools.reduce(lambda x, y: getattr(x, y, None), name.split("."), lorax)


def list_examples(entry):
    """The examples in the docstrings of something public, and of what is in it."""
    members = vars(entry).values() if inspect.isclass(entry) else ()
    for documented in (entry, *filter(inspect.isfunction, members)):
        is_own = inspect.isclass(documented) or inspect.isfunction(documented)
        text = inspect.cleandoc(documented.__doc__ or "") if is_own else ""
        for indent, code in EXAMPLE.findall(text):
            yield re.sub(f"^{indent}", "", code, flags=re.MULTILINE)


def assert_same_output(printed, shown):
    """Equal, but for decimals that differ between processors."""
    assert NUMBER.sub("#.#", printed.strip()) == NUMBER.sub("#.#", shown.strip())
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        assert float(ours) == pytest.approx(float(theirs), rel=0.02, abs=0.002)


@pytest.mark.own_errors
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_code_blocks(page, tmp_path, monkeypatch, as_for_users):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    has_code = page.name not in WITHOUT_CODE
    assert bool(blocks) == has_code or page.parent.name in ("api", "tutorials")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    printed = io.StringIO()
    for block in blocks:
        if block["entry"] is not None:
            for code in list_examples(find_entry(block["entry"])):
                exec(compile(code, f"lorax.{block['entry']}", "exec"), namespace)
        elif block["kind"] == "output":
            assert_same_output(printed.getvalue(), block["text"])
            printed = io.StringIO()
        else:
            # So that a traceback shows the line in the page.
            code = re.sub(f"^{block['indent']}", "", block["text"], flags=re.MULTILINE)
            code = "\n" * (text[: block.start()].count("\n") + 1) + code
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), namespace)


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "draw_adapter.py"))
    for name, palette in script["PALETTES"].items():
        path = ROOT / "docs" / "assets" / f"adapter-{name}.svg"
        assert path.read_text(encoding="utf-8") == script["draw"](palette)


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_has_two_commands():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    assert all(len(command.strip().splitlines()) == 1 for command in commands)
    gate = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -E '([^']+)' README", gate)
    assert pattern is not None
    found = subprocess.run(
        ["grep", "-E", pattern[1], ROOT / "README.md"], capture_output=True, text=True
    )
    assert found.stdout == commands[1]

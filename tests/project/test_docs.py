"""Every code block in the README and the docs is executed, page by page."""

import re
import subprocess

import pytest
from paths import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The pages take a minute in all. What a page shows is tested elsewhere too.
RUN = [
    pytest.param(page, marks=[pytest.mark.heavy] * (page.parent == ROOT / "docs"))
    for page in PAGES
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.own_errors
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_code_blocks(page, tmp_path, monkeypatch, as_for_users):
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks or page.parent.name == "api"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks:
        # So that a traceback shows the line in the page.
        code = "\n" * (text[: block.start()].count("\n") + 1) + block[1]
        exec(compile(code, str(page), "exec"), namespace)


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

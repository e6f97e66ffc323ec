"""What is published: the wheel and the source, and what describes them."""

import email
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from paths import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
URLS = PROJECT["urls"]


def test_the_citation():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert CITATION["version"] == PROJECT["version"]
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["repository-code"] == URLS["Source"]
    assert CITATION["url"] == URLS["Documentation"]
    for work in [CITATION, *CITATION["references"]]:
        assert work["title"] and work["authors"]
        for author in work["authors"]:
            assert {*author} in ({"name"}, {"family-names", "given-names"})
    assert all(isinstance(word, str) for word in CITATION["keywords"])
    # All keys that are used here are keys of the format.
    known = {"cff-version", "message", "title", "type", "authors", "version"}
    known |= {"license", "repository-code", "url", "keywords", "references"}
    assert {*CITATION} <= known | {"date-released", "doi"}


def test_the_changelog():
    headings = re.findall(r"^## \[(.*?)\](?: - (\S+))?$", CHANGELOG, re.MULTILINE)
    assert len(headings) == len(re.findall("^## ", CHANGELOG, re.MULTILINE))
    names = [name for name, _ in headings]
    assert names[:2] == ["Unreleased", PROJECT["version"]]
    landing = (ROOT / "docs" / "index.md").read_text()
    assert f"This is version {PROJECT['version']}," in landing
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings if date)
    assert all(f"\n[{name}]: {URLS['Source']}/" in CHANGELOG for name in names)


def test_what_is_to_be_published():
    """The workflow that publishes sets `LORAX_RELEASE`."""
    tag = os.environ.get("LORAX_RELEASE")
    if tag is None:
        return
    version = PROJECT["version"]
    assert tag == f"v{version}"
    released = re.search(rf"^## \[{version}\] - (\S+)$", CHANGELOG, re.MULTILINE)
    assert released is not None, "CHANGELOG.md has no date for this version."
    assert str(CITATION["date-released"]) == released[1]


def closure(names):
    """The installed packages that these need, without extras."""
    found = {}
    names = [*names]
    while names:
        package = distribution(names.pop())
        if package.name not in found:
            found[package.name] = package
            for needed in map(Requirement, package.requires or ()):
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    names.append(needed.name)
    return found.values()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source, unpacked, and the wheel that is built from that."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.mark.heavy
@pytest.mark.processes
def test_the_wheel_in_a_clean_environment(built, tmp_path):
    """Nothing but the wheel and what it declares to need is there."""
    _, wheel = built
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for package in closure(Requirement(x).name for x in PROJECT["dependencies"]):
        tops = {file.parts[0] for file in package.files or ()}
        for top in tops - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", wheel], check=True)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    program = """
    import importlib.util
    import pathlib
    import sys

    import eqx_lorax as lorax

    folder = pathlib.Path(lorax.__file__).parent
    assert sys.prefix in str(folder) and (folder / "py.typed").exists(), folder
    # Packages that are there where the tests run, and are not declared.
    assert not any(map(importlib.util.find_spec, ["pytest", "matplotlib", "orbax"]))
    print(lorax.info())
    """
    (tmp_path / "program.py").write_text("\n".join([textwrap.dedent(program), *blocks]))
    run = subprocess.run(
        [python, "-I", "program.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"eqx_lorax  {PROJECT['version']}" in re.sub("  +", "  ", run.stdout)


@pytest.mark.heavy
@pytest.mark.processes
def test_the_source_has_what_its_tests_need(built):
    source, _ = built
    tests = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/project"]
    run = subprocess.run(
        [*tests, "-k", "not code_blocks and not test_running"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # The gate and the tests of every room.
    assert (source / ".ci" / "run").exists()
    rooms = {file.name for file in (ROOT / "tests").iterdir() if any(file.glob("*.py"))}
    assert rooms == {x.name for x in (source / "tests").iterdir() if x.is_dir()}
    data = [x for x in (ROOT / "tests").rglob("data/*") if x.is_file()]
    assert data and all((source / x.relative_to(ROOT)).exists() for x in data)


@pytest.mark.heavy
@pytest.mark.processes
def test_what_the_wheel_says(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (metadata,) = [x for x in names if x.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(file.read(metadata))
    assert {x.split("/")[0].split("-")[0] for x in names} == {"eqx_lorax"}
    assert any(x.endswith("licenses/LICENSE") for x in names)
    assert (said["Name"], said["Version"]) == (PROJECT["name"], PROJECT["version"])
    urls = dict(x.split(", ") for x in said.get_all("Project-URL", []))
    assert urls == URLS
    assert said["Description-Content-Type"] == "text/markdown"
    # Its links and pictures lead somewhere from PyPI too.
    text = str(said.get_payload())
    links = re.findall(r"\]\(([^)]*)\)|src(?:set)?=\"([^\"]*)\"", text)
    assert len(links) > 5
    assert all("".join(link).startswith("https://") for link in links), links
    own = {x for link in links for x in link if URLS["Source"] in x or "/raw." in x}
    paths = {re.sub("^.*?/main/|#.*", "", link) for link in own}
    assert paths and all((ROOT / path).exists() for path in paths), paths

"""Workflows, forms and hooks: they name only what is there."""

import ast
import json
import re
import shlex
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from paths import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
JOBS = {
    f"{workflow}, {name}": job
    for workflow, content in WORKFLOWS.items()
    for name, job in content["jobs"].items()
}
FORMS = [
    file
    for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    if file.name != "config.yml"
]


def nox_sessions():
    """The names of the sessions, with the version of Python of each."""
    sessions = {}
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            (decorator,) = node.decorator_list
            (python,) = [x.value for x in decorator.keywords if x.arg == "python"]
            versions = ast.literal_eval(python)
            if isinstance(versions, str):
                sessions[node.name] = versions
            else:
                sessions |= {f"{node.name}-{x}": x for x in versions}
    return sessions


def expand(job):
    """The steps of a job, once for each row of its matrix."""
    for row in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
        text = json.dumps(job["steps"])
        for name, value in row.items():
            text = text.replace(f"${{{{ matrix.{name} }}}}", value)
        yield json.loads(text)


def requirements(extra):
    """The packages that an extra installs, with the extras that it names."""
    found = set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            found |= {name for x in requirement.extras for name in requirements(x)}
        found.add(requirement.name)
    return found


def test_the_workflows():
    assert {*WORKFLOWS} == {"tests", "docs", "release"}
    for workflow in WORKFLOWS.values():
        # YAML 1.1 reads `on` as true.
        assert {*workflow} - {"concurrency"} == {"name", True, "permissions", "jobs"}
        # Only a job that needs more may do more.
        assert workflow["permissions"] == {"contents": "read"}
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}
    assert "main" in WORKFLOWS["docs"]["jobs"]["deploy"]["if"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job(name):
    job = JOBS[name]
    assert job["runs-on"] == "ubuntu-latest" and job["timeout-minutes"] <= 90
    needs = [job["needs"]] if "needs" in job else []
    assert all(f"{name.split(',')[0]}, {other}" in JOBS for other in needs)
    for steps in expand(job):
        installed = {"pip"}
        for step in steps:
            assert "${{ matrix" not in str(step)
            if "uses" in step:
                # A major version, or the branch that stands for one.
                assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])
                file = step.get("with", {}).get("cache-dependency-path", ".")
                assert (ROOT / file).exists()
                continue
            for line in step["run"].strip().splitlines():
                check_command(shlex.split(line), installed)


def check_command(words, installed):
    """Checks that the program is installed and the files are there, and adds what
    the command installs."""
    program, *rest = words
    if program == "python":
        assert rest[0] == "-m"
        _, program, *rest = rest
    assert program in installed, f"{program} is not installed: {words}"
    if program == "pip":
        assert rest[0] == "install"
        for word in rest[1:]:
            if extras := re.fullmatch(r"\.\[(.*)\]", word):
                for extra in extras[1].split(","):
                    installed |= requirements(extra)
            elif word != "-e":
                installed.add(word)
    if program == "nox":
        assert rest[0] == "--session" and rest[1] in nox_sessions()
    for word in rest:
        if re.search(r"\.(py|md|toml)$|^tests", word):
            assert (ROOT / word).exists(), word


def test_a_command_that_is_wrong():
    for wrong in ["mkdocs build", "nox --session newest-3.12", "python -m pip x"]:
        with pytest.raises(AssertionError):
            check_command(wrong.split(), {"pip", "nox"})
    with pytest.raises(AssertionError, match="test_gone"):
        check_command("python -m pytest tests/test_gone.py".split(), {"pytest"})


def test_versions_of_python():
    sessions = nox_sessions()
    assert [*sessions] == ["newest-3.11", "newest-3.13", "lowest"]
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert {row["session"]: row["python"] for row in matrix} == sessions
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert claimed == ["3.11", "3.12", "3.13"]
    assert {*sessions.values()} <= {*claimed}
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    assert all(version in SpecifierSet(">=3.11") for version in claimed)
    # The other jobs, type checkers and readers of CONTRIBUTING have the lowest.
    lowest = sessions["lowest"]
    for job in JOBS.values():
        for steps in expand(job):
            for step in steps:
                if step.get("uses", "").startswith("actions/setup-python"):
                    assert step["with"]["python-version"] in sessions.values()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert config["pythonVersion"] == lowest == claimed[0]


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_a_form(file):
    form = yaml.safe_load(file.read_text())
    assert {*form} == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"]]
    assert len({*ids}) == len(ids) and "info" in ids
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
    (info,) = [field for field in form["body"] if field["id"] == "info"]
    assert "lorax.info(" in info["attributes"]["label"]
    assert "python -m eqx_lorax" in info["attributes"]["description"]


def test_the_forms():
    assert [file.stem for file in FORMS] == ["bug", "question"]
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    config = yaml.safe_load((folder / "config.yml").read_text())
    (link,) = config["contact_links"]
    assert link["url"] == PROJECT["urls"]["Documentation"]
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    assert "lorax.info()" in template
    for path in re.findall(r"tests/[\w/]+\.py", template):
        assert (ROOT / path).exists()


def test_the_hooks():
    """They run what the gate runs, from the extra `dev`."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    gate = (ROOT / ".ci" / "run").read_text()
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "pyright"]
    for hook in hooks:
        command = hook["entry"].split()
        assert hook["language"] == "system" and command[0] in requirements("dev")
        assert f".venv/bin/{' '.join(command[:2])}".removesuffix(" --fix") in gate

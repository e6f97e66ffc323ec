"""The program whose types the gate checks runs."""

import importlib.util

import pytest
from paths import ROOT


@pytest.mark.heavy
def test_it_runs(tmp_path, as_for_users):
    file = ROOT / "tests" / "project" / "user" / "program.py"
    spec = importlib.util.spec_from_file_location("user_program", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)


def test_the_gate_checks_its_types():
    gate = (ROOT / ".ci" / "run").read_text()
    command = ".venv/bin/pyright --pythonpath .venv/bin/python"
    assert f"\n{command}\n" in gate and f"\n{command} -p tests/project/user\n" in gate

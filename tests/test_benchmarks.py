"""The benchmarks run, at small size."""

import json
import subprocess
import sys

import pytest
from test_docs import ROOT


pytestmark = pytest.mark.interop


def run(program, *flags):
    command = [sys.executable, f"benchmarks/{program}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("only", ["stack-float32-256-8", "transformer", "decoding"])
def test_speed(only, tmp_path):
    flags = ["--only", only, "--small", "--rounds", "2", "--output", str(tmp_path)]
    printed = run("run", *flags)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["case"], row["name"]): row for row in saved["rows"]}
    assert all(name in printed for _, name in rows)
    for row in saved["rows"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    flops = [row["flops"] for (_, name), row in rows.items() if "lorax" in name]
    if only.startswith("stack"):
        # 1 + 1.5 r (1/m + 1/n), the floor being two products a layer.
        assert flops and all(abs(x - (1 + 3 * 8 / 1024)) < 0.003 for x in flops)


def test_others():
    assert "unloraify" in run("growth", "--width", "8", "--repeats", "1")
    assert "function, gradient" in run("tracing", "--layers", "2", "--repeats", "1")

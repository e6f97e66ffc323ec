"""The benchmarks run at small size."""

import json

import pytest
from paths import ROOT
from running import running


pytestmark = pytest.mark.interop


def run(program, *flags):
    with running(
        ROOT / "benchmarks" / f"{program}.py", *flags, folder=ROOT
    ) as benchmark:
        benchmark.finish()
        return benchmark.out


@pytest.mark.parametrize(
    "only", ["stack-float32-256-8", "transformer", "minilm", "decoding"]
)
def test_speed(only, tmp_path):
    flags = ["--only", only, "--small", "--rounds", "2", "--output", str(tmp_path)]
    printed = run("run", *flags)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["case"], row["name"]): row for row in saved["rows"]}
    assert all(name in printed for _, name in rows)
    for row in saved["rows"]:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    flops = [row["flops"] for (_, name), row in rows.items() if "door" in name]
    if only.startswith("stack"):
        # 1 + 1.5 r (1/m + 1/n), with a floor of two products per layer.
        assert flops and all(abs(x - (1 + 3 * 8 / 1024)) < 0.003 for x in flops)


def test_optimizers():
    flags = "--steps 3 --seeds 2 --width 12 --only Pro".split()
    assert run("optimizers", *flags).count("| LoRA-Pro, Adam") == 2


def test_others():
    assert "loraify, warm" in run("outside", "--dim", "20", "--layers", "2")
    flags = ["--targets", "2", "--unrolled", "2", "--rounds", "1"]
    assert "lists of leaves" in run("host", *flags)
    assert "merged" in run("precision")
    assert "1.000" in run("planning", "--small", "--devices", "2")
    assert "function, gradient" in run("tracing", "--layers", "2", "--repeats", "1")


def test_methods(tmp_path):
    flags = [
        "--tokens",
        "16",
        "--width",
        "64",
        "--rounds",
        "2",
        "--only",
        "dora",
        "ia3",
    ]
    assert "PEFT" in run("methods", *flags, "--output", str(tmp_path))
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert {row["name"] for row in rows} >= {"lora", "frozen", "dora", "ia3"}


def test_growth(tmp_path):
    assert "unloraify" in run("growth", "--small", "--output", str(tmp_path))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert {point["against"] for point in points} == {"layers", "width", "rank"}
    assert all(point["step"] > 0 for point in points)


def test_devices(tmp_path):
    assert "proportional work, tensor, 8" in run(
        "devices", "--small", "--output", str(tmp_path)
    )
    assert (tmp_path / "devices.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "devices.json").read_text())["points"]
    assert {point["devices"] for point in points} == {1, 8}


def test_memory(tmp_path):
    flags = ["--small", "--rounds", "2", "--output", str(tmp_path)]
    printed = run("memory", *flags)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "memory.json").read_text())["points"]
    kept = {point["policy"]: point for point in points if "policy" in point}
    for point in kept.values():
        assert point["temporary_adapted"] > 0 and point["saved_adapted"] > 0
    ours, computed, everything = (
        kept[name]["saved_adapted"]
        for name in (
            "lorax.checkpoint_policy()",
            "everything computed again",
            "no checkpoint",
        )
    )
    assert computed < ours < everything
    settings = {point["name"]: point for point in points if "name" in point}
    assert all(name in printed for name in (*kept, *settings))
    start = settings["LoRA, all linear layers"]
    assert settings["base: nf4"]["base"] < start["base"] / 4
    assert start["adam"] > 2 * start["adapters"]

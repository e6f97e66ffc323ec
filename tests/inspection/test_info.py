"""What the report of a bug needs."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqx_lorax as lorax


def test_versions():
    found = lorax.info().versions
    assert found["eqx_lorax"] == lorax.__version__
    assert found["jax"] == jax.__version__
    names = ["jaxlib", "equinox", "optax", "jaxtyping", "safetensors", "numpy"]
    assert found.items() >= {x: importlib.metadata.version(x) for x in names}.items()


def test_only_what_is_installed(monkeypatch):
    there = {"jax": "1.2.3", "torch": "4.5"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert lorax.info().versions == there


def test_system_and_devices():
    found = lorax.info()
    assert found.system["python"].startswith(platform.python_version())
    assert found.system["platform"] == platform.platform()
    device = jax.devices()[0]
    (count,) = found.devices.values()
    assert [*found.devices] == [f"{device.platform} ({device.device_kind})"]
    assert count.split(",")[0] == f"× {jax.device_count()}"


def test_memory_of_devices(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "A card"

        def memory_stats(self):
            return {"bytes_limit": 24 * 10**9}

    monkeypatch.setattr(jax, "devices", lambda: [Device(), Device()])
    assert lorax.info().devices == {"gpu (A card)": "× 2, 24 GB each"}


SETTINGS = {
    "x64": (jax.enable_x64, True, "jax_enable_x64", "True"),
    "precision": (
        jax.default_matmul_precision,
        "highest",
        "jax_default_matmul_precision",
        "highest",
    ),
    "NaN": (jax.debug_nans, True, "jax_debug_nans", "True"),
    "promotion": (
        jax.numpy_dtype_promotion,
        "strict",
        "jax_numpy_dtype_promotion",
        "strict",
    ),
    "guard": (jax.transfer_guard, "log", "jax_transfer_guard", "log"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, as_for_users):
    change, value, setting, text = SETTINGS[name]
    assert lorax.info().settings.get(setting) != text
    with change(value):
        assert lorax.info().settings[setting] == text


FLAGS = {
    "--xla_gpu_autotune_level=0 --xla_cpu_x=true": None,
    "--xla_gpu_deterministic_ops": None,
    "--xla_dump_to=/home/me/secret": "--xla_dump_to=…",
    "--xla_a=1,2.5 --xla_b=me@host:80": "--xla_a=1,2.5 --xla_b=…",
    "--xla_api_key=abc": "--xla_api_key=…",
    "--xla_TOKEN=abc": "--xla_TOKEN=…",
    f"--xla_x={'a' * 64}": "--xla_x=…",
    "/home/me/flags.txt": "…",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_without_what_is_private(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert lorax.info().settings["XLA_FLAGS"] == (FLAGS[flags] or flags)


def test_no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    assert "XLA_FLAGS" not in lorax.info().settings


def layers(getkey, dtype=jnp.float32):
    return [eqx.nn.Linear(64, 8, dtype=dtype, key=getkey()) for _ in range(3)]


def adapted(getkey):
    return lorax.loraify(layers(getkey), rank=2, key=getkey())


def several(getkey):
    model = layers(getkey, jnp.bfloat16)
    model = lorax.loraify(model, ["0", "1"], rank=2, key=getkey())
    return lorax.loraify(model, "2", method="dora", rank=4, key=getkey())


MODELS = {
    "plain": (layers, {"targets": "0", "other arrays": "float32 × 6"}),
    "adapted": (
        adapted,
        {
            "targets": "3",
            "methods": "lora × 3",
            "ranks": "2 × 3",
            "bases": "float32 × 3",
            "factors": "float32 × 6",
            "other arrays": "float32 × 3",
        },
    ),
    "several methods": (
        several,
        {
            "targets": "3",
            "methods": "lora × 2, dora × 1",
            "ranks": "2 × 2, 4 × 1",
            "bases": "bfloat16 × 3",
            "factors": "float32 × 7",
            "other arrays": "bfloat16 × 3",
        },
    ),
    "quantised": (
        lambda getkey: lorax.quantise(adapted(getkey), format="nf4"),
        {"bases": "nf4 × 3", "factors": "float32 × 6", "other arrays": "float32 × 3"},
    ),
    "quantised, not adapted": (
        lambda getkey: lorax.quantise(layers(getkey), format="int8"),
        {"targets": "0", "other arrays": "int8 × 3, float32 × 3"},
    ),
    "what is trained alone": (
        lambda getkey: lorax.partition(adapted(getkey))[0],
        {"targets": "3", "ranks": "2 × 3", "factors": "float32 × 6"},
    ),
    "a tree of parameters": (
        lambda getkey: lorax.init_lora({"w": jnp.ones((8, 6))}, 2, getkey()),
        {"targets": "1", "methods": "lora × 1", "ranks": "2 × 1"},
    ),
    "no model at all": (lambda getkey: "text", {"targets": "0"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, getkey):
    make, expected = MODELS[name]
    assert lorax.info(make(getkey)).model.items() >= expected.items()


def test_traced_and_abstract(getkey):
    model = adapted(getkey)
    expected = lorax.info(model).model
    abstract = eqx.filter_eval_shape(lambda: model)
    assert lorax.info(abstract).model == expected
    seen = []
    eqx.filter_jit(lambda x: seen.append(lorax.info(x).model))(model)
    assert seen[0].items() >= (expected.items() - {("devices", "1")})


def test_text(getkey):
    found = lorax.info(adapted(getkey))
    assert str(found) == repr(found)
    lines = str(found).splitlines()
    sections = [line for line in lines if not line.startswith("  ")]
    assert sections == ["versions", "system", "devices", "settings", "model"]
    entries = [line.strip().split("  ", 1) for line in lines if line[:2] == "  "]
    assert ["ranks", "2 × 3"] in [[name, text.strip()] for name, text in entries]
    # The texts are below each other.
    starts = {len(name) + len(text) - len(text.lstrip()) for name, text in entries}
    assert len(starts) == 1
    assert "model" not in str(lorax.info()).splitlines()


def test_it_never_fails(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("no driver")

    def fail(*args):
        raise RuntimeError("no driver")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(platform, "platform", fail)
    monkeypatch.setattr(os, "sysconf", fail)
    monkeypatch.setattr(importlib.metadata, "version", fail)
    monkeypatch.setattr(jax.tree, "leaves", fail)
    found = lorax.info(Broken())
    assert found.versions == found.devices == found.model == {}
    assert "platform" not in found.system and "python" in found.system
    assert "jax_enable_x64" in found.settings


@pytest.mark.heavy
@pytest.mark.processes
def test_command(as_for_users):
    """It prints the same, and imports no package that is not needed."""
    program = "import runpy, sys; runpy.run_module('eqx_lorax', run_name='__main__')"
    program += "; print(*{'torch', 'flax', 'peft', 'transformers'} & {*sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *printed, peers = run.stdout.splitlines()
    assert printed == str(lorax.info()).splitlines()
    assert not peers

"""Rules that hold for every file. Those of rooms and sizes are in `test_floors.py`."""

import ast
import inspect
import pkgutil

import equinox as eqx
from paths import ROOT

import eqx_lorax as lorax


FILES = sorted((ROOT / "eqx_lorax").rglob("*.py"))


def test_public_jax_only():
    folders = ["eqx_lorax", "tests", "examples", "benchmarks"]
    files = [file for name in folders for file in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    private = ".".join(["jax", "_src"])
    assert not [file for file in files if private in file.read_text()]


def _modules():
    for info in pkgutil.walk_packages(lorax.__path__, "eqx_lorax."):
        module = __import__(info.name, fromlist=["_"])
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, eqx.Module) and cls.__module__ == module.__name__:
                yield cls


def test_modules_are_abstract_or_final():
    modules = set(_modules())
    assert len(modules) > 5
    for cls in modules:
        bases = [base for base in cls.__mro__[1:] if base in modules]
        assert all(base.__name__.startswith("Abstract") for base in bases), cls
        is_abstract = cls.__name__.startswith("Abstract")
        assert is_abstract or not cls.__abstractmethods__


def test_everything_public_is_documented():
    public = [getattr(lorax, name) for name in dir(lorax) if not name.startswith("_")]
    ours = [x for x in public if getattr(x, "__module__", "").startswith("eqx_lorax.")]
    assert lorax.loraify in ours and lorax.LoraWeight in ours
    assert all(x.__doc__ for x in ours)


def test_core_imports_only_what_it_declares():
    declared = {
        "jax",
        "jaxlib",
        "equinox",
        "optax",
        "safetensors",
        "jaxtyping",
        "numpy",
        "wadler_lindig",  # Equinox prints with it, and asks for what it takes.
        "orbax",
    }
    standard = __import__("sys").stdlib_module_names
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in declared or top in standard, f"{file.name}: {name}"

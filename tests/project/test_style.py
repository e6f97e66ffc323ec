"""Rules for every file. `test_floors.py` has those for rooms and sizes."""

import ast
import collections
import inspect
import operator
import pkgutil
import re
import sys
import textwrap

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


def test_public_names_only():
    # The import hook that has annotations checked leaves its own name behind.
    names = {name for name in dir(lorax) if not name.startswith("_")} - {"jaxtyping"}
    exported = {"constants", "peft"}
    for node in ast.parse((ROOT / "eqx_lorax" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            exported |= {alias.asname or alias.name for alias in node.names}
    assert names == exported


API = sorted((ROOT / "docs" / "api").glob("*.md"))


def _entries():
    """The entries of the API pages, as they are called after `lorax.`."""
    text = "\n".join(page.read_text() for page in API)
    return re.findall(r"^::: lorax\.(\S+)$", text, re.MULTILINE)


def test_every_public_name_is_on_one_api_page():
    modules = {"constants", "peft", "quantised", "jaxtyping"}
    names = [x for x in dir(lorax) if not x.startswith("_") and x not in modules]
    names += [f"peft.{x}" for x in lorax.peft.__all__]
    inner = vars(lorax.quantised).items()
    names += [f"quantised.{x}" for x, value in inner if inspect.isfunction(value)]
    found = [x for x in _entries() if not x.startswith("AbstractLoraWeight.")]
    assert collections.Counter(found) == collections.Counter(names)


def test_every_function_has_an_example():
    # What a method defines is shown as a whole, on another page.
    names = [x for x in _entries() if not x.startswith("AbstractLoraWeight.")]
    entries = {name: operator.attrgetter(name)(lorax) for name in names}
    functions = {x: y for x, y in entries.items() if inspect.isfunction(y)}
    assert len(functions) > 40
    for name, function in functions.items():
        assert "!!! example" in (function.__doc__ or ""), name


def _annotated(function):
    """The names in the annotations of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    (definition,) = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
    annotations = [definition.returns]
    annotations += [x.annotation for x in ast.walk(definition.args) if _is_arg(x)]
    found = [x for x in annotations if x is not None]
    return {y.id for x in found for y in ast.walk(x) if isinstance(y, ast.Name)}


def _is_arg(node):
    return isinstance(node, ast.arg)


def _ours(module):
    """The names that a file of the package defines or imports from another one, without
    type variables."""
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
    return names


def test_public_signatures_have_public_types():
    faces = {lorax: "eqx_lorax", lorax.peft: "eqx_lorax.peft"}
    public = {name for face in faces for name in dir(face) if not name.startswith("_")}
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    functions = [lorax.peft.save, lorax.peft.load]
    functions += [x for x in vars(lorax).values() if inspect.isfunction(x)]
    assert len(functions) > 20
    for function in functions:
        module = sys.modules[inspect.unwrap(function).__module__]
        types = _annotated(function) & _ours(module)
        where = f"{function.__module__}.{function.__name__}"
        # The coefficients of `weighted_sum`, and what is that of jaxtyping.
        for name in types - {"Weights", "PyTree"}:
            assert name in public, f"{where}: {name}"
            assert f"{name}\n" in pages, f"{name} has no page"


def test_core_imports_only_what_it_declares():
    declared = {
        "jax",
        "jaxlib",
        "equinox",
        "optax",
        "safetensors",
        "jaxtyping",
        "numpy",
        "wadler_lindig",  # Equinox prints with it.
        "typing_extensions",  # For type checkers alone, which have it.
        "orbax",
        "matplotlib",  # The extra `plots`.
        "tqdm",  # For a progress bar, where it is installed.
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

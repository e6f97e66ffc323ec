"""The rooms of the package are on floors, which decide what each may import."""

import re

import pytest
from floors import find_problems, MOST_FILES, MOST_LINES, Package
from paths import ROOT


# From bottom to top. A room imports only from lower floors, and only names from the
# other room's `__init__.py`, its door.
FLOORS = (
    ("_shared",),
    ("_factored",),
    ("_bases",),
    ("_methods",),
    ("_functions",),
    ("_layers",),
    ("_trees",),
    ("_modules",),
    ("_training", "_optimizers", "_arithmetic", "_calibration"),
    ("_adapters", "_planning", "_inspection"),
    ("_peft",),
    ("peft.py", "quantised.py", "constants.py"),
    ("__init__.py",),
    ("__main__.py",),
)


@pytest.fixture(scope="module")
def package():
    return Package(ROOT / "eqx_lorax")


def test_floors(package):
    problems = find_problems(package, FLOORS)
    assert not problems, "\n" + "\n".join(problems)


PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_page_of_the_architecture_has_these_floors():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PAGE, re.MULTILINE)
    found = {
        name: int(floor)
        for floor, names in rows
        for name in re.findall("`(.*?)`", names)
    }
    floors = FLOORS[:-2]  # without the package's own `__init__.py` and its command
    assert found == {x: i for i, floor in enumerate(floors, 1) for x in floor}


def test_the_page_of_the_architecture_names_files_that_are_there(package):
    named = set(re.findall(r"(?<![\w/])_[a-z]+(?:/[a-z_]+)*/[a-z_]+\.py", PAGE))
    assert len(named) > 20
    assert not named - package.files.keys()
    tests = re.findall(r"(?<![\w/])tests(?:/[a-z_.]+)+", PAGE)
    assert len(tests) > 8 and all((ROOT / path).exists() for path in tests)


# The checker itself, on small packages

SOUND = {
    "__init__.py": "from ._upper import f as f",
    "_lower/__init__.py": '"""Below."""\nfrom .one import g\nfrom . import two',
    "_lower/one.py": "from .two import h\nimport os.path",
    "_lower/two.py": "from math import sqrt",
    "_beside/__init__.py": '"""What is beside `_upper`."""',
    "_upper/__init__.py": '"""What is above."""\nfrom .file import f as f',
    "_upper/file.py": "from .._lower import g, two\nfrom .inner import x",
    "_upper/inner/__init__.py": '"""A room in a room."""\nfrom .deep import x as x',
    "_upper/inner/deep.py": "import small._lower\nfrom small._lower import g",
}
SMALL = (("_lower",), ("_upper", "_beside"), ("__init__.py",))


def problems_with(tmp_path, change, floors=SMALL):
    for name, text in (SOUND | change).items():
        file = tmp_path / "small" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return find_problems(Package(tmp_path / "small"), floors)


def test_a_sound_package(tmp_path):
    assert not problems_with(tmp_path, {})


UP = "_lower/two.py:{} imports _upper, which is above _lower. Move what both need to a"
DOOR = "Re-export what is needed in"
BROKEN = {
    "up": ({"_lower/two.py": "from .._upper import f"}, UP.format(1)),
    "up in a function": (
        {"_lower/two.py": "def f():\n    from .._upper import f"},
        UP.format(2),
    ),
    "up for annotations": (
        {"_lower/two.py": "if TYPE_CHECKING:\n    import small._upper"},
        UP.format(2),
    ),
    "up by its absolute name": (
        {"_lower/two.py": "\nfrom small import _upper"},
        UP.format(2),
    ),
    "up to the package": (
        {"_lower/two.py": "from .. import __version__"},
        "_lower/two.py:1 imports __init__.py, which is above _lower.",
    ),
    "sideways": (
        {"_beside/a.py": "from .._upper import f"},
        "_beside/a.py:1 imports _upper, which is beside _beside. Move what both need",
    ),
    "a circle": (
        {"_lower/two.py": "from .one import g"},
        "A circle: _lower/one.py:1 imports _lower/two.py, _lower/two.py:1 imports "
        "_lower/one.py. Move what both ends need to a file below them",
    ),
    "a circle of three": (
        {
            "_lower/two.py": "from .three import g",
            "_lower/three.py": "from . import one",
        },
        "A circle: _lower/one.py:1 imports _lower/two.py, _lower/two.py:1 imports "
        "_lower/three.py, _lower/three.py:1 imports _lower/one.py.",
    ),
    "a circle through the own door": (
        {"_lower/two.py": "from . import g"},
        "_lower/two.py:1 imports _lower. Move",
    ),
    "a circle with a room inside": (
        {"_upper/inner/deep.py": "from ..file import f"},
        "A circle: _upper/file.py:2 imports _upper/inner, _upper/inner/deep.py:1 "
        "imports _upper/file.py. Move",
    ),
    "past a door": (
        {"_upper/file.py": "from .._lower.one import g"},
        "_upper/file.py:1 imports _lower/one.py, past the door of _lower. " + DOOR,
    ),
    "past a door by an absolute name": (
        {"_upper/file.py": "import small._lower.one"},
        "_upper/file.py:1 imports _lower/one.py, past the door of _lower. " + DOOR,
    ),
    "a file that the door does not have": (
        {"_upper/file.py": "from .._lower import one"},
        "_upper/file.py:1 imports _lower/one.py, past the door of _lower. " + DOOR,
    ),
    "past a door from the package": (
        {"__init__.py": "from ._upper.file import f"},
        "__init__.py:1 imports _upper/file.py, past the door of _upper. " + DOOR,
    ),
    "past the door of a room inside": (
        {"_upper/file.py": "from .inner.deep import x"},
        "_upper/file.py:1 imports _upper/inner/deep.py, past the door of _upper/inner",
    ),
    "no floor": (
        {"_new/__init__.py": '"""New."""'},
        "_new is on no floor. Put it on one in the list of floors.",
    ),
    "too many files": (
        {f"_lower/a{i}.py": "" for i in range(MOST_FILES - 2)},
        "_lower has 13 files of Python, above 12. Give some of them a room of their",
    ),
    "a long file": (
        {"_lower/two.py": "x = 1\n" * (MOST_LINES + 1)},
        "_lower/two.py has 401 lines, above 400. Split it.",
    ),
    "long files": (
        {name: "x = 1\n" * 200 for name in list(SOUND)[3:] if "__init__" not in name}
        | {f"_lower/a{i}.py": "x = 1\n" * 200 for i in range(4)},
        "Half of the files have 200 lines or more, above 180. Split the long ones.",
    ),
    "no docstring": (
        {"_beside/__init__.py": "# Nothing"},
        "_beside/__init__.py has no docstring. Say there in three sentences what",
    ),
    "no docstring in a room inside": (
        {"_upper/inner/__init__.py": "from .deep import x as x"},
        "_upper/inner/__init__.py has no docstring. Say",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_a_rule(name, tmp_path):
    change, problem = BROKEN[name]
    problems = problems_with(tmp_path, change)
    assert any(problem in found for found in problems), problems
    assert all(found.endswith(".") for found in problems)


def test_a_floor_without_a_room(tmp_path):
    problems = problems_with(tmp_path, {}, (*SMALL, ("_gone",)))
    assert problems == [
        "_gone is on a floor, but not there. Take it from the list of floors."
    ]

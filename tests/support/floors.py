"""Finds violations of the rules for a package whose folders are rooms on floors, by
reading the imports of all its files."""

import ast
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


MOST_FILES = 12
MOST_LINES = 400
MOST_LINES_IN_HALF = 180

DOOR = "__init__.py"

Floors = Sequence[Sequence[str]]
"""Rooms and files right in the package, from the bottom to the top."""

Edge = tuple[str, str]
"""A file and what it imports: another file, or a folder, which is its door."""


class Import(NamedTuple):
    """One import between two files of the package; paths are relative to the
    package."""

    file: str
    line: int
    imported: str
    name: str | None = None
    """What is taken from it, where that is a file in there."""

    @property
    def edge(self) -> Edge:
        return self.file, self.imported

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.imported}"


class Package:
    """The files of a package, by their paths in its folder, and all that they import
    from each other."""

    def __init__(self, folder: Path):
        self.files = {
            file.relative_to(folder).as_posix(): file.read_text()
            for file in sorted(folder.rglob("*.py"))
        }
        self.imports = list(
            dict.fromkeys(
                found
                for file in self.files
                for found in _imports_of(file, self.files, folder.name)
            )
        )


def find_problems(package: Package, floors: Floors) -> list[str]:
    """What is wrong, each in a sentence that ends with the fix.

    **Arguments:**

    - `package`: The package.
    - `floors`: Its rooms, and the files beside them.
    """
    used = package.imports
    return [
        *_check_sizes(package.files),
        *_check_docstrings(package.files),
        *_check_floors(package.files, used, floors),
        *_check_doors(package.files, used),
        *_check_circles(used),
    ]


# Reading


def _imports_of(file: str, files: Mapping[str, str], package: str) -> Iterator[Import]:
    """Also those inside functions and under `TYPE_CHECKING`."""
    folder = file.split("/")[:-1]
    for node in ast.walk(ast.parse(files[file])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == package:
                    yield Import(file, node.lineno, _path(parts[1:], files))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                parts = [*folder[: len(folder) + 1 - node.level], *parts]
            elif parts[0] == package:
                del parts[0]
            else:
                continue
            for alias in node.names:
                yield _import_from(file, node.lineno, parts, alias.name, files)


def _import_from(
    file: str, line: int, parts: list[str], name: str, files: Mapping[str, str]
) -> Import:
    inner = _path([*parts, name], files)
    if inner == _path(parts, files):
        return Import(file, line, inner)
    own = file.split("/")[:-1]
    if parts == own[: len(parts)]:
        # A folder around the file, whose files are found without its door.
        return Import(file, line, inner)
    return Import(file, line, _path(parts, files), name)


def _path(parts: list[str], files: Mapping[str, str]) -> str:
    """The file or folder of a module. For other names, that of the module that has
    them."""
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if f"{path}.py" in files:
            return f"{path}.py"
        if f"{path}/{DOOR}" in files:
            return path
    return DOOR


# Rules


def _check_sizes(files: Mapping[str, str]) -> Iterator[str]:
    folders = [_folder(file) for file in files]
    for folder in sorted(set(folders)):
        if folders.count(folder) > MOST_FILES:
            yield (
                f"{folder or 'The package'} has {folders.count(folder)} files of "
                f"Python, above {MOST_FILES}. Give some of them a room of their own."
            )
    lines = {file: len(text.splitlines()) for file, text in files.items()}
    for file, count in lines.items():
        if count > MOST_LINES:
            yield f"{file} has {count} lines, above {MOST_LINES}. Split it."
    median = statistics.median(lines.values())
    if median > MOST_LINES_IN_HALF:
        yield (
            f"Half of the files have {median:g} lines or more, above "
            f"{MOST_LINES_IN_HALF}. Split the long ones."
        )


def _check_docstrings(files: Mapping[str, str]) -> Iterator[str]:
    for file, text in files.items():
        room = _folder(file)
        is_door = room and file == f"{room}/{DOOR}"
        if is_door and not ast.get_docstring(ast.parse(text)):
            yield (
                f"{file} has no docstring. Say there in three sentences what belongs "
                "into this room and what does not."
            )


def _check_floors(
    files: Mapping[str, str], imports: list[Import], floors: Floors
) -> Iterator[str]:
    height = {room: i for i, floor in enumerate(floors) for room in floor}
    there = dict.fromkeys(_top(file) for file in files)
    for room in [room for room in there if room not in height]:
        yield f"{room} is on no floor. Put it on one in the list of floors."
    for room in [room for room in height if room not in there]:
        yield f"{room} is on a floor, but not there. Take it from the list of floors."
    for found in imports:
        room, other = _top(found.file), _top(found.imported)
        if room == other or not {room, other} <= height.keys():
            continue
        if height[room] <= height[other]:
            where = "above" if height[room] < height[other] else "beside"
            yield (
                f"{found}, which is {where} {room}. Move what both need to a floor "
                f"below {room}, or hand it over as an argument."
            )


def _check_doors(files: Mapping[str, str], imports: list[Import]) -> Iterator[str]:
    for found in imports:
        # The first step from the common folder to the imported file.
        steps = len(_common(found.file, found.imported)) + 1
        room = "/".join(found.imported.split("/")[:steps])
        is_past = found.imported != room
        if found.name is not None and not is_past:
            is_past = found.name not in _bound(files[f"{room}/{DOOR}"])
        if is_past:
            what = f"/{found.name}.py" if found.name else ""
            yield (
                f"{found}{what}, past the door of {room}. Re-export what is needed in "
                f"{room}/{DOOR}, and import it from there."
            )


def _check_circles(imports: list[Import]) -> Iterator[str]:
    """Checks each folder separately: a circle through files of several folders is one
    between these folders."""
    graphs: dict[str, dict[str, dict[str, Import]]] = {}
    for found in imports:
        common = _common(found.file, found.imported)
        here, there = (_step(path, len(common)) for path in found.edge)
        if here != there:
            graph = graphs.setdefault("/".join(common), {})
            graph.setdefault(here, {}).setdefault(there, found)
    for graph in graphs.values():
        while circle := _shortest_circle(graph):
            steps = [graph[x][y] for x, y in zip(circle, [*circle[1:], circle[0]])]
            yield (
                f"A circle: {', '.join(map(str, steps))}. Move what both ends need to "
                "a file below them, or hand it over as an argument."
            )
            # Other circles with these files are found once this one is fixed.
            for name in circle:
                del graph[name]


def _shortest_circle(graph: Mapping[str, Mapping[str, Import]]) -> list[str]:
    circles = [circle for start in graph if (circle := _circle_from(start, graph))]
    return min(circles, key=len, default=[])


def _circle_from(start: str, graph: Mapping[str, Mapping[str, Import]]) -> list[str]:
    ways = [[start]]
    seen = set()
    for way in ways:
        for name in graph.get(way[-1], {}):
            if name == start:
                return way
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


# Paths


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _top(path: str) -> str:
    return path.split("/")[0]


def _common(file: str, imported: str) -> list[str]:
    """The deepest folder that contains both. A door belongs to its folder for the files
    inside, and stands for the folder for all others."""
    common = []
    for x, y in zip(file.split("/")[:-1], imported.split("/")):
        if x != y:
            break
        common.append(x)
    return common


def _step(path: str, depth: int) -> str:
    return (path.split("/") + [DOOR])[depth]


def _bound(door: str) -> set[str]:
    """The names that a door re-exports from the files behind it."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(door))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

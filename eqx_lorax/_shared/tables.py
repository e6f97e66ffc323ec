"""Tables as text, in which numbered siblings are one line."""

from collections.abc import Collection, Sequence


def star_numbers(path: str) -> str:
    """The path with `*` in the place of each name that is a number."""
    return ".".join("*" if name.isdecimal() else name for name in path.split("."))


def name_group(paths: list[str], is_only: bool) -> str:
    """The name of a group of targets. `is_only` says that no other group has paths
    that differ from these in numbers alone."""
    if len(paths) == 1:
        return paths[0]
    if not is_only:
        return f"{paths[0]} and {len(paths) - 1} like it"
    names = [set(column) for column in zip(*(path.split(".") for path in paths))]
    common = ".".join("*" if len(column) > 1 else column.pop() for column in names)
    return f"{common} × {len(paths)}"


def format_table(
    columns: Sequence[str], right: Collection[str], rows: Sequence[Sequence[str]]
) -> str:
    """The rows below a line of names. Columns that `right` names are aligned there."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(columns, line, widths)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * max(map(len, aligned)), *aligned[1:]])

"""Draws what an adapter is: a matrix, and two skinny ones beside it.

    python docs/draw_adapter.py

Writes `adapter-light.svg` and `adapter-dark.svg` into `docs/assets`.
"""

from pathlib import Path
from typing import NamedTuple


ROWS, COLUMNS, RANK = 256, 192, 16
FOLDER = Path(__file__).parent / "assets"


class Palette(NamedTuple):
    text: str
    faint: str
    base: str
    factor: str
    trained: str


# The colours of the site: blue for what is frozen, amber for what is trained.
PALETTES = {
    "light": Palette("#17324d", "#5b6b7b", "#d5e1ed", "#ffb03a", "#a85800"),
    "dark": Palette("#e6edf5", "#a3b3c4", "#2b5378", "#ffb03a", "#ffb03a"),
}
ON_FACTOR = "#17324d"
TOP, LEFT = 64, 60


def rectangle(x: int, y: int, width: int, height: int, fill: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" '
        f'fill="{fill}"/>'
    )


def write(x: int, y: int, text: str, fill: str, size: int = 18, extra: str = "") -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" '
        f'text-anchor="middle" {extra}>{text}</text>'
    )


def measure(x1: int, y1: int, x2: int, y2: int, colour: str) -> str:
    """A line with a short bar at each end."""
    dx, dy = (0, 5) if y1 == y2 else (5, 0)
    ends = "".join(
        f"M{x - dx} {y - dy}L{x + dx} {y + dy}" for x, y in [(x1, y1), (x2, y2)]
    )
    return f'<path d="M{x1} {y1}L{x2} {y2}{ends}" stroke="{colour}" fill="none"/>'


def draw(palette: Palette) -> str:
    text, faint, base, factor, trained = palette
    bottom, middle = TOP + ROWS, TOP + ROWS // 2
    b_left = LEFT + COLUMNS + 96
    a_left = b_left + RANK + 56
    a_middle, right = a_left + COLUMNS // 2, a_left + COLUMNS
    bold = 'font-weight="600"'
    shapes = [
        # The base.
        rectangle(LEFT, TOP, COLUMNS, ROWS, base),
        write(LEFT + COLUMNS // 2, middle + 4, "W", text, 32, bold),
        write(LEFT + COLUMNS // 2, middle + 34, "frozen", faint),
        measure(LEFT, TOP - 18, LEFT + COLUMNS, TOP - 18, faint),
        write(LEFT + COLUMNS // 2, TOP - 28, f"{COLUMNS} columns: inputs", text),
        measure(LEFT - 18, TOP, LEFT - 18, bottom, faint),
        write(
            LEFT - 30,
            middle,
            f"{ROWS} rows: outputs",
            text,
            extra=f'transform="rotate(-90 {LEFT - 30} {middle})"',
        ),
        write((LEFT + COLUMNS + b_left) // 2, middle + 8, "+  s ×", text, 22),
        # The factors.
        rectangle(b_left, TOP, RANK, ROWS, factor),
        write(b_left + RANK // 2, middle + 6, "B", ON_FACTOR, 15, bold),
        measure(b_left, TOP - 18, b_left + RANK, TOP - 18, faint),
        write(b_left + RANK // 2, TOP - 28, f"rank {RANK}", text),
        write((b_left + RANK + a_left) // 2, middle + 8, "×", text, 22),
        rectangle(a_left, middle - RANK // 2, COLUMNS, RANK, factor),
        write(a_middle, middle + 6, "A", ON_FACTOR, 15, bold),
        measure(a_left, middle - 26, right, middle - 26, faint),
        write(a_middle, middle - 36, f"{COLUMNS} columns", text),
        measure(right + 18, middle - RANK // 2, right + 18, middle + RANK // 2, faint),
        write(right + 66, middle + 5, f"rank {RANK}", text),
        write(a_middle, middle + 42, "trained", trained, 18, bold),
        # What that costs.
        write(LEFT + COLUMNS // 2, bottom + 30, f"{ROWS * COLUMNS:,} numbers", faint),
        write(
            (b_left + right) // 2,
            bottom + 30,
            f"{RANK * (ROWS + COLUMNS):,} numbers: the adapter",
            faint,
        ),
    ]
    width, height = right + 104, bottom + 48
    title = (
        f"A frozen matrix W with {ROWS} rows and {COLUMNS} columns, plus a scale times "
        f"B, with {ROWS} rows and {RANK} columns, times A, with {RANK} rows and "
        f"{COLUMNS} columns"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">',
            f"<title>{title}</title>",
            *shapes,
            "</svg>\n",
        ]
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, palette in PALETTES.items():
        path = FOLDER / f"adapter-{name}.svg"
        path.write_text(draw(palette), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()

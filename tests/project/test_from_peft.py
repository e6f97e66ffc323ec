"""The page for users of PEFT: what its tables say is what its code runs."""

import re

from paths import ROOT


PAGE = (ROOT / "docs" / "from-peft.md").read_text()


def _cells():
    """The rows of the tables of three columns, without their heads."""
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith("| in PEFT"):
            # A `|` inside of code would be another column.
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 3, line
            yield cells


def test_every_line_of_the_tables_is_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    code = re.sub(r"\s+", "", "".join(blocks))
    for _, here, _ in _cells():
        for line in re.findall(r"`([^`]+)`", here):
            assert re.sub(r"\s+", "", line) in code, line


def test_there_are_many_habits():
    rows = list(_cells())
    assert len(rows) >= 40
    # Only these have nothing to write: the third column says why.
    assert sum(not here for _, here, _ in rows) <= 6
    assert all(here or mind for _, here, mind in rows)

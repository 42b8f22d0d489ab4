"""Tables as Markdown: what is pasted is a table."""

import re

from bnext.tables import format_rows


def read(text):
    """Cells of a Markdown table, as a parser reads it: a bar with a backslash is one of a cell."""
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines()]
    assert all(line[0] == line[-1] == "" for line in lines)
    cells = [[cell.strip().replace("\\|", "|") for cell in line[1:-1]] for line in lines]
    assert all(re.fullmatch(r":?-+:?", cell) for cell in cells[1])
    return [cells[0], *cells[2:]]


def test_cells_come_back_as_they_are():
    rows = [["re-estimated", "+1.0"], ["a|b", ""], ["two\nlines", "1e5"]]
    text = format_rows(rows, ["statistics | test", "AP"])
    assert read(text) == [["statistics | test", "AP"], ["re-estimated", "+1.0"], ["a|b", ""], ["two lines", "1e5"]]
    assert text.splitlines()[1].endswith("-:|"), "numbers stand at the right"


def test_a_table_without_rows_is_one():
    assert read(format_rows([], ["a", "b"])) == [["a", "b"]]

"""Tables as Markdown: what is pasted is a table."""

from bnext.tables import format_rows
from tests.markdown import read_tables


def test_cells_come_back_as_they_are():
    rows = [["re-estimated", "+1.0"], ["a|b", ""], ["two\nlines", "1e5"]]
    text = format_rows(rows, ["statistics | test", "AP"])
    (table,) = read_tables(text)
    assert table == [["statistics | test", "AP"], ["re-estimated", "+1.0"], ["a|b", ""], ["two lines", "1e5"]]
    assert text.splitlines()[1].endswith("-:|"), "numbers stand at the right"


def test_a_table_without_rows_is_one():
    assert read_tables(format_rows([], ["a", "b"])) == [[["a", "b"]]]

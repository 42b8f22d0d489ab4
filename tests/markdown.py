"""Markdown tables as a parser reads them."""

import re

__all__ = ["read_tables"]


def read_tables(text):
    """The cells of every table of a text; a line after a table that is no blank one would be taken for its row."""
    tables, lines = [], text.splitlines()
    for number, line in enumerate(lines):
        if not re.fullmatch(r"\|(:?-+:?\|)+", line):
            continue
        rows = [_read_row(lines[number - 1])]
        for row in lines[number + 1 :]:
            if not row:
                break
            rows.append(_read_row(row))
        assert {len(row) for row in rows} == {line.count("|") - 1}
        tables.append(rows)
    return tables


def _read_row(line):
    """A bar with a backslash is one of a cell."""
    first, *cells, last = re.split(r"(?<!\\)\|", line)
    assert first == last == "", line
    return [cell.strip().replace("\\|", "|") for cell in cells]

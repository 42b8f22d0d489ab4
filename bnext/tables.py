"""The one writer of tables: Markdown, as it is pasted into issues and papers' drafts."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

__all__ = ["format_rows"]


def format_rows(rows: Sequence[Sequence[object]], headers: Sequence[str], *, num_texts: int = 1) -> str:
    """A table in Markdown, aligned as plain text, its cells as they are given, or as str() writes them.

    Args:
        rows: cells of each line.
        headers: one for each column.
        num_texts: the first columns, which are aligned at the left; numbers stand at the right.

    Example:
        >>> print(format_rows([["bbox", "35.0"]], ["task", "AP"]))
        | task   |   AP |
        |:-------|-----:|
        | bbox   | 35.0 |
    """
    aligned = ["left"] * num_texts + ["right"] * (len(headers) - num_texts)
    cells = [[_escape(cell) for cell in row] for row in rows]
    names = [_escape(header) for header in headers]
    # Numbers are not parsed, else a plus sign is dropped.
    return tabulate(cells, headers=names, disable_numparse=True, colalign=aligned, tablefmt="pipe")


def _escape(cell: object) -> str:
    """A cell as Markdown takes it for one: on one line, without a bar that begins another."""
    return " ".join(str(cell).splitlines()).replace("|", "\\|")

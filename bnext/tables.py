"""The one writer of tables."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

__all__ = ["format_rows"]


def format_rows(rows: Sequence[Sequence[str]], headers: Sequence[str], *, num_texts: int = 1) -> str:
    """A table in plain text, its cells as they are given.

    Args:
        rows: cells of each line.
        headers: one for each column.
        num_texts: the first columns, which are aligned at the left; numbers stand at the right.
    """
    aligned = ["left"] * num_texts + ["right"] * (len(headers) - num_texts)
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned)  # else a plus sign is dropped

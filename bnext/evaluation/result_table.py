"""One table of an evaluation: COCO's twelve numbers of each task, and the categories that are found worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bnext.tables import format_rows

__all__ = ["format_results"]

_MOST_CATEGORIES = 5
_CATEGORY = "AP-"  # how detectron2 begins the name of a category's AP


def format_results(
    head: str, results: Mapping[str, Any], recalls: Mapping[str, Mapping[str, float]] | None = None, where: str = ""
) -> str:
    """The results of an evaluation as a Markdown table, with the lowest APs of categories in words.

    Args:
        head: of the table.
        results: task -> name -> number.
        recalls: task -> name -> number, which the results leave out.
        where: the file that has all of it.
    """
    numbers: dict[str, dict[str, float]] = {}
    for task, metrics in results.items():
        if isinstance(metrics, Mapping):
            totals = {name: value for name, value in metrics.items() if not name.startswith(_CATEGORY)}
            numbers[task] = {**totals, **(recalls or {}).get(task, {})}

    lines = [head]
    for task in numbers:
        lines += _describe_categories(task, results[task], where)

    tables = []
    for names, tasks in _group_by_names(numbers):
        rows = [[task, *(_show(numbers[task][name]) for name in names)] for task in tasks]
        tables.append(format_rows(rows, ["", *names]))
    return "\n".join([*lines, *(["\n\n".join(tables)] if tables else [])])


def _group_by_names(numbers: Mapping[str, Mapping[str, float]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Tasks that have the same metrics share a table: those of keypoints are others than those of boxes."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for task, metrics in numbers.items():
        groups.setdefault(tuple(metrics), []).append(task)
    return list(groups.items())


def _show(value: Any) -> str:
    if isinstance(value, (int, float)):
        return f"{value:.1f}" if math.isfinite(value) else "-"
    return str(value)


def _describe_categories(task: str, metrics: Mapping[str, float], where: str) -> list[str]:
    aps: Sequence[tuple[str, float]] = [
        (name.removeprefix(_CATEGORY), value)
        for name, value in metrics.items()
        if name.startswith(_CATEGORY) and math.isfinite(value)
    ]
    if not aps:
        return []

    lowest = sorted(aps, key=lambda pair: pair[1])
    shown = ", ".join(f"{name}: {value:.1f}" for name, value in lowest[:_MOST_CATEGORIES])
    left = len(lowest) - _MOST_CATEGORIES
    more = f" and {left} more{f' ({where})' if where else ''}" if left > 0 else ""
    return [f"{task} AP of categories, lowest first: {shown}{more}."]

"""Bars of several models on one set: COCO AP by size and by class, and what their boxes are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnext.evaluation.detections import Examined
from bnext.evaluation.matching import OUTCOMES
from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.text import escape_math, flatten_text

__all__ = ["draw_bars"]

_METRICS = {
    "AP": "AP",
    "AP50": "IoU\n0.50",
    "AP75": "IoU\n0.75",
    "APs": "small",
    "APm": "medium",
    "APl": "large",
    "AR100": "recall",
}
_COUNTS = {name: words.replace(" ", "\n") for name, words in OUTCOMES.items()}
_CLASS = "bbox/AP-"
_MOST_CLASSES = 20
_TEXT = 13  # pixels


def draw_bars(columns: Sequence[Examined], path: str | os.PathLike[str], *, note: str = "") -> Path:
    """Draw AP by size, how many boxes are what, and AP by class: a colour for each model.

    Args:
        columns: models that have examined all images of an annotated set.
        path: of the PNG; written whole.
        note: below the bars, such as the set and the thresholds.
    """
    classes, num_more = _choose_classes(columns)
    titles = [escape_math(flatten_text(column.title)) for column in columns]
    num_titles = max(1, min(3, int(960 / (60 + 8 * max(map(len, titles))))))  # beside each other
    rows: list[list[str]] = [["sizes", "counts"]]
    heights = [330]
    if len(columns) > 2:  # else their numbers would not stand side by side
        rows, heights = [["sizes"], ["counts"]], [300, 300]
    if classes:
        rows.append(["classes"] * len(rows[0]))
        heights.append(74 + len(classes) * (16 * len(columns) + 8))

    figure = make_figure(1000, sum(heights) + 50 + 22 * math.ceil(len(titles) / num_titles))
    panels: Any = rows
    axes = figure.subplot_mosaic(panels, height_ratios=heights)

    sizes = {words: [column.metrics.get(f"bbox/{name}") for column in columns] for name, words in _METRICS.items()}
    handles = _draw_groups(axes["sizes"], sizes, "{:.1f}")
    axes["sizes"].set_title("COCO AP: all, at one IoU, by size; average recall")

    counted = [column.count() for column in columns]
    counts = {words: [each[name] for each in counted] for name, words in _COUNTS.items()}
    _draw_groups(axes["counts"], counts, "{:.0f}")
    axes["counts"].set_title("Boxes, and missed objects, by what they are")

    if classes:
        _draw_classes(axes["classes"], columns, classes)
        more = f" (the {len(classes)} that differ most; {num_more} more)" if num_more else ""
        axes["classes"].set_title(f"COCO AP by class{more}")
    for each in axes.values():
        style_axes(each, pixels=_TEXT)

    size = to_points(_TEXT)
    options: dict[str, Any] = {"ncols": num_titles, "fontsize": size, "frameon": False}
    figure.legend(handles, titles, loc="outside upper center", **options)
    if note:
        figure.supxlabel(note, fontsize=size, color="#666666", parse_math=False)
    return save_figure(figure, path)


def _choose_classes(columns: Sequence[Examined]) -> tuple[list[str], int]:
    """Classes that have an AP, in the set's order, and how many are left out: those that differ least."""
    known = []
    for name in columns[0].names:
        given = [column.metrics.get(f"{_CLASS}{name}") for column in columns]
        aps = [ap for ap in given if ap is not None]
        if len(aps) == len(columns):
            known.append((name, max(aps) - min(aps) if len(aps) > 1 else -aps[0]))

    differing = sorted(known, key=lambda each: -each[1])[:_MOST_CLASSES]
    chosen = {name for name, _ in differing}
    return [name for name, _ in known if name in chosen], len(known) - len(chosen)


def _draw_groups(axes: Any, groups: Mapping[str, Sequence[float | None]], form: str) -> list[Any]:
    """A group of bars for each entry, with its numbers; the bars of each model."""
    number = len(next(iter(groups.values())))
    width, drawn = 0.84 / number, []

    for index in range(number):
        places = [group + (index - (number - 1) / 2) * width for group in range(len(groups))]
        values = [group[index] for group in groups.values()]
        bars = axes.bar(places, [value or 0 for value in values], width, color=PLAIN[index % len(PLAIN)])
        labels = ["-" if value is None else form.format(value) for value in values]
        rotation = 90 if number > 2 else 0
        axes.bar_label(bars, labels, padding=2, fontsize=to_points(12), rotation=rotation)
        drawn.append(bars)

    axes.set_xticks(range(len(groups)), list(groups))
    axes.margins(y=0.16)
    axes.set_ylim(0, None if axes.dataLim.y1 > 0 else 1)
    axes.tick_params(axis="x", length=0)
    return drawn


def _draw_classes(axes: Any, columns: Sequence[Examined], classes: Sequence[str]) -> None:
    height = 0.84 / len(columns)

    for index, column in enumerate(columns):
        places = [place + (index - (len(columns) - 1) / 2) * height for place in range(len(classes))]
        aps = [column.metrics[f"{_CLASS}{name}"] or 0.0 for name in classes]
        bars = axes.barh(places, aps, height, color=PLAIN[index % len(PLAIN)])
        axes.bar_label(bars, [f"{ap:.1f}" for ap in aps], padding=3, fontsize=to_points(12))

    axes.set_yticks(range(len(classes)), [escape_math(flatten_text(name, most=30)) for name in classes])
    axes.invert_yaxis()
    axes.margins(x=0.06, y=0.02)
    axes.set_xlim(0, None if axes.dataLim.x1 > 0 else 1)

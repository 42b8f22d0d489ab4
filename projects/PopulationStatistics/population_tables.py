"""Tables and plot of the study of population statistics, beside the paper's numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator

from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.tables import format_rows

__all__ = ["MOVING_AVERAGE", "draw_results", "format_tables"]

MOVING_AVERAGE = "moving_average"
# ImageNet validation error in %, ResNet-50, moving average and N samples; Wu and Johnson 2021, Table 1.
_PAPER_SAMPLES = (10, 100, 1000, 10_000)
_PAPER_TRAINING = {
    "batch 256, epoch 100": (23.7, 28.1, 24.0, 23.57, 23.54),
    "batch 8192, epoch 30": (52.8, 45.5, 40.1, 39.44, 39.42),
    "batch 8192, epoch 100": (24.0, 29.0, 24.1, 23.77, 23.73),
}
# ImageNet error in % by NBS: training images and validation images by the mini-batch, validation images by population
# statistics; the same, Table 2.
_PAPER_SIZES = {8: (13.5, 25.1, 24.3), 4: (15.1, 25.5, 26.4), 2: (16.5, 26.0, 32.5)}
_WAYS = {
    "mini_batch_train": "mini-batch, training images",
    "mini_batch_val": "mini-batch, validation images",
    "population_val": "population, validation images",
    MOVING_AVERAGE: "moving average, validation images",
}


def format_tables(results: Mapping[str, Any], title: str) -> str:
    """Our numbers, part by part, each above the paper's."""
    parts = []

    iterations = _select(results["rows"], "iteration")
    if iterations:
        parts += [_format_training(iterations, title), _format_paper_training()]

    sizes = _select(results["rows"], "nbs", reverse=True)
    if sizes:
        parts.append(_format_sizes(sizes, title))

    return "\n\n".join(parts)


def _select(rows: Mapping[str, Any], kind: str, reverse: bool = False) -> dict[str, Any]:
    """The rows of a kind, by their number."""
    numbers = {int(row.split("_")[1]): row for row in rows if row.startswith(f"{kind}_")}
    return {numbers[number]: rows[numbers[number]] for number in sorted(numbers, reverse=reverse)}


def _format_training(rows: Mapping[str, Any], title: str) -> str:
    kinds = _find_kinds(rows)

    lines = []
    for row, values in rows.items():
        aps = [_show(values.get(f"{kind}/AP"), 1) for kind in kinds]
        losses = [_show(values.get(f"{kind}/loss"), 3) for kind in kinds]
        lines += [[row.split("_")[1], "AP", *aps], ["", "loss", *losses]]

    headers = [f"iteration, {title}", "", *(_name(kind) for kind in kinds)]
    return format_rows(lines, headers, num_texts=2)


def _find_kinds(rows: Mapping[str, Any]) -> list[str]:
    """The moving average, and the numbers of images in their order."""
    numbers = set()
    for values in rows.values():
        for key in values:
            if key.startswith("samples_") and key.endswith("/loss"):
                numbers.add(int(key.removesuffix("/loss").split("_")[1]))
    return [MOVING_AVERAGE, *(f"samples_{number}" for number in sorted(numbers))]


def _name(kind: str) -> str:
    return "moving average" if kind == MOVING_AVERAGE else f"N = {int(kind.split('_')[1]):,}"


def _format_paper_training() -> str:
    headers = ["ImageNet error %, paper", "moving average", *(f"N = {number:,}" for number in _PAPER_SAMPLES)]
    return format_rows([[training, *map(str, errors)] for training, errors in _PAPER_TRAINING.items()], headers)


def _format_sizes(rows: Mapping[str, Any], title: str) -> str:
    """As the paper's Table 2: a column for each NBS, of loss, AP and the paper's error."""
    lines = [[words] for words in _WAYS.values()]
    headers = ["statistics and images"]
    for values in rows.values():
        size = values["reading/normalization_batch_size"]
        headers += [f"NBS {size}\nloss {title}", f"\nAP {title}", "ImageNet error %\n(paper)"]
        paper = [*map(str, _PAPER_SIZES.get(size, ["n.r."] * 3)), "n.r."]
        for line, way, error in zip(lines, _WAYS, paper, strict=True):
            ap = values["bbox/AP"] if way == MOVING_AVERAGE else values.get(f"reading/{way}_AP")
            line += [_show(values[f"reading/{way}_loss"], 3), _show(ap, 1), error]

    for key, words in (("generalization_gap", "generalization gap"), ("inconsistency", "train-test inconsistency")):
        line = [words]
        for values in rows.values():
            line += [_show(values[f"reading/{key}"], 3, "+"), "", ""]
        lines.append(line)

    return format_rows(lines, headers)


def _show(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def draw_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP and loss against the number of images, a curve for each checkpoint; its moving average is a dashed line.

    Args:
        results: the content of results.json.
        path: of the PNG; written whole.
    """
    rows = _select(results["rows"], "iteration")
    kinds = _find_kinds(rows)[1:]
    places = range(len(kinds))  # evenly: a logarithmic axis cannot be drawn where no loss is finite

    figure = make_figure(1000, 440)
    for axes, (key, name) in zip(figure.subplots(1, 2), (("AP", "COCO AP"), ("loss", "validation loss")), strict=True):
        for index, (row, values) in enumerate(rows.items()):
            curve = [_as_drawn(values.get(f"{kind}/{key}")) for kind in kinds]
            axes.plot(places, curve, "o-", color=PLAIN[index % len(PLAIN)], label=f"iteration {row.split('_')[1]}")
            axes.axhline(
                _as_drawn(values.get(f"{MOVING_AVERAGE}/{key}")), color=PLAIN[index % len(PLAIN)], linestyle="--"
            )
        axes.plot([], [], "k--", label="its moving average")

        axes.set_xticks(places, [kind.split("_")[1] for kind in kinds])
        axes.set_xlabel("training images N of the population statistics")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        style_axes(axes)
        _scale(axes)

    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=5, fontsize=to_points(13), frameon=False)
    return save_figure(figure, path)


def _scale(axes: Any) -> None:
    """A logarithmic axis, with plain numbers, where a loss is many times another."""
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 8 * low and axes.get_ylabel() != "COCO AP":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def _as_drawn(value: float | None) -> float:
    return math.nan if value is None else value

"""Table and picture of AP by corruption and severity; see `bnext.evaluation.robustness`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnext.data.corruptions.names import COMMON, SEVERITIES
from bnext.evaluation.robustness import is_as_published, summarize
from bnext.figures import GREY, INK, make_figure, save_figure, style_axes, to_points
from bnext.tables import format_rows
from bnext.text import escape_math

__all__ = ["describe_summary", "draw_robustness", "format_robustness"]

_METRIC = "bbox/AP"
_TEXT = 13  # pixels


def describe_summary(results: Mapping[str, Any], corruptions: Sequence[str], severities: Sequence[int]) -> str:
    """P, mPC and rPC in a line, and over what they are taken where that is not all of COCO-C."""
    summary = summarize(results, corruptions, severities)
    relative = "-" if summary["rPC"] is None else f"{100 * summary['rPC']:.1f} %"
    words = f"P {summary['P']:.1f}, mPC {summary['mPC']:.1f}, rPC {relative}"
    if is_as_published(corruptions, severities):
        return words

    listed = ", ".join(map(str, severities))
    noun = "severity" if len(severities) == 1 else "severities"
    return (
        f"{words}, over {len(corruptions)} corruptions and {noun} {listed}: those of papers are over the "
        f"{len(COMMON)} of COCO-C and severities 1 to {max(SEVERITIES)}"
    )


def format_robustness(results: Mapping[str, Any], corruptions: Sequence[str], severities: Sequence[int]) -> str:
    """A table of box AP, a row for each corruption, with its mean and what that is of the clean AP."""
    summary = summarize(results, corruptions, severities)
    clean = summary["P"]

    rows = [["none", *[""] * len(severities), f"{clean:.1f}", ""]]
    for corruption in corruptions:
        mean = summary["means"][corruption]
        aps = [results["corrupted"][corruption][str(severity)][_METRIC] for severity in severities]
        share = f"{100 * mean / clean:.0f} %" if clean else "-"
        rows.append([corruption, *(f"{ap:.1f}" for ap in aps), f"{mean:.1f}", share])

    table = format_rows(rows, ["box AP", *(f"severity {severity}" for severity in severities), "mean", "of clean"])
    return f"{table}\n\n{describe_summary(results, corruptions, severities)}."


def draw_robustness(
    results: Mapping[str, Any],
    corruptions: Sequence[str],
    severities: Sequence[int],
    path: str | os.PathLike[str],
    *,
    note: str = "",
) -> Path:
    """A cell for each corruption and severity, coloured by its AP, with the mean at the right.

    Args:
        results, corruptions, severities: see `summarize`.
        path: of the PNG; written whole.
        note: below the cells, such as the set and the statistics.
    """
    summary = summarize(results, corruptions, severities)
    columns = [str(severity) for severity in severities]
    aps = [[results["corrupted"][corruption][column][_METRIC] for column in columns] for corruption in corruptions]
    values = np.array([[*row, summary["means"][name]] for row, name in zip(aps, corruptions, strict=True)])
    top = max(summary["P"], values.max(), 1e-9)

    figure = make_figure(260 + 84 * values.shape[1], 130 + 34 * len(corruptions))
    axes = figure.subplots()
    axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        color = "white" if value > 0.55 * top else INK
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=to_points(_TEXT))

    axes.axvline(len(columns) - 0.5, color="white", linewidth=to_points(6))
    axes.set_xticks(range(len(columns) + 1), [*(f"severity {column}" for column in columns), "mean"])
    axes.set_yticks(range(len(corruptions)), [name.replace("_", " ") for name in corruptions])
    axes.set_title(f"Box AP: {describe_summary(results, corruptions, severities).partition(', over ')[0]}")
    style_axes(axes, pixels=_TEXT)

    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    if note:
        axes.set_xlabel(escape_math(note), color=GREY)
    return save_figure(figure, path)

"""Pictures of the study: errors against the normalization batch size beside the paper's, and what makes it collapse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from size_setting import SizeSetting
from size_tables import PAPER, PAPER_SIZES
from size_trials import AXES, list_axis, name_trial

from bnext.figures import COLORS, GREY, PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.setting import read_setting
from bnext.studies.spread import summarize
from bnext.studies.trials import collect

__all__ = ["draw_axes", "draw_sizes"]

# Error -> its words, colour, marker.
_CURVES = {
    "train": ("training, mini-batch", COLORS["black"], "s"),
    "val": ("validation, mini-batch", COLORS["blue"], "o"),
    "moving_average": ("population, moving average", COLORS["orange"], "^"),
    "mini_batch": ("population, re-estimated", COLORS["vermillion"], "D"),
    "whole_batch": ("re-estimated, whole batches", COLORS["pink"], "P"),
    "layer_by_layer": ("re-estimated, layer by layer", COLORS["green"], "v"),
    "frozen": ("FrozenBN for the last fifth", COLORS["sky"], "X"),
}
_IN_SIZES = ("train", "val", "mini_batch", "layer_by_layer", "frozen")
_GAP, _INCONSISTENCY = "#D9D9D9", "#F7D3BF"
_TEXT = 13  # pixels


def draw_sizes(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path | None:
    """A panel for each contrast, and the paper's: errors against NBS; gap and inconsistency are the areas between them.

    Args:
        results: of the study.
        path: of the PNG; written whole. None comes back where no contrast has two sizes.
    """
    setting = read_setting(SizeSetting, results)
    panels = {}
    for contrast in setting.contrasts:
        sizes = [size for size in setting.sizes if name_trial(contrast, size) in results["trials"]]
        if len(sizes) > 1:
            names = [name_trial(contrast, size) for size in sizes]
            title = f"{setting.dataset} as they are" if contrast == 0 else f"{setting.dataset} of contrast {contrast:g}"
            panels[title] = (sizes, {key: _summarize(results, names, key) for key in _IN_SIZES})
    if not panels:
        return None

    paper = {key: ([float(error) for error in errors], [0.0] * len(errors)) for key, errors in PAPER.items()}
    panels["ImageNet, ResNet-50 (paper, Table 2)"] = (list(PAPER_SIZES), paper)

    figure = make_figure(400 * len(panels), 470)
    for axes, (title, (sizes, curves)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _draw_sizes(axes, sizes, curves)
        axes.set_title(title)
        style_axes(axes, pixels=_TEXT)

    handles, labels = figure.axes[0].get_legend_handles_labels()
    options = {"ncols": 4, "fontsize": to_points(_TEXT), "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", **options)
    return save_figure(figure, path)


def _draw_sizes(axes: Any, sizes: Sequence[int], curves: Mapping[str, tuple[list[float], list[float]]]) -> None:
    places = range(len(sizes))
    train, val, population = (curves[key][0] for key in ("train", "val", "mini_batch"))
    axes.fill_between(places, train, val, color=_GAP, label="generalization gap", linewidth=0)
    axes.fill_between(places, val, population, color=_INCONSISTENCY, label="train-test inconsistency", linewidth=0)

    for key, (means, deviations) in curves.items():
        words, color, marker = _CURVES[key]
        axes.errorbar(places, means, deviations, color=color, marker=marker, markersize=5, capsize=2, label=words)
    axes.set_xticks(places, [str(size) for size in sizes], fontsize=to_points(11))
    axes.set_xlabel("normalization batch size (images)")
    axes.set_ylabel("error (%)")
    axes.set_ylim(0, None)
    axes.grid(axis="y", alpha=0.3)


def draw_axes(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path | None:
    """Left: errors at the smallest NBS against the contrast. Right: the inconsistency along the other axes.

    Args:
        results: of the study.
        path: of the PNG; written whole. None comes back where the contrast or the other axes were not trained.
    """
    setting = read_setting(SizeSetting, results)
    smallest, trained = min(setting.sizes), results["trials"]
    contrasts = [contrast for contrast in setting.spreads if name_trial(contrast, smallest) in trained]
    rows = _list_rows(results)
    if len(contrasts) < 2 or len(rows) < 2:
        return None

    figure = make_figure(1160, 560)
    left, right = figure.subplots(1, 2)
    _draw_contrasts(left, results, contrasts, smallest)
    _draw_inconsistencies(right, results, rows, smallest)
    for axes in (left, right):
        style_axes(axes, pixels=_TEXT)

    handles, labels = left.get_legend_handles_labels()
    options = {"ncols": 4, "fontsize": to_points(_TEXT), "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", **options)
    return save_figure(figure, path)


def _draw_contrasts(axes: Any, results: Mapping[str, Any], contrasts: Sequence[float], size: int) -> None:
    names = [name_trial(contrast, size) for contrast in contrasts]
    for key, (words, color, marker) in _CURVES.items():
        means, deviations = _summarize(results, names, key)
        options = {"color": color, "marker": marker, "markersize": 5, "capsize": 2, "label": words}
        axes.errorbar(contrasts, means, deviations, **options)

    axes.set_title(f"NBS {size}: images that differ in contrast")
    axes.set_xlabel("standard deviation of the logarithm of the contrast")
    axes.set_ylabel("error (%)")
    axes.set_ylim(0, None)
    axes.grid(axis="y", alpha=0.3)


def _list_rows(results: Mapping[str, Any]) -> dict[str, dict[float, str]]:
    """Values of the other axes in words -> contrast -> name of the training, where there is one."""
    setting = read_setting(SizeSetting, results)
    rows: dict[str, dict[float, str]] = {}
    for axis, (field, words) in AXES.items():
        for contrast in setting.contrasts:
            names = list_axis(setting, contrast, axis)
            for value, name in zip(getattr(setting, field), names, strict=True):
                if name in results["trials"]:
                    rows.setdefault(f"{words} {value:g}", {})[contrast] = name
    return rows


def _draw_inconsistencies(
    axes: Any, results: Mapping[str, Any], rows: Mapping[str, Mapping[float, str]], size: int
) -> None:
    """A line for each value of an axis: seeds as dots, their mean as a marker, for each contrast."""
    setting = read_setting(SizeSetting, results)
    for number, contrast in enumerate(setting.contrasts):
        color = PLAIN[number]
        words = "as they are" if contrast == 0 else f"contrast {contrast:g}"
        for place, names in enumerate(rows.values()):
            if contrast in names:
                validation, population = (collect(results, names[contrast], key) for key in ("val", "mini_batch"))
                differences = [two - one for one, two in zip(validation, population, strict=True)]
                axes.plot(differences, [place] * len(differences), ".", color=color, markersize=5, alpha=0.6)
                axes.plot(summarize(differences).mean, place, "D", color=color, markersize=7)
        axes.plot([], [], "D", color=color, label=words)

    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) + 2.6, -0.7)  # the legend has room below
    axes.set_xlabel("re-estimated less mini-batch, validation error (points)")
    axes.set_title(f"NBS {size}: the other axes")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=to_points(_TEXT), loc="lower right", title="dots are seeds")


def _summarize(results: Mapping[str, Any], names: Sequence[str], key: str) -> tuple[list[float], list[float]]:
    """Means and standard deviations of an error over seeds."""
    spreads = [summarize(collect(results, name, key)) for name in names]
    return [spread.mean for spread in spreads], [spread.deviation for spread in spreads]

"""The picture of the study of classifiers: patterns beside the paper's, repairs, and axes on which the leak grows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leak_setting import LeakSetting
from leak_tables import PAPER, WAYS, list_measured

from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.setting import read_setting
from bnext.studies.spread import summarize
from bnext.studies.trials import collect

__all__ = ["draw_leak"]

_TEXT = 13  # pixels
_CURVES = {"share": "share of the images that are in the pattern", "length": "steps of the training"}
_REPAIRS = ("no repair", "random\ngroups", "dealt\nstatistics", "one batch\nof all")


def draw_leak(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Bars of patterns and repairs, curves along the share and the length; means and deviations over seeds.

    Args:
        results: of the study.
        path: of the PNG; written whole.
    """
    pattern = read_setting(LeakSetting, results).pattern
    figure = make_figure(1160, 800)
    (top, repairs), curves = figure.subplots(2, 2, width_ratios=(3, 2))

    patterns = {
        label: _summarize(results, training.name) for label, training in list_measured(results, "pattern").items()
    }
    paper = {way: summarize([value]) for way, value in PAPER.items()}
    _draw_bars(top, {**patterns, "16 x 2\nImageNet\n(paper)": paper})
    top.set_title("classes x images of a normalization batch of the training")

    measured = list_measured(results, "repair")
    names = dict(zip(_REPAIRS, measured.values(), strict=False))
    _draw_bars(repairs, {label: _summarize(results, training.name) for label, training in names.items()})
    repairs.set_title(f"repairs of {pattern}")

    for axes, (axis, words) in zip(curves, _CURVES.items(), strict=True):
        _draw_curve(axes, {float(label): each.name for label, each in list_measured(results, axis).items()}, results)
        axes.set_xlabel(words)
        axes.set_title(f"{pattern}: the {axis}")
    for axes in figure.axes:
        axes.set_ylabel("validation error (%)")
        axes.set_ylim(0, 100)
        axes.grid(axis="y", alpha=0.3)
        style_axes(axes, pixels=_TEXT)

    handles, labels = top.get_legend_handles_labels()
    options = {"ncols": 3, "fontsize": to_points(_TEXT), "frameon": False, "title": "statistics at test"}
    figure.legend(handles, labels, loc="outside lower center", **options)
    return save_figure(figure, path)


def _summarize(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {way: summarize(collect(results, name, f"error/{way}")) for way in WAYS}


def _draw_bars(axes: Any, groups: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.84 / len(WAYS)
    for number, (way, words) in enumerate(WAYS.items()):
        places = [group + (number - 1) * width for group in range(len(groups))]
        means = [spreads[way].mean for spreads in groups.values()]
        deviations = [spreads[way].deviation if spreads[way].number > 1 else 0 for spreads in groups.values()]
        bars = axes.bar(places, means, width, yerr=deviations, color=PLAIN[number], label=words, capsize=2)
        axes.bar_label(bars, [f"{mean:.0f}" for mean in means], fontsize=to_points(12), padding=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)


def _draw_curve(axes: Any, names: Mapping[float, str], results: Mapping[str, Any]) -> None:
    for number, (way, words) in enumerate(WAYS.items()):
        spreads = [_summarize(results, name)[way] for name in names.values()]
        means, deviations = [each.mean for each in spreads], [each.deviation for each in spreads]
        axes.errorbar(
            list(names), means, deviations, color=PLAIN[number], marker="o", markersize=5, capsize=2, label=words
        )
    axes.set_xticks(list(names))

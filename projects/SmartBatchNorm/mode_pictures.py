"""Pictures of the four modes: accuracy by epoch, erratic curves by rate, AP along a training."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mode_detector import NUM_READINGS
from mode_tables import CURVES, collect_curves, measure_change
from mode_trials import name_trial

from bnext.figures import COLORS, GREY, make_figure, save_figure, style_axes, to_points
from bnext.studies.trials import collect

__all__ = ["draw_curves", "draw_detector", "draw_rates"]

_COLORS = (GREY, COLORS["vermillion"], COLORS["blue"])  # of CURVES
_PANELS = (  # title, training, validation between epochs, test at the end
    ("1: no norm", "none", "none", "none"),
    ("2: batch norm, moving averages at test", "bn", "moving_average", "moving_average"),
    ("3: mini-batches, statistics of nobody at test", "bn", "mini_batch", "fresh"),
    ("4: mini-batches, an estimate at test", "bn", "mini_batch", "estimated"),
)


def draw_curves(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Four panels, one a mode: accuracy by epoch, a line for each seed, and a star for each seed's test at the end.

    Args:
        results: of the small net.
        path: of the PNG; written whole.
    """
    setting = results["setting"]
    epochs = range(1, setting["epochs"] + 1)
    figure = make_figure(1000, 640)
    panels = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)

    for axes, (title, norm, reading, test) in zip(panels, _PANELS, strict=True):
        trial = name_trial(norm, setting["learning_rate"])
        for key, color, name in (("train", GREY, "training images"), (f"val/{reading}", COLORS["blue"], "validation")):
            for number, curve in enumerate(collect_curves(results, trial, key)):
                axes.plot(epochs, curve, color=color, alpha=0.75, label=None if number else name)

        size = setting["test_batch_sizes"][0]
        last = collect(results, trial, f"test/{test}/{size}")
        place = [setting["epochs"] + 0.6] * len(last)
        axes.plot(place, last, "*", color=COLORS["vermillion"], markersize=11, label=f"test, {size} image(s) at a time")
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)

    for axes in (panels[2], panels[3]):
        axes.set_xlabel("epoch")
    for axes in (panels[0], panels[2]):
        axes.set_ylabel("accuracy, %")
    for axes in panels:
        style_axes(axes)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=to_points(13), frameon=False)
    return save_figure(figure, path)


def draw_rates(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Change of validation between epochs, and accuracy reached, by learning rate: dots for seeds, a line of means."""
    setting = results["setting"]
    rates = sorted(setting["rates"])
    panels = (
        ("validation, change between epochs, points", measure_change),
        ("validation, last epoch, %", lambda curve: curve[-1]),
    )

    figure = make_figure(1000, 400)
    for axes, (words, measure) in zip(figure.subplots(1, 2), panels, strict=True):
        for (title, norm, reading), color in zip(CURVES, _COLORS, strict=True):
            values = []
            for rate in rates:
                curves = collect_curves(results, name_trial(norm, rate), f"val/{reading}")
                values.append([measure(curve) for curve in curves])
                axes.plot([rate] * len(curves), values[-1], "o", color=color, markersize=4, alpha=0.6)
            axes.plot(rates, _average(values), "-", color=color, label=title)

        axes.set_xscale("log")
        axes.set_xlabel("learning rate of Adam")
        axes.set_ylabel(words)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        style_axes(axes)

    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=to_points(13), frameon=False)
    return save_figure(figure, path)


def draw_detector(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP along the trainings, a thin line for each seed, and AP at test by what normalizes."""
    figure = make_figure(1000, 400)
    left, right = figure.subplots(1, 2)

    readings = range(1, NUM_READINGS + 1)
    for (title, norm, reading), color in zip(CURVES, _COLORS, strict=True):
        curves = collect_curves(results, norm, f"val/{reading}")
        for curve in curves:
            left.plot(readings, curve, color=color, alpha=0.3)
        if curves:
            left.plot(readings, _average(list(zip(*curves, strict=True))), color=color, label=title)
    left.set_xlabel("eighth of the training")
    left.set_ylabel("validation, COCO AP")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=to_points(13))

    tests = (
        ("1: no norm", "none", "none/1"),
        ("2: moving\naverage", "bn", "moving_average/1"),
        ("3: 1 image,\nmini-batch", "bn", "mini_batch/1"),
        ("3: fresh", "bn", "fresh/1"),
        ("3: stale", "bn", "stale/1"),
        ("4: estimate", "bn", "estimated/1"),
    )
    for place, (_, norm, reading) in enumerate(tests):
        values = collect(results, norm, f"test/{reading}")
        if values:
            right.bar(place, statistics.fmean(values), color=_COLORS[min(int(tests[place][0][0]) - 1, 2)], alpha=0.85)
        right.plot([place] * len(values), values, "o", color="black", markersize=4)
    right.set_xticks(range(len(tests)), [title for title, _, _ in tests])
    right.set_ylabel("test at the end, COCO AP")

    for axes in (left, right):
        axes.grid(alpha=0.3, axis="y")
        style_axes(axes, pixels=12)
    return save_figure(figure, path)


def _average(values: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(each) if each else float("nan") for each in values]

"""Pictures of the study, from its results: one for each part."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from question_tables import average_distances, list_keys, name
from roi_question import CHOICES
from trained_detectors import HEADS

from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.spread import summarize
from bnext.studies.trials import collect

__all__ = ["draw_results"]

_ROWS = (("shared", "row 1 → 2"), ("per_level", "row 3 → 4"))


def draw_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The picture of the part that the results are of; bars and bands are standard deviations over seeds."""
    draws = {"groups": _draw_groups, "levels": _draw_levels, "repair": _draw_repair, "rois": _draw_rois}
    part = next(part for part in draws if part in results["trials"])

    figure = make_figure(1000, 420)
    draws[part](figure, results)
    for axes in figure.axes:
        style_axes(axes, pixels=13)
    return save_figure(figure, path)


def _draw_groups(figure: Any, results: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    width = 0.8 / len(HEADS)
    for number, test in enumerate(HEADS):
        spreads = [summarize(collect(results, "groups", f"{training}/{test}/AP")) for training in HEADS]
        places = [place + (number - (len(HEADS) - 1) / 2) * width for place in range(len(HEADS))]
        means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
        axes.bar(places, means, width * 0.92, yerr=deviations, capsize=3, color=PLAIN[number], label=name(test))

    axes.set_xticks(range(len(HEADS)), [f"{name(training)}" for training in HEADS])
    axes.set_xlabel("mini-batches in training")
    axes.set_ylabel("COCO AP")
    _add_legend(figure, axes, "populations at test")


def _draw_levels(figure: Any, results: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    shares = list_keys(results, "levels", "shared/shares")
    for number, (training, label) in enumerate(_ROWS):
        for size, style in (("APs", "--"), ("APm", ":"), ("AP", "-")):
            spreads = [summarize(collect(results, "levels", f"{training}/shares/{key}/{size}")) for key in shares]
            means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
            words = {"AP": label, "APs": f"{label}, small objects", "APm": f"{label}, medium objects"}[size]
            bars = deviations if size == "AP" else None
            axes_of = {"color": PLAIN[number], "linestyle": style, "marker": "o", "markersize": 4, "label": words}
            left.errorbar([float(key) for key in shares], means, bars, capsize=3, **axes_of)
    left.set_xlabel("share of the way from one population to one per level")
    left.set_ylabel("COCO AP")
    left.set_ylim(bottom=0)

    levels = list_keys(results, "levels", "shared/levels")
    depths = range(len(list_keys(results, "levels", "shared/depths")))
    for number, level in enumerate(levels):
        for (training, label), style in zip(_ROWS, ("-", "--"), strict=True):
            means = [statistics.fmean(average_distances(results, training, depth, level)) for depth in depths]
            words = f"{level}, {label[:5]}"
            right.plot([depth + 1 for depth in depths], means, style, color=PLAIN[number], marker="o", label=words)
    right.set_yscale("log")
    right.set_xticks([depth + 1 for depth in depths])
    right.set_xlabel("norm of a tower, from the input")
    right.set_ylabel("distance from the shared mean,\nstandard deviations of the level")
    left.legend(frameon=False, fontsize=to_points(11))
    right.legend(frameon=False, fontsize=to_points(11), loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_repair(figure: Any, results: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    keys = list_keys(results, "repair", "images")
    numbers = [int(key) for key in keys]
    for place, (seed, of_seed) in enumerate(results["trials"]["repair"].items()):
        label = f"training of seed {seed}"
        for key in keys:
            aps = of_seed["images"][key]["AP"]
            left.plot([int(key)] * len(aps), aps, "o", color=PLAIN[place], markersize=4)
        means = [statistics.fmean(of_seed["images"][key]["AP"]) for key in keys]
        left.plot(numbers, means, color=PLAIN[place], label=label)
        left.axhline(of_seed["as trained"]["AP"], color=PLAIN[place], linestyle=":")
    left.set_ylabel("COCO AP; dotted: before the repair")
    left.legend(frameon=False, fontsize=to_points(12))

    for place, level in enumerate(list_keys(results, "repair", f"images/{keys[0]}/error/0")):
        errors = []
        for key in keys:
            draws = [
                draw for of_seed in results["trials"]["repair"].values() for draw in of_seed["images"][key]["error"]
            ]
            errors.append(statistics.fmean(draw[level] for draw in draws))
        right.plot(numbers, errors, marker="o", color=PLAIN[place], label=level)
    right.set_yscale("log")
    right.set_ylabel("error of a level's mean, standard deviations")
    right.legend(frameon=False, fontsize=to_points(12))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(numbers, keys)
        axes.minorticks_off()
        axes.set_xlabel("images of the repair")


def _draw_rois(figure: Any, results: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    kinds = ("as trained", *CHOICES, "mini_batch")
    spreads = [summarize(collect(results, "rois", f"AP/{kind}/AP")) for kind in kinds]
    means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
    left.bar(range(len(kinds)), means, yerr=deviations, capsize=3, color=PLAIN[0])
    left.set_xticks(range(len(kinds)), ["as trained", "sampled", "top scored", "mini-batch"])
    left.set_xlabel("statistics at test")
    left.set_ylabel("COCO AP")

    paths = list_keys(results, "rois", "distances")
    for number, (of, label) in enumerate((("mean", "means"), ("ratio", "log ratio of deviations"))):
        spreads = [summarize(collect(results, "rois", f"distances/{path}/{of}")) for path in paths]
        means, deviations = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
        places = [place + (number - 0.5) * 0.4 for place in range(len(paths))]
        right.bar(places, means, 0.36, yerr=deviations, capsize=3, color=PLAIN[number], label=label)
    right.set_xticks(range(len(paths)), [f"norm {place + 1}" for place in range(len(paths))])
    right.set_ylabel("top-scored from sampled RoIs, std")
    right.legend(frameon=False, fontsize=to_points(12))


def _add_legend(figure: Any, axes: Any, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    where = {"loc": "outside upper right", "ncols": len(labels), "frameon": False}
    figure.legend(handles, labels, title=title, fontsize=to_points(12), title_fontsize=to_points(12), **where)

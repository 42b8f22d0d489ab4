"""Pictures of the GANs and of the value nets: dots are seeds, bars and lines their means."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gan_trials import WAYS
from value_trials import TARGETS

from bnext.figures import COLORS, GREY, PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.trials import collect

__all__ = ["draw_gan", "draw_value"]

_PIXELS = 12


def draw_gan(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Share that a discriminator tells right by either statistics, and how far the generated digits are from real ones.

    Args:
        results: of the GANs.
        path: of the PNG; written whole.
    """
    ways = [way for way in WAYS if way in results["trials"]]
    figure = make_figure(1000, 430)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    kinds = (("as_in_training", "as in training", GREY), ("population", "by population", COLORS["blue"]))
    for number, (reading, words, color) in enumerate(kinds):
        for place, way in enumerate(ways):
            values = collect(results, way, f"{reading}/all")
            _draw_bar(left, place + 0.4 * (number - 0.5), values, color, words if place == 0 else None, width=0.37)
    for place, way in enumerate(ways):
        _draw_bar(right, place, collect(results, way, "distance"), COLORS["orange"], None, width=0.7)

    left.axhline(50, color=COLORS["vermillion"], linestyle="--", linewidth=1, label="by chance")
    left.set_ylabel("real and generated told right, %")
    left.set_ylim(0, 105)
    right.set_ylabel("Fréchet distance to training digits")
    titles = [textwrap.fill(WAYS[way][1].replace("a batch of each, ", "apart, "), 13) for way in ways]
    for axes in (left, right):
        axes.set_xticks(range(len(ways)), titles)
        style_axes(axes, pixels=_PIXELS)
    right.tick_params(axis="x", labelsize=to_points(9))
    figure.legend(loc="outside lower left", ncols=3, fontsize=to_points(13), frameon=False)
    return save_figure(figure, path)


def _draw_bar(axes: Any, place: float, values: Sequence[float], color: str, label: str | None, *, width: float) -> None:
    axes.bar(place, statistics.fmean(values), width, color=color, label=label)
    axes.plot([place] * len(values), values, "o", color="black", markersize=3)


def draw_value(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Best actions along the training, and at its end against how stale the target's moments were.

    Args:
        results: of the value nets.
        path: of the PNG; written whole.
    """
    figure = make_figure(1000, 430)
    left, right = figure.subplots(1, 2)
    quarters = [results["setting"]["steps"] * number // 4 for number in range(1, 5)]

    ways = {way: words for way, (_, words) in TARGETS.items() if way in results["trials"]}
    for (way, words), color in zip(ways.items(), PLAIN, strict=False):
        curves = [collect(results, way, f"curve/{place}") for place in range(4)]
        left.plot(quarters, [statistics.fmean(values) for values in curves], "o-", color=color, label=words)
        staleness = collect(results, way, "target_error")
        right.plot(staleness, curves[-1], "o", color=color, alpha=0.85)

    left.set_xlabel("steps of Adam")
    left.set_ylabel("states with a best action, %")
    right.set_xlabel("mean error of a target, against precise moments")
    right.set_ylabel("states with a best action at the end, %")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.3)
        style_axes(axes, pixels=_PIXELS)
    figure.legend(loc="outside lower center", ncols=2, fontsize=to_points(_PIXELS), frameon=False)
    return save_figure(figure, path)

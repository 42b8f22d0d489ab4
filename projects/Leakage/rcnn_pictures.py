"""The picture of the study of box heads: what one image per worker loses, against how much images differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcnn_heads import ARMS
from rcnn_tables import list_sets, measure_loss

from bnext.figures import GREY, PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.spread import summarize
from bnext.studies.trials import collect

__all__ = ["draw_heads"]

_TEXT = 13  # pixels


def draw_heads(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP above per-worker BN by population: left against the style, right against the share between images.

    Args:
        results: of the study.
        path: of the PNG; written whole.
    """
    sets = list_sets(results)
    shares = [summarize(collect(results, f"{name}/one_image", "share/pooled")).mean for name in sets]
    figure = make_figure(1000, 460)
    panels = {
        "style of the pictures": [recipe.image_style for recipe in sets.values()],
        "share of the RoIs' variance between images": shares,
    }

    curves = {"the same weights, mini-batch of one image": ("one_image", "mini_batch")}
    curves |= {words: (arm, "population") for arm, words in ARMS.items() if arm != "one_image"}
    for axes, (words, places) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, (label, (arm, kind)) in enumerate(curves.items()):
            spreads = [measure_loss(results, name, arm, kind) for name in sets]
            means, deviations = [each.mean for each in spreads], [each.deviation for each in spreads]
            options = {"color": PLAIN[number], "marker": "o", "markersize": 5, "capsize": 2, "label": label}
            axes.errorbar(places, means, deviations, **options)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_xlabel(words)
        axes.set_ylabel("box AP above one image per worker, population")
        axes.grid(axis="y", alpha=0.3)
        style_axes(axes, pixels=_TEXT)

    handles, labels = figure.axes[0].get_legend_handles_labels()
    options = {"ncols": 2, "fontsize": to_points(_TEXT), "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", **options)
    return save_figure(figure, path)

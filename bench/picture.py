"""The picture of a run: the speed of every comparison, its interval, its goal, and the limit."""

from __future__ import annotations

import os
from pathlib import Path

from bench.results import Record, Speed
from bnext.figures import COLORS, GREY, INK, make_figure, save_figure, style_axes, to_points

__all__ = ["draw_record"]

WIDTH, HEIGHT_OF_ROW, HEIGHT_OF_REST = 1000, 26, 110  # pixels
COLOR_OF_LAYOUT = {"NCHW": COLORS["blue"], "channels_last": COLORS["orange"]}


def draw_record(record: Record, path: str | os.PathLike[str]) -> Path:
    """Draw the ratios of a run, as PNG.

    Args:
        record: the run.
        path: of the picture.
    """
    speeds = record.speeds
    figure = make_figure(WIDTH, HEIGHT_OF_REST + HEIGHT_OF_ROW * max(1, len(speeds)))
    axes = figure.add_subplot()
    for place, speed in enumerate(speeds):
        _draw_row(axes, place, speed)

    axes.axvline(1, color=GREY, linewidth=1, zorder=0)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(speeds)), [speed.name for speed in speeds])
    axes.set_ylim(len(speeds) - 0.5, -0.5)
    axes.set_xlabel("times as fast as the other: median and 95 % interval")

    for layout, color in COLOR_OF_LAYOUT.items():
        axes.plot([], [], "o", color=color, label=layout)
    axes.plot([], [], "|", color=INK, markersize=to_points(16), label="goal")
    axes.plot([], [], "x", color=GREY, label="limit by a copy, features read twice")
    style_axes(axes, pixels=13)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, frameon=False, fontsize=to_points(13))
    return save_figure(figure, path)


def _draw_row(axes: object, place: int, speed: Speed) -> None:
    """The ratio of a comparison."""
    color, ratio = COLOR_OF_LAYOUT.get(speed.layout, COLORS["green"]), speed.ratio
    axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=3, solid_capstyle="butt")
    axes.plot(ratio.median, place, "o", color=color)

    if speed.goal is not None:
        axes.plot(speed.goal, place, "|", color=INK, markersize=to_points(20), markeredgewidth=2)
    if speed.two_passes_ms:
        axes.plot(speed.other_ms / speed.two_passes_ms, place, "x", color=GREY)

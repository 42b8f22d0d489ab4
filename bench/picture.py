"""The picture of a run: the speed of every comparison with its interval, its goal, and the limit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.record import Record, Speed
from bnext.figures import COLORS, GREY, INK, make_figure, save_figure, style_axes, to_points

__all__ = ["draw_record"]

WIDTH, HEIGHT_OF_ROW, HEIGHT_OF_REST = 1000, 46, 100  # pixels
LEFT = 400  # pixels of the names
COLOR_OF_LAYOUT = {"NCHW": COLORS["blue"], "channels_last": COLORS["orange"]}
SHIFT_OF_LAYOUT = {"NCHW": -0.2, "channels_last": 0.2}  # rows
TICKS = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
LOWEST, HIGHEST = 0.2, 40.0


def draw_record(record: Record, path: str | os.PathLike[str]) -> Path:
    """Draw the ratios of a run, as PNG.

    Args:
        record: the run.
        path: of the picture.
    """
    by_names: dict[tuple[str, str], list[Speed]] = {}
    for speed in record.speeds:
        by_names.setdefault((speed.name, speed.peer), []).append(speed)

    height = HEIGHT_OF_REST + HEIGHT_OF_ROW * max(1, len(by_names))
    figure = make_figure(WIDTH, height, by_hand=True)
    axes = figure.add_axes((LEFT / WIDTH, 50 / height, 1 - (LEFT + 20) / WIDTH, 1 - HEIGHT_OF_REST / height))
    for place, speeds in enumerate(by_names.values()):
        for speed in speeds:
            _draw_speed(axes, place + SHIFT_OF_LAYOUT[speed.layout], speed)

    axes.axvline(1, color=GREY, linewidth=1, zorder=1.5)
    axes.set_xscale("log")
    axes.set_xlim(LOWEST, HIGHEST)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(by_names)), [f"{name}\nagainst {peer}" for name, peer in by_names])
    axes.set_ylim(len(by_names) - 0.5, -0.5)
    axes.grid(axis="y", which="major", color="#eeeeee", linewidth=to_points(HEIGHT_OF_ROW - 6))
    axes.set_axisbelow(True)
    axes.set_xlabel("times as fast as the other: median and 95 % interval")
    style_axes(axes, pixels=13)
    _explain(axes, height)
    return save_figure(figure, path)


def _draw_speed(axes: Any, place: float, speed: Speed) -> None:
    """The ratio of a comparison in one layout."""
    color, ratio = COLOR_OF_LAYOUT[speed.layout], speed.ratio
    axes.plot([ratio.low, ratio.high], [place, place], color=color, linewidth=3, solid_capstyle="butt")
    axes.plot(ratio.median, place, "o", color=color)

    if speed.goal is not None:
        axes.plot(speed.goal, place, "|", color=INK, markersize=to_points(18), markeredgewidth=2)
    if speed.two_passes_ms:
        axes.plot(speed.other_ms / speed.two_passes_ms, place, "x", color=GREY)


def _explain(axes: Any, height: int) -> None:
    """The legend above the rows."""
    for layout, color in COLOR_OF_LAYOUT.items():
        axes.plot([], [], "o", color=color, label=layout)
    axes.plot([], [], "|", color=INK, markersize=to_points(16), markeredgewidth=2, label="goal")
    axes.plot([], [], "x", color=GREY, label="limit by a copy: features read twice each way")

    top = 1 - 25 / height
    legend = axes.figure.legend(loc="center", bbox_to_anchor=(0.5, top), ncols=4, frameon=False, fontsize=to_points(13))
    legend.set_in_layout(False)

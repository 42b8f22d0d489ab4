"""Table and picture of the stories: mean and standard deviation over their seeds."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perils import Story

from bnext.figures import COLORS, GREY, make_figure, save_figure, style_axes, to_points
from bnext.tables import format_rows

__all__ = ["draw_stories", "format_more", "format_stories"]

_BARS = {
    "before": ("with the bug", COLORS["vermillion"]),
    "after": ("after the doctor's remedy", COLORS["blue"]),
    "without": ("never had it", COLORS["green"]),
}
_TEXT = 13  # pixels


def format_stories(stories: Mapping[str, Story], results: Mapping[str, Any]) -> str:
    """A row for each bug: its cost, the first finding, and the gain of its remedy."""
    rows = []
    for name, seeds in _select(stories, results).items():
        story = stories[name]
        numbers = [_show(_collect(seeds, key)) for key in _BARS]
        rows.append([name, story.title, story.measured, _name_first(seeds), *numbers, str(len(seeds))])

    headers = ["story", "bug", "measured", "doctor says first", *(words for words, _ in _BARS.values()), "seeds"]
    return format_rows(rows, headers, num_texts=4)


def format_more(stories: Mapping[str, Story], results: Mapping[str, Any]) -> str:
    """The other numbers that stories give, and what they took."""
    rows = []
    for name, seeds in _select(stories, results).items():
        for key in next(iter(seeds.values()))["more"]:
            values = [seen["more"].get(key) for seen in seeds.values()]
            rows.append([name, f"{key}", _show(values)])
        rows.append([name, "CPU seconds for a seed", _show([seen["cpu_seconds"] for seen in seeds.values()])])
    return format_rows(rows, ["story", "", "mean"], num_texts=2)


def _select(stories: Mapping[str, Story], results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The seeds of the stories that were told."""
    told = results["stories"]
    return {name: told[name] for name in stories if told.get(name)}


def _collect(seeds: Mapping[str, Any], key: str) -> list[float | None]:
    return [seen[key] for seen in seeds.values()]


def _name_first(seeds: Mapping[str, Any]) -> str:
    """The code that the doctor named first; several where seeds differ."""
    firsts = {seen["findings"][0].split()[0] if seen["findings"] else "nothing" for seen in seeds.values()}
    return ", ".join(sorted(firsts))


def _summarize(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and standard deviation, NaN where there is none."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def _show(values: Iterable[float | None]) -> str:
    mean, deviation = _summarize(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def draw_stories(stories: Mapping[str, Story], results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Bars of each story: means, their standard deviations as lines, seeds as dots.

    Args:
        stories: name -> story.
        results: of `run_stories`.
        path: of the PNG; written whole.
    """
    told = _select(stories, results)
    figure = make_figure(1000, 100 + 84 * len(told))
    axes: Any = figure.subplots()
    height = 0.8 / len(_BARS)

    for number, (key, (words, color)) in enumerate(_BARS.items()):
        shift = (number - (len(_BARS) - 1) / 2) * height
        axes.barh([math.nan], [0], color=color, label=words)
        for place, seeds in enumerate(told.values()):
            values = [value for value in _collect(seeds, key) if value is not None]
            if values:
                _draw_bar(axes, place + shift, values, height * 0.92, color)

    labels = []
    for name in told:
        measured = f"({stories[name].measured})"
        labels.append("\n".join([*textwrap.wrap(stories[name].title, 48), measured]))
    axes.set_yticks(range(len(told)), labels)
    axes.invert_yaxis()
    axes.set_ylim(len(told) - 0.5, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    style_axes(axes, pixels=_TEXT)

    figure.legend(loc="outside upper center", ncols=len(_BARS), fontsize=to_points(_TEXT), frameon=False)
    note = "Means; lines are standard deviations over seeds, dots the seeds."
    figure.supxlabel(note, fontsize=to_points(12), color=GREY)
    return save_figure(figure, path)


def _draw_bar(axes: Any, place: float, values: list[float], height: float, color: str) -> None:
    mean, deviation = _summarize(values)
    axes.barh(place, mean, height, color=color)
    if len(values) > 1:
        axes.errorbar(mean, place, xerr=deviation, color="black", linewidth=1, capsize=2)
        axes.plot(values, [place] * len(values), ".", color="white", markeredgecolor="black", markersize=5)

    end = max([mean if math.isnan(deviation) else mean + deviation, *values])
    axes.text(end + 1, place, f"{mean:.1f}", va="center", fontsize=to_points(12))

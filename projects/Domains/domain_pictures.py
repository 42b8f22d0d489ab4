"""Tables and pictures of the study, from its results: one of each for a part."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptation import CORRUPTIONS, NUM_TARGET_IMAGES, PHASES, RULES, SOURCE
from adversarial import TESTS, name_training
from domain_table import DOMAINS, collect_rows, name_row

from bnext.figures import GREY, PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.spread import summarize
from bnext.tables import format_rows

__all__ = ["draw_adversarial", "draw_stream", "draw_table", "draw_targets", "format_stream", "format_targets"]

_OF_STREAM = ("own statistics", "source", "each image", "blend", "stream")


# ---- the six rows


def draw_table(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP of each row by domain: a dot for each seed, a bar for their mean."""
    rows = collect_rows(results)
    figure = make_figure(1000, 450)
    axes = figure.subplots()

    width = 0.8 / len(DOMAINS)
    for number, domain in enumerate(DOMAINS):
        for place, by_seed in enumerate(rows.values()):
            aps = [of_seed[domain] for of_seed in by_seed.values()]
            x = place + (number - (len(DOMAINS) - 1) / 2) * width
            label = domain.replace("_", " ") if place == 0 else None
            axes.bar(x, statistics.mean(aps), width * 0.92, color=PLAIN[number], label=label)
            axes.plot([x] * len(aps), aps, "o", color="black", markersize=3)

    axes.set_xticks(range(len(rows)), [textwrap.fill(name_row(row), 18) for row in rows])
    axes.set_ylabel("COCO AP")
    axes.set_title("One detector, three domains", loc="left")
    style_axes(axes, pixels=12)
    figure.legend(loc="outside upper right", ncols=len(DOMAINS), frameon=False, fontsize=to_points(13))
    return save_figure(figure, path)


# ---- when to adapt


def format_targets(results: Mapping[str, Any]) -> str:
    """AP of every target with every kind of statistics, mean and standard deviation over seeds."""
    kinds = [*RULES, *(f"N = {number}" for number in NUM_TARGET_IMAGES)]
    rows = [[target, *(summarize(_of_seeds(results, f"{target}/{kind}")) for kind in kinds)] for target in _TARGETS]
    table = format_rows(rows, [f"AP, {len(results['rows'])} seed(s)", *kinds], num_texts=1)

    under = [[target, summarize(_of_seeds(results, f"clean under/{target}"))] for target in CORRUPTIONS]
    return f"{table}\n\n{format_rows(under, ['clean images under the statistics of', 'AP'], num_texts=1)}"


_TARGETS = (SOURCE, *CORRUPTIONS)


def draw_targets(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """A panel for each target: AP against the images of it that statistics are of, and the rules that need none."""
    figure = make_figure(1100, 620)
    panels = figure.subplots(2, 4, sharey=True).ravel()
    places = range(len(NUM_TARGET_IMAGES) + 1)

    for panel, target in zip(panels, _TARGETS, strict=False):
        points = [_of_seeds(results, f"{target}/source")]
        points += [_of_seeds(results, f"{target}/N = {number}") for number in NUM_TARGET_IMAGES]
        means, spreads = [statistics.mean(values) for values in points], [_spread(values) for values in points]
        panel.errorbar(places, means, spreads, color=PLAIN[0], marker="o", label="statistics of N images of the target")
        for number, rule in enumerate(("each image", "blend", "stream"), 1):
            level = statistics.mean(_of_seeds(results, f"{target}/{rule}"))
            panel.axhline(level, color=PLAIN[number], linestyle=("--", "-.", ":")[number - 1], label=rule)

        panel.set_title(target, loc="left")
        panel.set_xticks(places, ["0", *map(str, NUM_TARGET_IMAGES)])
        panel.set_ylim(bottom=0)
        style_axes(panel, pixels=12)

    for panel in panels[len(_TARGETS) :]:
        panel.set_axis_off()
    for panel in panels[::4]:
        panel.set_ylabel("COCO AP")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, loc="center", frameon=False, fontsize=to_points(12))
    figure.supxlabel("images of the target, without labels; 0: the statistics of the source", fontsize=to_points(13))
    return save_figure(figure, path)


# ---- a stream that changes domain


def format_stream(results: Mapping[str, Any]) -> str:
    """AP of each rule: on the first clean phase, over the corrupted ones of each round, and on the last clean one."""
    last = len(PHASES) - 1
    rounds = [range(1 + 4 * number, 5 + 4 * number) for number in range(3)]
    rows = []
    for rule in _OF_STREAM:
        first, end = (_of_seeds(results, f"{rule}/{phase}") for phase in (0, last))
        cells = [summarize(first)]
        for phases in rounds:
            by_phase = [_of_seeds(results, f"{rule}/{phase}") for phase in phases]
            cells.append(summarize([statistics.mean(aps) for aps in zip(*by_phase, strict=True)]))
        rows.append([rule, *cells, summarize(end)])
    headers = [f"AP, {len(results['rows'])} seed(s)", "clean", "round 1", "round 2", "round 3", "clean again"]
    return format_rows(rows, headers, num_texts=1)


def draw_stream(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP over the phases of the stream, a curve for each rule."""
    figure = make_figure(1000, 440)
    axes = figure.subplots()
    for number, rule in enumerate(_OF_STREAM):
        aps = [statistics.mean(_of_seeds(results, f"{rule}/{phase}")) for phase in range(len(PHASES))]
        style = "--" if rule == "own statistics" else "-"
        axes.plot(aps, style, color=GREY if number == 0 else PLAIN[number - 1], marker="o", markersize=4, label=rule)

    axes.set_xticks(range(len(PHASES)), [phase.replace(" ", "\n") for phase in PHASES])
    axes.set_ylabel("COCO AP of the phase")
    axes.set_ylim(bottom=0)
    axes.set_title("A stream that changes domain, and comes back", loc="left")
    style_axes(axes, pixels=12)
    figure.legend(loc="outside upper right", ncols=len(_OF_STREAM), frameon=False, fontsize=to_points(12))
    return save_figure(figure, path)


# ---- adversarial copies


def draw_adversarial(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """AP of each training on each kind of images: a dot for each seed, a bar for their mean."""
    rows = dict.fromkeys(name.split(", seed ")[0] for name in results["rows"])
    figure = make_figure(1000, 400)
    axes = figure.subplots()

    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        of_seeds = [values for name, values in results["rows"].items() if name.startswith(f"{row}, ")]
        for place, test in enumerate(TESTS):
            x, aps = place + (number - (len(rows) - 1) / 2) * width, [values[f"AP/{test}"] for values in of_seeds]
            label = name_training(row) if place == 0 else None
            axes.bar(x, statistics.mean(aps), width * 0.92, color=PLAIN[number], label=label)
            axes.plot([x] * len(aps), aps, "o", color="black", markersize=3)

    axes.set_xticks(range(len(TESTS)), TESTS)
    axes.set_ylabel("COCO AP")
    style_axes(axes, pixels=12)
    figure.legend(loc="outside upper right", ncols=len(rows), frameon=False, fontsize=to_points(12))
    return save_figure(figure, path)


def _of_seeds(results: Mapping[str, Any], key: str) -> list[float]:
    """The value of each seed."""
    return [row[key] for row in results["rows"].values()]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

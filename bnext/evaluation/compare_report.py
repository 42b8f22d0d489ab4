"""Words, table and plot of a comparison of statistics; the sentences of each kind are in `bnext.repair.kinds`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnext.evaluation.verdict import NAMES, TOO_LOW, find_noise, judge_losses, judge_rows
from bnext.figures import PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.repair.kinds import KINDS
from bnext.tables import format_rows
from bnext.text import escape_math

__all__ = ["describe_reading", "draw_comparison", "describe_rows", "format_comparison"]


def describe_rows(results: Mapping[str, Any]) -> dict[str, str]:
    """For each kind of statistics what its difference to those of the file means; see `judge_rows` for the verdict."""
    rows, noise = results["rows"], find_noise(results)
    key = next((key for key in NAMES if all(row.get(key) is not None for row in rows.values())), None)
    if key is None or "moving_average" not in rows or max(row[key] for row in rows.values()) < TOO_LOW:
        return {}

    words = {}
    for kind, row in rows.items():
        if kind == "moving_average":
            continue
        change = row[key] - rows["moving_average"][key]
        if abs(change) < noise:
            words[kind] = KINDS[kind].equal.format(f"{change:+.1f}")
        elif change > 0:
            words[kind] = KINDS[kind].better.format(f"{change:+.1f}")
        else:
            words[kind] = KINDS[kind].worse.format(f"{-change:.1f}")
    return words


def describe_reading(results: Mapping[str, Any]) -> str:
    """The three losses in words; see `read_three_ways`."""
    reading = results["reading"]
    if "not_applicable" in reading:
        return f"Three-way reading: does not apply, as {reading['not_applicable']}."

    fit = reading["mini_batch_train"]["loss"]
    gap, inconsistency = reading["generalization_gap"], reading["inconsistency"]
    parts = [
        ("fit (mini-batch statistics, training images)", f"{fit:.3f}", reading["mini_batch_train"]),
        ("generalization gap (validation images)", f"{gap:+.3f}", reading["mini_batch_val"]),
        ("train-test inconsistency (population statistics)", f"{inconsistency:+.3f}", reading["population_val"]),
    ]

    keys = _find_keys([way for _, _, way in parts])
    rows = []
    for words, part, way in parts:
        rows.append([words, f"{way['loss']:.3f}", part, *(_show(way.get(key)) for key in keys)])
    table = format_rows(rows, ["three-way reading", "loss", "part", *(NAMES[key] for key in keys)])

    comparable = "Losses of runs with another number of images per worker cannot be compared with these."
    return f"{table}\n\nIn words: {judge_losses(fit, gap, inconsistency, results)}. {comparable}"


def format_comparison(results: Mapping[str, Any]) -> str:
    """The table "Same checkpoint, which statistics?", what does not apply, both in words, and the verdict."""
    rows = results["rows"]
    keys = _find_keys(rows.values())
    first = next(iter(rows))

    lines = []
    for kind, row in rows.items():
        line = [KINDS[kind].words]
        for key in keys:
            base, value = rows[first].get(key), row.get(key)
            is_comparable = kind != first and base is not None and value is not None
            line += [_show(value), f"{value - base:+.1f}" if is_comparable else ""]
        lines.append(line)
    headers = ["same checkpoint, which statistics?"]
    for key in keys:
        headers += [NAMES[key], "change"]

    notes = []
    for kind, reason in results["not_applicable"].items():
        notes.append(f"{KINDS[kind].words}: does not apply, as {reason}.")
    for sentence in describe_rows(results).values():
        notes.append(f"{sentence[0].upper()}{sentence[1:]}.")

    parts = [format_rows(lines, headers), "\n".join(notes), describe_reading(results)]
    parts.append(f"Verdict: {judge_rows(results).words}")
    return "\n\n".join(part for part in parts if part)


def _find_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that some row has."""
    present = set().union(*rows)
    return [key for key in NAMES if key in present]


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def draw_comparison(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Bars of AP for each kind of statistics, and the three losses beside them.

    Args:
        results: of `compare_statistics`.
        path: of the PNG; written whole.
    """
    reading = results["reading"]
    has_reading = "not_applicable" not in reading
    figure = make_figure(1000 if has_reading else 700, max(120 + 52 * len(results["rows"]), 320 if has_reading else 0))

    if has_reading:
        left, right = figure.subplots(1, 2, width_ratios=[2, 1.25])
        _draw_reading(right, reading)
    else:
        left = figure.subplots()
    _draw_aps(left, results["rows"])
    left.set_xlabel(f"COCO AP on {escape_math(results['dataset'])}")
    style_axes(left)
    return save_figure(figure, path)


def _draw_aps(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    keys = _find_keys(rows.values())
    height = 0.8 / max(1, len(keys))
    longest = 0.0

    for index, key in enumerate(keys):
        aps = [row.get(key) for row in rows.values()]
        places = [row + (index - (len(keys) - 1) / 2) * height for row in range(len(rows))]
        lengths = [ap or 0.0 for ap in aps]
        longest = max(longest, *lengths)
        bars = axes.barh(places, lengths, height, label=NAMES[key], color=PLAIN[index % len(PLAIN)])
        axes.bar_label(bars, _label_bars(aps), padding=3, fontsize=to_points(13))

    axes.set_yticks(range(len(rows)), [KINDS[kind].words.replace(": as", ":\nas") for kind in rows])
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(0, None if longest else 1)
    axes.set_title("Same checkpoint, which statistics?")
    if len(keys) > 1:
        axes.legend(fontsize=to_points(13), frameon=False)


def _label_bars(values: Sequence[float | None]) -> list[str]:
    """Each AP, and its difference to the first."""
    first = values[0]
    labels = [_show(first)]

    for value in values[1:]:
        if value is None or first is None:
            labels.append(_show(value))
        else:
            labels.append(f"{value:.1f} ({value - first:+.1f})")

    return labels


def _draw_reading(axes: Any, reading: Mapping[str, Any]) -> None:
    labels = {
        "mini_batch_train": "mini-batch,\ntraining\nimages",
        "mini_batch_val": "mini-batch,\nvalidation\nimages",
        "population_val": "population,\nvalidation\nimages",
    }

    bars = axes.bar(list(labels.values()), [reading[way]["loss"] for way in labels], color=PLAIN[:3])
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=to_points(13))
    axes.margins(y=0.12)
    axes.set_ylabel("loss")
    gap, inconsistency = reading["generalization_gap"], reading["inconsistency"]
    axes.set_title(f"generalization gap {gap:+.3f},\ntrain-test inconsistency {inconsistency:+.3f}")
    style_axes(axes, pixels=12)

"""What a comparison of statistics says: a table, sentences, a plot, JSON; and the command that writes them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from bnext.files import replace_file
from bnext.repair.kinds import KINDS

__all__ = ["describe_reading", "draw_comparison", "describe_rows", "format_comparison"]

_NOISE = 0.5  # AP that mean nothing
_TOO_LOW = 1.0  # an AP below says nothing at all
_NAMES = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
# Kind -> what it says to be better than the statistics of the file, worse, or as good.
_WORDS = {
    "precise": (
        "precise statistics are worth {0} AP: the moving average does not fit",
        "precise statistics cost {0} AP: the images that they are of are others than those of the training",
        "precise statistics change nothing ({0} AP): the moving average fits",
    ),
    "mean_of_batches": (
        "the mean of the batches' variances is worth {0} AP: the moving average does not fit",
        "the mean of the batches' variances costs {0} AP",
        "the mean of the batches' variances changes nothing ({0} AP)",
    ),
    "mini_batch": (
        "each image's own statistics are worth {0} AP: the population statistics do not describe what the norms see",
        "each image's own statistics cost {0} AP: one image has too few elements, or training has seen more together",
        "each image's own statistics change nothing ({0} AP)",
    ),
    "mini_batch_as_trained": (
        "normalizing as in training is worth {0} AP: training and test are inconsistent",
        "normalizing as in training costs {0} AP: mini-batches are noise to a model that is consistent",
        "normalizing as in training changes nothing ({0} AP): training and test are consistent",
    ),
    "per_level": (
        "statistics of each level are worth {0} AP: levels differ, and training has normalized each by its own",
        "statistics of each level cost {0} AP: training has normalized them together",
        "statistics of each level change nothing ({0} AP)",
    ),
    "per_domain": (
        "statistics of the domain's own images are worth {0} AP: its features are not those of all training images",
        "statistics of the domain's own images cost {0} AP: there are too few of them, or training has mixed domains",
        "statistics of the domain's own images change nothing ({0} AP): all domains look alike to the norms",
    ),
    "adaptive": (
        "statistics of the test images are worth {0} AP: their domain is another, or the file's do not fit",
        "statistics of the test images cost {0} AP: there are too few of them, or their objects differ",
        "statistics of the test images change nothing ({0} AP): their domain is that of the training",
    ),
}


def describe_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each kind of statistics what its difference to those of the file means."""
    key = next((key for key in _NAMES if all(row.get(key) is not None for row in rows.values())), None)
    if key is None or "moving_average" not in rows or max(row[key] for row in rows.values()) < _TOO_LOW:
        return {}
    words = {}
    for kind, row in rows.items():
        if kind != "moving_average":
            change = row[key] - rows["moving_average"][key]
            better, worse, equal = _WORDS[kind]
            sentence = equal if abs(change) < _NOISE else better if change > 0 else worse
            shown = f"{change:+.1f}" if abs(change) < _NOISE or change > 0 else f"{-change:.1f}"
            words[kind] = sentence.format(shown)
    return words


def describe_reading(reading: Mapping[str, Any]) -> str:
    """The three losses in words; see `read_three_ways`."""
    if "not_applicable" in reading:
        return f"Three-way reading: does not apply, as {reading['not_applicable']}."
    gap, inconsistency = reading["generalization_gap"], reading["inconsistency"]
    fit = reading["mini_batch_train"]["loss"]
    verdict = _judge(fit, gap, inconsistency)
    lines = [
        ("fit (mini-batch statistics, training images)", f"{fit:.3f}", reading["mini_batch_train"]),
        ("generalization gap (validation images)", f"{gap:+.3f}", reading["mini_batch_val"]),
        ("train-test inconsistency (population statistics)", f"{inconsistency:+.3f}", reading["population_val"]),
    ]
    keys = [key for key in _NAMES if any(key in way for _, _, way in lines)]
    rows = [[what, f"{way['loss']:.3f}", change, *(_show(way.get(key)) for key in keys)] for what, change, way in lines]
    headers = ["three-way reading", "loss", "part", *(_NAMES[key] for key in keys)]
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1))
    return f"{table}\nIn words: {verdict}."


def _judge(fit: float, gap: float, inconsistency: float) -> str:
    if not math.isfinite(fit + gap + inconsistency):
        return "a loss is not finite; the activations of some layer have diverged with these statistics"
    if inconsistency <= 0.05 * abs(fit):
        return "the population statistics describe what the norms see; what is lost is lost to new images"
    share = 100 * inconsistency / (max(gap, 0) + inconsistency)
    return (
        f"{share:.0f} % of the loss that validation images add to that of training images is no lack of "
        f"generalization, but comes from other statistics at test than in training: re-estimate them"
    )


def format_comparison(results: Mapping[str, Any]) -> str:
    """The table "Same checkpoint, which statistics?", what does not apply, and both in words."""
    rows, keys = results["rows"], [key for key in _NAMES if any(key in row for row in results["rows"].values())]
    first = next(iter(rows))
    lines = []
    for kind, row in rows.items():
        cells = [KINDS[kind]]
        for key in keys:
            base, value = rows[first].get(key), row.get(key)
            is_comparable = kind != first and base is not None and value is not None
            cells += [_show(value), f"{value - base:+.1f}" if is_comparable else ""]
        lines.append(cells)
    headers = ["same checkpoint, which statistics?", *(cell for key in keys for cell in (_NAMES[key], "change"))]
    aligned = ["left"] + ["right"] * (len(headers) - 1)
    parts = [tabulate(lines, headers=headers, disable_numparse=True, colalign=aligned)]
    notes = [f"{KINDS[kind]}: does not apply, as {reason}." for kind, reason in results["not_applicable"].items()]
    words = describe_rows(rows)
    notes += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in words.values()]
    if len(rows) > 1 and "moving_average" in rows and not words:
        notes.append("Every AP is too low to tell the statistics apart; the losses may.")
    return "\n\n".join([*parts, "\n".join(notes), describe_reading(results["reading"])]).replace("\n\n\n\n", "\n\n")


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def draw_comparison(results: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Bars of AP for each kind of statistics, and the three losses beside them.

    Args:
        results: of `compare_statistics`.
        path: of the PNG; written whole.
    """
    rows, reading = results["rows"], results["reading"]
    keys = [key for key in _NAMES if any(key in row for row in rows.values())]
    has_reading = "not_applicable" not in reading
    figure = Figure(figsize=(12 if has_reading else 8, 1.6 + 0.55 * len(rows)), layout="constrained")
    left, *right = figure.subplots(1, 1 + has_reading, squeeze=False, width_ratios=[2, 1][: 1 + has_reading])[0]
    height = 0.8 / max(1, len(keys))
    for index, key in enumerate(keys):
        places = [row + (index - (len(keys) - 1) / 2) * height for row in range(len(rows))]
        bars = left.barh(places, [row.get(key) or 0 for row in rows.values()], height, label=_NAMES[key])
        left.bar_label(bars, _label_bars([row.get(key) for row in rows.values()]), padding=3)
    left.set_yticks(range(len(rows)), [KINDS[kind].replace(": as", ":\nas") for kind in rows])
    left.invert_yaxis()
    left.margins(x=0.22)
    left.set_xlim(0, None if any(row.get(key) for key in keys for row in rows.values()) else 1)
    left.set_xlabel(f"COCO AP on {results['dataset']}")
    left.set_title("Same checkpoint, which statistics?")
    if len(keys) > 1:
        left.legend()
    for axes in right:
        _draw_reading(axes, reading)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return Path(path)


def _label_bars(values: Sequence[float | None]) -> list[str]:
    """Each AP, and its difference to the first."""
    first = values[0]
    changes = ["" if value is None or first is None else f" ({value - first:+.1f})" for value in values[1:]]
    return [f"{_show(value)}{change}" for value, change in zip(values, ["", *changes], strict=True)]


def _draw_reading(axes: Any, reading: Mapping[str, Any]) -> None:
    labels = {
        "mini_batch_train": "mini-batch,\ntraining\nimages",
        "mini_batch_val": "mini-batch,\nvalidation\nimages",
        "population_val": "population,\nvalidation\nimages",
    }
    bars = axes.bar(list(labels.values()), [reading[way]["loss"] for way in labels], color=["C0", "C1", "C3"])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.tick_params(axis="x", labelsize="small")
    axes.margins(y=0.12)
    axes.set_ylabel("loss")
    gap, inconsistency = reading["generalization_gap"], reading["inconsistency"]
    axes.set_title(f"generalization gap {gap:+.3f},\ntrain-test inconsistency {inconsistency:+.3f}", fontsize="medium")

"""Tables of the study of classifiers, from what results.json holds, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leak_setting import LeakSetting
from leak_trials import Training, list_axes

from bnext.studies.setting import read_setting
from bnext.studies.spread import compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["PAPER", "WAYS", "format_tables", "list_measured"]

# Statistics at test -> in words.
WAYS = {"same": "same pattern", "random": "random mini-batches", "population": "population"}
# ImageNet error in %, ResNet-50, 16 classes x 2 images, epoch 100; Wu and Johnson 2021, section 6.
PAPER = {"same": 23.3, "random": 30.9, "population": 51.1}
_AXES = {
    "pattern": "classes x images of a normalization batch",
    "repair": "repair of {pattern}",
    "share": "share of {pattern}",
    "length": "steps, {pattern}",
    "noise": "noise, {pattern}",
    "joined": "two digits on a picture, 100 classes",
}


def list_measured(results: Mapping[str, Any], axis: str) -> dict[str, Training]:
    """Label -> training of an axis, of those that were measured."""
    trainings = list_axes(read_setting(LeakSetting, results))[axis]
    return {label: training for label, training in trainings.items() if training.name in results["trials"]}


def format_tables(results: Mapping[str, Any]) -> str:
    """A table for each axis that has two trainings or more, the paper's below the first."""
    pattern = read_setting(LeakSetting, results).pattern

    tables = []
    for axis, words in _AXES.items():
        measured = list_measured(results, axis)
        if len(measured) > 1:
            tables.append(_format_axis(results, axis, words.format(pattern=pattern), measured))
    return "\n\n".join(tables)


def _format_axis(results: Mapping[str, Any], axis: str, words: str, measured: Mapping[str, Training]) -> str:
    rows = []
    for label, training in measured.items():
        errors = {way: collect(results, training.name, f"error/{way}") for way in WAYS}
        leak = compare(errors["population"], errors["same"])
        cells = [summarize(values) for values in errors.values()]
        rows.append([label, *cells, leak.show(sign="+"), "yes" if leak.is_beyond else "no", str(leak.number)])

    if axis == "pattern":
        leak = PAPER["population"] - PAPER["same"]
        rows.append(["16 x 2, ImageNet (paper)", *map(str, PAPER.values()), f"{leak:+.1f}", "n.r.", "n.r."])
    headers = [*WAYS.values(), "population less same", "beyond two spreads", "seeds"]
    return format_rows(rows, [f"error %, {words}", *headers])

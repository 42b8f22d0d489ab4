"""Tables of the GANs and of the value nets, from results.json of either part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gan_trials import WAYS
from value_trials import TARGETS

from bnext.studies.spread import compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["format_tables", "is_of_gans"]

_READINGS = {"as_in_training": "as in training", "population": "by population statistics"}


def format_tables(results: Mapping[str, Any]) -> str:
    """The tables of a part, its numbers as mean ± deviation over seeds."""
    return _format_gans(results) if is_of_gans(results) else _format_values(results)


def is_of_gans(results: Mapping[str, Any]) -> bool:
    """Whether results are those of the GANs; else they are the value nets'."""
    return "period" not in results["setting"]


def _format_gans(results: Mapping[str, Any]) -> str:
    rows = []
    for way, (_, words) in WAYS.items():
        for reading, how in _READINGS.items():
            shares = [_show(results, way, f"{reading}/{kind}", 1) for kind in ("real", "fake", "all")]
            rows.append([words, how, *shares])
    headers = ["discriminator", "read", "real told right, %", "fake told right, %", "both"]
    told = format_rows(rows, headers, num_texts=2)

    rows = []
    for way, (_, words) in WAYS.items():
        trained, tested = (collect(results, way, f"{reading}/all") for reading in _READINGS)
        change = compare(tested, trained)
        cells = [change.show(sign="+"), "yes" if change.is_beyond else "no"]
        rows.append([words, *cells, _show(results, way, "score_change", 2)])
    headers = ["discriminator", "population - as in training", "beyond two spreads", "change of a score, deviations"]
    changed = format_rows(rows, headers)

    rows = []
    apart = collect(results, "apart", "distance")
    for way, (_, words) in WAYS.items():
        distances = collect(results, way, "distance")
        cells = [_show(results, way, "distance", 2), "", ""]
        if way in ("merged", "population") and len(distances) == len(apart):
            change = compare(distances, apart)
            cells[1:] = [change.show(2, sign="+"), "yes" if change.is_beyond else "no"]
        rows.append([words, *cells])
    headers = ["discriminator", "Fréchet distance of the digits", "against a batch of each", "beyond two spreads"]
    return f"{told}\n\n{changed}\n\n{format_rows(rows, headers)}"


def _format_values(results: Mapping[str, Any]) -> str:
    rows = []
    for way, (_, words) in TARGETS.items():
        cells = [_show(results, way, "staleness", 2), _show(results, way, "target_error", 3)]
        cells += [_show(results, way, f"curve/{place}", 1) for place in (1, 3)]
        rows.append([words, *cells, _show(results, way, "value_error", 3)])
    headers = ["moments of the target net", "staleness, deviations", "error of a target", "best actions at half, %"]
    learned = format_rows(rows, [*headers, "best actions at the end, %", "error of a value"])

    rows = []
    precise = collect(results, "precise", "curve/3")
    for way, (_, words) in TARGETS.items():
        others = collect(results, way, "curve/3")
        if way != "precise" and len(others) == len(precise):
            change = compare(others, precise)
            rows.append([words, change.show(sign="+"), "yes" if change.is_beyond else "no"])
    headers = ["best actions at the end", "against precise moments", "beyond two spreads"]
    return f"{learned}\n\n{format_rows(rows, headers)}"


def _show(results: Mapping[str, Any], trial: str, key: str, digits: int) -> str:
    return summarize(collect(results, trial, key)).show(digits)

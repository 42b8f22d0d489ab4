"""Tables of the four modes, from results.json of either part."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mode_trials import name_trial

from bnext.studies.spread import compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["CURVES", "collect_curves", "format_tables", "is_of_net", "measure_change", "measure_fall"]


class Curve(NamedTuple):
    """A validation curve.

    Args:
        title: the modes that it is of.
        norm: "none" or "bn", the training.
        reading: of it.
    """

    title: str
    norm: str
    reading: str


CURVES = (
    Curve("1: no norm", "none", "none"),
    Curve("2: BN, moving average", "bn", "moving_average"),
    Curve("3 and 4: mini-batch", "bn", "mini_batch"),
)
_TESTS = (
    ("1: no norm", "none", "none"),
    ("2: BN, moving average", "bn", "moving_average"),
    ("3: mini-batch statistics at test", "bn", "mini_batch"),
    ("3: running statistics of nobody: fresh", "bn", "fresh"),
    ("3: running statistics of long ago: stale", "bn", "stale"),
    ("4: estimated in one epoch", "bn", "estimated"),
)


def format_tables(results: Mapping[str, Any]) -> str:
    """The tables of a part, its numbers as mean ± deviation over seeds."""
    return _format_net(results) if is_of_net(results) else _format_detector(results)


def is_of_net(results: Mapping[str, Any]) -> bool:
    """Whether results are those of the small net; else they are the detector's."""
    return "learning_rate" in results["setting"]


def measure_change(curve: Sequence[float | None]) -> float:
    """Mean absolute change from one reading to the next: how erratic a curve is, its rise included.

    Example:
        >>> measure_change([10, 90, 50])
        60.0
    """
    if None in curve:
        return math.nan
    return statistics.fmean(abs(after - before) for before, after in itertools.pairwise(curve))  # type: ignore


def measure_fall(curve: Sequence[float | None]) -> float:
    """The largest fall from one reading to the next; 0 where there is none.

    Example:
        >>> measure_fall([10, 90, 50]), measure_fall([10, 20])
        (40.0, 0.0)
    """
    if None in curve:
        return math.nan
    return float(max(0, *(before - after for before, after in itertools.pairwise(curve))))  # type: ignore


def collect_curves(results: Mapping[str, Any], trial: str, key: str) -> list[list[float]]:
    """The curve of each seed, "train" or "val/..."."""
    by_seed = results["trials"].get(trial, {})
    curves = []
    for seed in sorted(by_seed, key=int):
        curve = by_seed[seed]
        for part in key.split("/"):
            curve = curve[part]
        curves.append(curve)
    return curves


_MEASURES = {
    "change between epochs": measure_change,
    "largest fall": measure_fall,
    "accuracy, last epoch": lambda curve: curve[-1],
}


def _format_net(results: Mapping[str, Any]) -> str:
    setting = results["setting"]
    rate = setting["learning_rate"]
    trials = name_trial("bn", rate), name_trial("none", rate)
    differences = _format_differences(results, *trials, setting["test_batch_sizes"])
    parts = (_format_panels(results, rate), _format_tests(results, rate), differences, _format_rates(results))
    return "\n\n".join(parts)


def _format_panels(results: Mapping[str, Any], rate: float) -> str:
    rows = []
    steady = list(map(measure_change, collect_curves(results, name_trial("bn", rate), "val/mini_batch")))
    for title, norm, reading in CURVES:
        trained = collect_curves(results, name_trial(norm, rate), "train")
        curves = collect_curves(results, name_trial(norm, rate), f"val/{reading}")
        changes = list(map(measure_change, curves))
        numbers = ([curve[-1] for curve in trained], [curve[-1] for curve in curves])
        cells = list(map(_show, (*numbers, map(measure_fall, curves), changes)))

        cells += ["", ""]
        if reading != "mini_batch" and len(changes) == len(steady):
            more = compare(changes, steady)
            cells[-2:] = [more.show(sign="+"), "yes" if more.is_beyond else "no"]
        rows.append([title, *cells])

    headers = [f"mode, rate {rate:g}", "training images, last epoch", "validation images, last epoch", "largest fall"]
    headers += ["change between epochs", "more than in 3 and 4", "beyond two spreads"]
    return format_rows(rows, headers)


def _format_tests(results: Mapping[str, Any], rate: float) -> str:
    sizes = results["setting"]["test_batch_sizes"]
    rows = []
    for title, norm, reading in _TESTS:
        trial = name_trial(norm, rate)
        rows.append([title, *(_show(collect(results, trial, f"test/{reading}/{size}")) for size in sizes)])
    return format_rows(rows, ["accuracy at test, %", *(f"{size} image(s) at a time" for size in sizes)])


def _format_differences(results: Mapping[str, Any], norm: str, none: str, sizes: Sequence[int]) -> str:
    """Gain of mode 4 over the others, seed by seed; whether that is beyond two spreads."""
    rows = []
    for title, kind, reading in _TESTS[:-1]:
        trial = none if kind == "none" else norm
        cells = []
        for size in sizes:
            estimated = collect(results, norm, f"test/estimated/{size}")
            others = collect(results, trial, f"test/{reading}/{size}")
            if len(others) == len(estimated):
                difference = compare(estimated, others)
                cells += [difference.show(sign="+"), "yes" if difference.is_beyond else "no"]
        if cells:
            rows.append([title, *cells])

    headers = ["mode 4 is better than"]
    for size in sizes:
        headers += [f"by, {size} at a time", "beyond two spreads"]
    return format_rows(rows, headers)


def _format_rates(results: Mapping[str, Any]) -> str:
    rates = sorted(results["setting"]["rates"])
    rows = []
    for title, norm, reading in CURVES:
        for words, measure in _MEASURES.items():
            cells = []
            for rate in rates:
                curves = collect_curves(results, name_trial(norm, rate), f"val/{reading}")
                cells.append(_show(map(measure, curves)))
            rows.append([title, words, *cells])
    return format_rows(rows, ["mode", "validation", *(f"rate {rate:g}" for rate in rates)], num_texts=2)


def _format_detector(results: Mapping[str, Any]) -> str:
    rows = []
    for title, norm, reading in CURVES:
        curves = collect_curves(results, norm, f"val/{reading}")
        last = [curve[-1] for curve in curves]
        rows.append([title, *map(_show, (last, map(measure_change, curves), map(measure_fall, curves)))])
    panels = format_rows(rows, ["mode, RetinaNet on digits", "AP, last", "change between readings", "largest fall"])

    rows = []
    for title, norm, reading in _TESTS:
        for size in ("1", "8"):
            values = collect(results, norm, f"test/{reading}/{size}")
            if size == "1" or reading == "mini_batch":
                rows.append([title, size, _show(values)])
    tests = format_rows(rows, ["at test", "images at a time", "COCO AP"], num_texts=1)
    return f"{panels}\n\n{tests}\n\n{_format_differences(results, 'bn', 'none', [1])}"


def _show(values: Any) -> str:
    return str(summarize(list(values)))

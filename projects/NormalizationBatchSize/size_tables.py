"""Tables of the study, from what results.json holds, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from size_setting import SizeSetting
from size_trials import AXES, list_axis, name_trial

from bnext.studies.setting import read_setting
from bnext.studies.spread import Spread, compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["PAPER", "PAPER_SIZES", "compare_errors", "format_tables"]

# ImageNet error in %, ResNet-50, SGD batch 1024; Wu and Johnson 2021, Table 2.
PAPER_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PAPER = {
    "train": (16.5, 15.1, 13.5, 12.0, 10.7, 9.7, 9.1, 8.8, 8.4, 8.4),
    "val": (26.0, 25.5, 25.1, 24.7, 24.5, 24.7, 24.7, 24.7, 24.8, 24.8),
    "mini_batch": (32.5, 26.4, 24.3, 23.5, 23.4, 23.2, 23.4, 23.6, 23.7, 23.7),
    "frozen": (25.2, 24.3, 24.2, 23.9, 24.3, 24.2, 24.4, 24.4, 24.4, 24.5),
}
# Error -> its words; all but the first are of validation images.
_STATISTICS = {
    "train": "training, mini-batch",
    "val": "mini-batch",
    "moving_average": "moving average",
    "mini_batch": "re-estimated",
    "whole_batch": "re-estimated, whole batches",
    "layer_by_layer": "re-estimated, layer by layer",
    "frozen": "FrozenBN, last fifth",
}
_DIFFERENCES = {
    "generalization gap": ("val", "train"),
    "inconsistency": ("mini_batch", "val"),
    "inconsistency, layer by layer": ("layer_by_layer", "val"),
}


def compare_errors(results: Mapping[str, Any], name: str, one: str, other: str) -> Spread:
    """One error of a training less another, over its seeds."""
    return compare(collect(results, name, one), collect(results, name, other))


def format_tables(results: Mapping[str, Any]) -> str:
    """All tables for which there are trainings, the paper's below the first."""
    setting = read_setting(SizeSetting, results)
    trained = results["trials"]

    tables = []
    for contrast in setting.contrasts:
        sizes = [size for size in setting.sizes if name_trial(contrast, size) in trained]
        if len(sizes) > 1:
            tables.append(_format_sizes(results, contrast, sizes))
    if tables:
        tables.append(_format_paper([size for size in PAPER_SIZES if size in setting.sizes]))

    smallest = min(setting.sizes)
    spreads = [contrast for contrast in setting.spreads if name_trial(contrast, smallest) in trained]
    if len(spreads) > 1:
        tables.append(_format_contrasts(results, spreads, smallest))

    rows = []
    for axis in AXES:
        for contrast in setting.contrasts:
            names = [name for name in list_axis(setting, contrast, axis) if name in trained]
            if len(names) > 1:
                rows += _list_axis_rows(results, contrast, axis, names)
    if rows:
        headers = [f"axis, NBS {smallest}", "contrast", *_STATISTICS.values(), "inconsistency", "seeds"]
        tables.append(format_rows(rows, headers))
    return "\n\n".join(tables)


def _format_sizes(results: Mapping[str, Any], contrast: float, sizes: Sequence[int]) -> str:
    """As the paper's Table 2, with more rows."""
    names = [name_trial(contrast, size) for size in sizes]
    rows = []
    for key, words in _STATISTICS.items():
        rows.append([words, *(str(summarize(collect(results, name, key))) for name in names)])
    for words, (one, other) in _DIFFERENCES.items():
        rows.append([words, *(compare_errors(results, name, one, other).show(sign="+") for name in names)])

    title = f"contrast {contrast:g}"
    return format_rows(rows, [f"error %, {title}", *(f"NBS {size}" for size in sizes)])


def _format_paper(sizes: Sequence[int]) -> str:
    rows = []
    for key, errors in PAPER.items():
        words = "population" if key == "mini_batch" else _STATISTICS[key]
        rows.append([words, *(str(errors[PAPER_SIZES.index(size)]) for size in sizes)])
    for words, (one, other) in _DIFFERENCES.items():
        if one in PAPER:
            pairs = [(PAPER[one][PAPER_SIZES.index(size)], PAPER[other][PAPER_SIZES.index(size)]) for size in sizes]
            rows.append([words, *(f"{first - second:+.1f}" for first, second in pairs)])
    return format_rows(rows, ["error %, ImageNet (paper, Table 2)", *(f"NBS {size}" for size in sizes)])


def _format_contrasts(results: Mapping[str, Any], contrasts: Sequence[float], size: int) -> str:
    rows = []
    for contrast in contrasts:
        name = name_trial(contrast, size)
        rows.append([f"{contrast:g}", *_list_errors(results, name)])
    headers = [f"contrast, NBS {size}", *_STATISTICS.values(), "inconsistency", "seeds"]
    return format_rows(rows, headers)


def _list_axis_rows(results: Mapping[str, Any], contrast: float, axis: str, names: Sequence[str]) -> list[list[str]]:
    setting = read_setting(SizeSetting, results)
    values = dict(zip(list_axis(setting, contrast, axis), getattr(setting, AXES[axis][0]), strict=True))
    words = AXES[axis][1]
    return [[f"{words} {values[name]:g}", f"{contrast:g}", *_list_errors(results, name)] for name in names]


def _list_errors(results: Mapping[str, Any], name: str) -> list[str]:
    """All errors of a training, the inconsistency of the re-estimated statistics, and how many seeds there are."""
    errors = [summarize(collect(results, name, key)) for key in _STATISTICS]
    inconsistency = compare_errors(results, name, *_DIFFERENCES["inconsistency"])
    return [*map(str, errors), inconsistency.show(sign="+"), str(inconsistency.number)]

"""Tables of the study, from what results.json holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from understanding_setting import INITIALIZATIONS, UnderstandingSetting
from understanding_trials import NORMS, name_trial

from bnext.studies.setting import read_setting
from bnext.studies.spread import summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["NORM_WORDS", "format_tables"]

NORM_WORDS = {"bn": "batch norm", "none": "no norm"}


def format_tables(results: Mapping[str, Any]) -> str:
    """All tables for which there are trials: means and standard deviations over seeds."""
    setting = read_setting(UnderstandingSetting, results)
    tables = [_format_rates(results, setting.rates), _format_start(results), _format_initializations(results)]
    return "\n\n".join(filter(None, tables))


def _format_rates(results: Mapping[str, Any], rates: Sequence[float]) -> str:
    rows = []
    for norm in NORMS:
        highest = collect(results, name_trial("rates", norm), "highest")
        if highest:
            accuracies = [collect(results, name_trial("rates", norm, f"{rate:g}"), "accuracy") for rate in rates]
            shown = ", ".join(f"{rate:.2g}" for rate in highest)
            rows.append([NORM_WORDS[norm], *map(summarize, accuracies), shown])
    headers = ["figure 1: accuracy in %", *(f"rate {rate:g}" for rate in rates), "highest rate that trains, by seed"]
    return format_rows(rows, headers) if rows else ""


def _format_start(results: Mapping[str, Any]) -> str:
    rows = []
    for norm in NORMS:
        steps, outputs = name_trial("steps", norm), name_trial("outputs", norm)
        if steps in results["trials"] and outputs in results["trials"]:
            sizes = ", ".join(f"{size:.2g}" for size in collect(results, steps, "largest_good_step"))
            gradient = _show(collect(results, steps, "gradient_norm"))
            agreement = summarize(collect(results, outputs, "agreement")).show(2)
            classes = summarize(collect(results, outputs, "largest_class"))
            rows.append([NORM_WORDS[norm], gradient, sizes, agreement, classes])

    headers = [
        "figures 3 and 6",
        "length of the gradient, by seed",
        "largest step up to which all lower the loss, by seed",
        "agreement of images",
        "share of the class named most, %",
    ]
    return format_rows(rows, headers) if rows else ""


def _format_initializations(results: Mapping[str, Any]) -> str:
    rows = []
    for kind in INITIALIZATIONS:
        for norm in NORMS:
            gradients, depth = name_trial("gradients", norm, kind), name_trial("depth", norm, kind)
            if gradients in results["trials"] and depth in results["trials"]:
                kurtosis = summarize(collect(results, gradients, "excess_kurtosis"))
                deviation = _show(collect(results, gradients, "deviation"))
                growth = _show(collect(results, depth, "growth"))
                rows.append([kind, NORM_WORDS[norm], deviation, kurtosis, growth])

    headers = [
        "figures 2 and 5",
        "",
        "deviation of the gradient, by seed",
        "its excess kurtosis",
        "activations, last block / first, by seed",
    ]
    return format_rows(rows, headers, num_texts=2) if rows else ""


def _show(values: Sequence[float]) -> str:
    """Numbers of any size, one for each seed."""
    return ", ".join("-" if math.isnan(value) else f"{value:.2g}" for value in values)

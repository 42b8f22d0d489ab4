"""Numbers that the script of the page draws: the norms, their profiles, and distances, to four digits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.measures.batch_sizes import count_elements, count_together
from bnext.diagnostics.reports.overview import Overview, summarize_norms
from bnext.diagnostics.reports.profiles import compare_populations, divide_depth, measure_distances, profile_norms
from bnext.text import flatten_text

__all__ = ["PageData", "gather_page_data"]

_DIGITS = 4
# What ends a script, or begins a comment in it.
_IN_SCRIPTS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&"}


@dataclasses.dataclass(frozen=True)
class PageData:
    """Tables, column by column; "norm" is a number of a path.

    Args:
        paths: of all norms.
        groups: of the inventory.
        sections: parts of the model along its norms: (name, first, last + 1).
        findings: code and severity of each.
        norms: name of a column -> a value for each path.
        profile: state of norms and their levels or domains; empty: they have none.
        comparison: moving averages against populations; empty: there is nothing to compare with.
        num_images: of the comparison; None: a pass over training images.
        distances: a table for each kind of `measure_distances`.
    """

    paths: tuple[str, ...]
    groups: tuple[Overview, ...]
    sections: tuple[tuple[str, int, int], ...]
    findings: tuple[dict[str, str], ...]
    norms: dict[str, list[Any]]
    profile: dict[str, list[Any]]
    comparison: dict[str, list[Any]]
    num_images: int | None
    distances: tuple[dict[str, Any], ...]

    def to_json(self) -> str:
        """JSON as it may stand in a script element, whatever the names are."""
        names = ("paths", "sections", "findings", "norms", "profile", "comparison", "distances")
        values = {name: _plain(getattr(self, name)) for name in names}
        text = json.dumps(values, allow_nan=False, separators=(",", ":"))
        return text.translate(_IN_SCRIPTS)


def gather_page_data(diagnosis: Diagnosis) -> PageData:
    """Everything that is drawn of a diagnosis.

    Args:
        diagnosis: see `Diagnosis`.
    """
    facts = diagnosis.facts
    paths = [norm.path for norm in facts.norms]
    groups = summarize_norms(facts)
    comparison = compare_populations(facts)
    number = {path: place for place, path in enumerate(paths)}

    kinds: dict[str, dict[str, Any]] = {}
    for one in measure_distances(facts):
        table = kinds.setdefault(one.kind, {"kind": one.kind, "norm": [], "names": [], "means": [], "ratios": []})
        for name, value in (("norm", number[one.path]), ("names", one.names), ("means", one.means)):
            table[name].append(value)
        table["ratios"].append(one.ratios)

    return PageData(
        paths=tuple(paths),
        groups=tuple(groups),
        sections=tuple(divide_depth(paths)),
        findings=tuple({"code": finding.code, "severity": finding.severity} for finding in diagnosis.findings),
        norms=_tabulate_norms(diagnosis, groups),
        profile=_tabulate(profile_norms(facts), number, ("mean", "std", "weight", "num_invalid")),
        comparison=_tabulate(() if comparison is None else comparison.shifts, number, ("distance", "ratio")),
        num_images=None if comparison is None else comparison.num_images,
        distances=tuple(kinds.values()),
    )


def _tabulate(rows: Sequence[Any], number: dict[str, int], names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of records that have a path and an owner; empty where there is no record."""
    if not rows:
        return {}
    columns = {name: [getattr(row, name) for row in rows] for name in ("owner", *names)}
    return {"norm": [number[row.path] for row in rows], **columns}


def _tabulate_norms(diagnosis: Diagnosis, groups: Sequence[Overview]) -> dict[str, list[Any]]:
    facts = diagnosis.facts
    group = {path: place for place, one in enumerate(groups) for path in one.paths}
    hits: dict[str, list[int]] = {}
    for place, finding in enumerate(diagnosis.findings):
        for path in dict.fromkeys(finding.evidence.layers):
            hits.setdefault(path, []).append(place)

    columns: dict[str, list[Any]] = {}
    for norm in facts.norms:
        updates = [one.num_updates for one in norm.populations if one.num_updates is not None]
        row = {
            "group": group[norm.path],
            "kind": norm.record.kind,
            "channels": norm.record.num_features,
            "together": count_together(facts, norm),
            "elements": count_elements(facts, norm),
            "calls": groups[group[norm.path]].num_calls,
            "updates": max(updates, default=None),
            "frozen": norm.record.frozen,
            "place": norm.place,
            "reason": flatten_text(norm.reason),
            "findings": hits.get(norm.path, []),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns or {"findings": [], "group": [], "kind": []}


def _plain(value: Any) -> Any:
    """A value as JSON has it: to a few digits, None where it is no finite number."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value

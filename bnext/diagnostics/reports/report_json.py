"""The diagnosis as JSON, in the form that `doctor.schema.json` beside this file describes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import torch

import bnext
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.findings import SEVERITIES, Finding
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.overview import describe_overview, summarize_norms
from bnext.files import drop_nan

__all__ = ["SCHEMA", "describe_diagnosis", "format_json", "read_schema"]

SCHEMA = "bnext-doctor/1"  # another number where a name goes or changes its meaning; new names keep it


def describe_diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    """The report as dictionaries, lists, strings and numbers: what JSON has, numbers that are not finite as None."""
    facts = diagnosis.facts
    origin = facts.origin
    severities = [finding.severity for finding in diagnosis.findings]

    report = {
        "schema": SCHEMA,
        "versions": {"bnext": bnext.__version__, "torch": torch.__version__},
        "depth": diagnosis.depth,
        "model": {
            "name": facts.model_name,
            "mode": "training" if facts.is_training else "evaluation",
            "num_norms": len(facts.norms),
            "num_parameters": facts.num_parameters,
        },
        "origin": {
            "kind": origin.kind,
            "config_file": origin.config_file if origin.kind == "config" else "",
            "opts": [str(word) for word in origin.opts],
            "weights": origin.weights,
        },
        "counts": {severity: severities.count(severity) for severity in SEVERITIES},
        "checks": list(find_checks()),
        "findings": [_describe(finding) for finding in diagnosis.findings],
        "inventory": [describe_overview(group) for group in summarize_norms(facts)],
        "advice": [dataclasses.asdict(advice) for advice in diagnosis.advice],
        "failures": list(diagnosis.failures),
    }

    plain: dict[str, Any] = _simplify(drop_nan(report))
    return plain


def _describe(finding: Finding) -> dict[str, Any]:
    check, evidence = finding.check, finding.evidence
    remedy = evidence.remedy

    return {
        "code": check.code,
        "name": check.name,
        "severity": evidence.severity,
        "title": check.title,
        "layers": list(evidence.layers),
        "evidence": evidence.text,
        "numbers": {name: float(number) for name, number in evidence.numbers.items()},
        "cost": check.cost,
        "source": check.source,
        "points": float(finding.points),
        "remedy": {
            "text": remedy.text,
            "keys": dict(remedy.keys),
            "command": remedy.command,
            "call": remedy.call,
        },
        "page": check.page,
    }


def _simplify(value: Any) -> Any:
    """A value of JSON's types alone; of others their text, as a config key may have any."""
    if isinstance(value, Mapping):
        return {str(key): _simplify(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_simplify(item) for item in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def format_json(diagnosis: Diagnosis) -> str:
    """The report as a JSON text; the same diagnosis gives the same text."""
    return json.dumps(describe_diagnosis(diagnosis), indent=2, allow_nan=False)


@functools.cache
def read_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the report."""
    text = resources.files(__package__).joinpath("doctor.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema

"""The diagnosis for a terminal: worst first, the inventory in a table, the line to run at the end."""

from __future__ import annotations

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.findings import SEVERITIES, Finding
from bnext.diagnostics.inventory import format_norm_groups
from bnext.errors import list_few

__all__ = ["format_text"]


def format_text(diagnosis: Diagnosis, *, with_inventory: bool = True) -> str:
    """The whole report as text.

    Args:
        diagnosis: see `Diagnosis`.
        with_inventory: whether the table of norms is in it.
    """
    lines = [_summarize(diagnosis)]
    for finding in diagnosis.findings:
        lines += ["", *_describe(finding)]
    lines += ["", *(f"not known: {failure}" for failure in diagnosis.failures)] if diagnosis.failures else []
    if with_inventory and diagnosis.groups:
        lines += ["", format_norm_groups(diagnosis.groups)]

    first = next((finding.evidence.remedy for finding in diagnosis.findings), None)
    if first is not None and (first.command or first.call):
        lines += ["", "Next:", f"    {first.command or first.call}"]
    return "\n".join(lines)


def _summarize(diagnosis: Diagnosis) -> str:
    counts = []
    for severity in SEVERITIES:
        number = sum(finding.severity == severity for finding in diagnosis.findings)
        if number:
            counts.append(f"{number} {severity}{'s' if number > 1 else ''}")
    norms = len(diagnosis.facts.norms)
    return f"{diagnosis.facts.model_name}, {norms} norms: {', '.join(counts) or 'nothing found'}"


def _describe(finding: Finding) -> list[str]:
    evidence, check = finding.evidence, finding.check
    lines = [f"{finding.severity} {finding.code} {check.title}", f"  {evidence.text}"]
    if evidence.layers:
        lines.append(f"  layers: {list_few(evidence.layers)}")
    if check.cost:
        lines.append(f"  cost: {check.cost} ({check.source})")
    lines.append(f"  remedy: {evidence.remedy.text}")
    lines += [f"    {key} {value!r}" for key, value in evidence.remedy.keys.items()]
    return lines

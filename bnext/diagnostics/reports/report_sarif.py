"""The diagnosis as SARIF 2.1.0, as code scanning of GitHub and editors take it."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

import bnext
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Finding
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.report_text import write_pairs
from bnext.files import find_local_file

__all__ = ["describe_sarif", "format_sarif"]

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_MOST_LAYERS = 100  # of a finding; code scanning shows no more


def format_sarif(diagnosis: Diagnosis, *, status: int = 0, config_file: str = "") -> str:
    """The report as a SARIF text; see `describe_sarif`."""
    log = describe_sarif(diagnosis, status=status, config_file=config_file)
    return json.dumps(log, indent=2, allow_nan=False)


def describe_sarif(diagnosis: Diagnosis, *, status: int = 0, config_file: str = "") -> dict[str, Any]:
    """The report as a SARIF log with one run.

    Args:
        diagnosis: see `Diagnosis`. Its findings are placed in the config file, at the key that the remedy sets, or that
            names the norms, where the file has it; else in the checkpoint. Those of a model in Python have layers
            alone.
        status: exit status of the command.
        config_file: path of the config; "": as in the diagnosis.
    """
    origin = diagnosis.facts.origin
    if origin.kind == "config":  # that of a checkpoint alone is one to be named
        config_file = config_file or origin.config_file
    checks = find_checks()
    findings = [finding for finding in diagnosis.findings if finding.code in checks]
    place, lines = _find_place(config_file or origin.weights), _read_lines(config_file)
    numbers: collections.Counter[str] = collections.Counter()
    results = []

    for finding in findings:
        identity = _identify(finding, place)
        numbers[identity] += 1
        line = _find_line([*finding.evidence.remedy.keys, *_find_norm_keys(diagnosis.facts, finding)], lines)
        results.append(_describe_result(finding, list(checks).index(finding.code), place, line))
        # The number tells two findings apart that agree in code, file and layers.
        results[-1]["partialFingerprints"] = {"primaryLocationLineHash": f"{identity}:{numbers[identity]}"}

    notifications = [{"level": "warning", "message": {"text": failure}} for failure in diagnosis.failures]
    invocation = {"executionSuccessful": True, "exitCode": status, "toolExecutionNotifications": notifications}
    driver = {
        "name": "bnext doctor",
        "version": bnext.__version__,
        "semanticVersion": bnext.__version__,
        "rules": [_describe_rule(check) for check in checks.values()],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": {"depth": diagnosis.depth, "model": diagnosis.facts.model_name},
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _describe_rule(check: Check) -> dict[str, Any]:
    parts = [check.explanation]
    if check.cost:
        parts.append(f"Cost: {check.cost}{f' ({check.source})' if check.source else ''}")
    elif check.source:
        parts.append(f"Source: {check.source}")

    text = "\n\n".join([*parts, f"More: bnext doctor --explain {check.code}"])
    return {
        "id": check.code,
        "name": "".join(word.capitalize() for word in check.name.split("-")),
        "shortDescription": {"text": check.title},
        "fullDescription": {"text": check.explanation},
        "help": {"text": text, "markdown": text},
        "defaultConfiguration": {"level": "warning"},
        "properties": {"tags": ["batch-normalization", check.depth], "page": check.page},
    }


def _describe_result(finding: Finding, index: int, place: str, line: int) -> dict[str, Any]:
    evidence, check = finding.evidence, finding.check
    layers = [{"fullyQualifiedName": layer, "kind": "member"} for layer in evidence.layers[:_MOST_LAYERS]]
    location: dict[str, Any] = {"logicalLocations": layers} if layers else {}
    if place:
        location["physicalLocation"] = {"artifactLocation": {"uri": place}, "region": {"startLine": line}}

    return {
        "ruleId": check.code,
        "ruleIndex": index,
        "level": evidence.severity,
        "message": {"text": _write_message(finding)},
        "locations": [location] if location else [],
        "properties": {"layers": len(evidence.layers), "points": _drop_nan(finding.points)},
    }


def _write_message(finding: Finding) -> str:
    """The evidence and the remedy."""
    remedy = finding.evidence.remedy
    parts = [finding.evidence.text, remedy.text, *write_pairs(remedy.keys), remedy.command, remedy.call]
    text = "\n".join(part for part in parts if part)
    return text.replace("](", "]\\(")  # which would be a link


def _drop_nan(number: float) -> float | None:
    return number if number - number == 0 else None


def _identify(finding: Finding, place: str) -> str:
    """A finding as it is told from others in the next run: without its numbers, which change."""
    words = "\n".join([finding.code, place, *sorted(finding.evidence.layers)])
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- where it is


def _find_place(path: str) -> str:
    """A file as a URI, which is relative to the working directory where the file is below it."""
    if "://" in path:
        return path
    file = find_local_file(path)
    if not file:
        return ""

    absolute = os.path.abspath(file)
    relative = os.path.relpath(absolute)
    if relative == os.pardir or relative.startswith(f"{os.pardir}{os.sep}"):
        return Path(absolute).as_uri()
    return quote(os.fsencode(relative))


def _find_norm_keys(facts: Facts, finding: Finding) -> list[str]:
    """Keys that name the norms of a finding."""
    norms = [facts.find_norm(path) for path in finding.evidence.layers]
    return list(dict.fromkeys(norm.norm_key for norm in norms if norm is not None and norm.norm_key))


def _find_line(keys: Iterable[str], lines: Mapping[str, int]) -> int:
    """The line of the first key that the file has, else of the nearest node above one; 1."""
    for key in keys:
        parts = key.split(".")
        for length in range(len(parts), 1, -1):
            line = lines.get(".".join(parts[:length]))
            if line is not None:
                return line
    return 1


def _read_lines(config_file: str) -> dict[str, int]:
    """Key or node of a YAML file -> its line; {} where it is none that can be read."""
    if not config_file.endswith((".yaml", ".yml")) or "://" in config_file:
        return {}
    try:
        root = yaml.compose(Path(config_file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}

    lines: dict[str, int] = {}
    nodes = [("", root)]
    while nodes:
        prefix, node = nodes.pop()
        if not isinstance(node, yaml.MappingNode):
            continue
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name not in lines:
                lines[name] = key.start_mark.line + 1
                nodes.append((f"{name}.", value))
    return lines

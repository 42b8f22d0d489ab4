"""All checks, by code: every module of `bnext.diagnostics.checks` has one, its `CHECK`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping

from bnext.diagnostics import checks
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import SEVERITIES, Check, Finding
from bnext.diagnostics.lazy_keys import suit_config

__all__ = ["find_checks", "run_checks"]


@functools.cache
def find_checks() -> Mapping[str, Check]:
    """Code -> check, in the order of the codes."""
    found: dict[str, Check] = {}
    for module in pkgutil.iter_modules(checks.__path__):
        check = importlib.import_module(f"{checks.__name__}.{module.name}").CHECK
        assert check.code not in found, f"{check.code} is the code of two checks"
        found[check.code] = check
    return dict(sorted(found.items()))


def run_checks(facts: Facts, only: Iterable[Check] | None = None) -> tuple[list[Finding], list[str]]:
    """Findings, worst first, and the checks that failed, in sentences.

    Args:
        facts: see `Facts`.
        only: some checks; None: all.

    Note:
        A check that fails hides no other one: its error is a sentence of the report.
    """
    findings: list[Finding] = []
    failures: list[str] = []
    for check in find_checks().values() if only is None else only:
        try:
            findings += [Finding(check, suit_config(facts, evidence)) for evidence in check.examine(facts)]
        except Exception as error:
            failures.append(f"{check.code} {check.name} failed: {type(error).__name__}: {error}")

    order = {severity: place for place, severity in enumerate(SEVERITIES)}
    findings.sort(key=lambda finding: (order[finding.severity], -finding.points, finding.code))
    return findings, failures

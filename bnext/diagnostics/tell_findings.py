"""Findings as lines of a log, each once."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from bnext.diagnostics.findings import Finding
from bnext.notices import tell_once

__all__ = ["tell_findings"]


def tell_findings(logger: logging.Logger, findings: Iterable[Finding], more: str = "") -> None:
    """Warn of errors and warnings, one line each, unless the same was said of the same norms in this process.

    Args:
        logger: of the module that speaks.
        findings: notes among them are not said.
        more: a sentence for the end of a line.
    """
    for finding in findings:
        if finding.severity == "note":
            continue

        remedy = finding.evidence.remedy
        keys = ", ".join(f"{key} {value}" for key, value in remedy.keys.items())
        mend = f"{remedy.text.removesuffix('.')}: {keys}." if keys else remedy.text
        words = f"{finding.check.title}. {finding.evidence.text} {mend} {more}".rstrip()
        tell_once(logger, (finding.code, *finding.evidence.layers), f"{finding.code}: %s", words)

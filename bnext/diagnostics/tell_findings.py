"""Findings as lines of a log, each once."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from bnext.diagnostics.findings import Finding, Remedy
from bnext.notices import tell_once

__all__ = ["tell_findings"]

_LONGEST = 200  # letters of code in a line of a log


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

        parts = (f"{finding.check.title}.", finding.evidence.text, _describe_remedy(finding.evidence.remedy), more)
        words = " ".join(filter(None, parts))
        tell_once(logger, (finding.code, *finding.evidence.layers), f"{finding.code}: %s", words)


def _describe_remedy(remedy: Remedy) -> str:
    """In words, and what can be pasted: keys, else a command, else Python; not where it makes the line a page."""
    if remedy.keys:
        return f"{remedy.text} In the config: {', '.join(f'{key} {value}' for key, value in remedy.keys.items())}."
    code = remedy.command or remedy.call
    return f"{remedy.text} `{code}`" if 0 < len(code) <= _LONGEST else remedy.text

"""A check and what it finds: the records, without a check of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from bnext.diagnostics.facts import Facts

__all__ = ["SEVERITIES", "Check", "Depth", "Evidence", "Finding", "Remedy", "Severity"]

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # worst first
Depth = Literal["static", "forward", "full", "training"]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A way to make it right: in words, and as what can be pasted. Whoever follows it ends up right.

    Args:
        text: one or two sentences.
        keys: config keys and their values.
        command: a command line; see `Origin.write_command`.
        call: a line of Python.
    """

    text: str
    keys: Mapping[str, object] = dataclasses.field(default_factory=dict)
    command: str = ""
    call: str = ""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """An observation of a check.

    Args:
        severity: "error": results are wrong, or will be; "warning": probably; "note": worth knowing, often on purpose.
            A healthy model gives no error and no warning.
        layers: paths of the norms; (): it is of no single ones.
        text: one or two sentences with the numbers.
        numbers: name -> value, those of the text.
        remedy: see `Remedy`.
        points: AP or accuracy points that are at stake here, for the order of findings; None: those of the check.
    """

    severity: Severity
    layers: tuple[str, ...]
    text: str
    remedy: Remedy
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    points: float | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """A fault that the doctor knows.

    Args:
        code: "BN001", ...; never given to another check.
        name: the fault in two words or three, as "repeated-calls".
        title: the fault in one line, without numbers.
        explanation: why it is one, and when it is none; a paragraph in Markdown.
        cost: what it cost somebody, in numbers; "": nobody has measured it.
        source: of the cost, or of the fault where nobody has measured one: paper and table, or public thread.
        depth: what must have been run for it to see anything.
        examine: facts -> what it saw; nothing where a fact that it needs is absent.
        points: AP or accuracy points that it cost in the source; 0: not known.
    """

    code: str
    name: str
    title: str
    explanation: str
    cost: str
    source: str
    depth: Depth
    examine: Callable[[Facts], Iterable[Evidence]]
    points: float = 0.0

    @property
    def page(self) -> str:
        """Its place in the site, from the site's first page."""
        return f"doctor-codes.html#{self.code.lower()}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A finding: `check` says what it means, `evidence` what was seen."""

    check: Check
    evidence: Evidence

    @property
    def code(self) -> str:
        return self.check.code

    @property
    def severity(self) -> Severity:
        return self.evidence.severity

    @property
    def points(self) -> float:
        """See `Check.points`; those of the evidence, where it has some."""
        return self.check.points if self.evidence.points is None else self.evidence.points

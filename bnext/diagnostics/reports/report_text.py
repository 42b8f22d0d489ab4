"""The diagnosis for a terminal: worst first, then the inventory, and at the end the line to run."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.findings import SEVERITIES, Check, Depth, Evidence, Finding, Remedy
from bnext.diagnostics.fold_paths import fold_paths
from bnext.diagnostics.recommend import Advice
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.overview import Overview, find_facets, summarize_norms
from bnext.garbage import without_collection
from bnext.text import flatten_text

__all__ = ["DEEPER", "explain_check", "find_next", "format_text", "list_checks", "summarize", "write_pairs"]

_MOST_LINES = 24  # of an inventory that nobody has asked for: a screen
_MOST_PATTERNS = 6  # of the layers of a finding
_MOST_NAMES = 12  # of a group of norms
_LEAST_WIDTH = 40
_LABEL = 9  # letters before what a line of a finding says
_COLORS = {"error": "1;31", "warning": "1;33", "note": "36"}

# Depth -> words for it, and for what sees more.
DEEPER: Mapping[Depth, tuple[str, str]] = {
    "static": ("the model, without data", "More is seen with data"),
    "forward": ("the model and some batches", "More is seen with a pass over the data"),
    "full": ("the model and a pass over the data", ""),
    "training": ("a running training", ""),
}
# Depth -> options of the command, and the call, that see more.
_NEXT: Mapping[Depth, tuple[tuple[str, ...], str]] = {
    "static": (("--data",), "bnext.diagnose(model, data)"),
    "forward": (("--depth", "full"), 'bnext.diagnose(model, data, depth="full")'),
}


@without_collection()
def format_text(
    diagnosis: Diagnosis,
    *,
    width: int = 100,
    has_colors: bool = False,
    is_complete: bool = False,
) -> str:
    """The whole report as text.

    Args:
        diagnosis: see `Diagnosis`.
        width: of the terminal, in letters; what can be pasted is never broken.
        has_colors: whether severities are in colours.
        is_complete: all of notes, all norms, and advice for every place; else of notes a line, of norms what fits a
            screen, and advice where the model does otherwise.
    """
    width = max(width, _LEAST_WIDTH)
    paint: Callable[[str, str], str] = _paint if has_colors else _leave
    lines = _wrap(f"{summarize(diagnosis)}.", width)
    lines += _wrap(_tell_depth(diagnosis), width)

    for finding in diagnosis.select("note" if is_complete else "warning"):
        lines += ["", *_describe(finding, width, paint)]
    notes = [finding for finding in diagnosis.findings if finding.severity == "note" and not is_complete]
    lines += [""] if notes else []
    for finding in notes:
        lines.append(_describe_note(finding, width, paint))
    lines += [""] if diagnosis.failures else []
    for failure in diagnosis.failures:
        lines += _wrap(f"not known: {flatten_text(failure)}", width, "  ")

    if diagnosis.facts.norms:
        lines += ["", *_list_norms(diagnosis, width, None if is_complete else _MOST_LINES)]
    if diagnosis.advice:
        lines += ["", *_list_advice(diagnosis, width, is_complete=is_complete)]
    lines += ["", *_tell_next(diagnosis)]
    return "\n".join(lines)


def summarize(diagnosis: Diagnosis) -> str:
    """The model, its norms, and how many findings of each severity, on one line."""
    counts = []
    for severity in SEVERITIES:
        number = sum(finding.severity == severity for finding in diagnosis.findings)
        if number:
            counts.append(f"{number} {severity}{'s' if number > 1 else ''}")

    name, number = flatten_text(diagnosis.facts.model_name) or "the model", len(diagnosis.facts.norms)
    norms = "no norm" if not number else f"{number:,} norm{'s' if number > 1 else ''}"
    return f"{name}, {norms}: {', '.join(counts) or 'nothing wrong was found'}"


def _tell_depth(diagnosis: Diagnosis) -> str:
    facts, (looked, more) = diagnosis.facts, DEEPER[diagnosis.depth]
    words = f"{looked}, in {'training' if facts.is_training else 'evaluation'} mode"
    if facts.origin.kind == "checkpoint":
        words, more = "a file alone", "More is seen with its config"
    sentences = [f"Looked at: {words}; {len(find_checks())} checks."]

    if facts.weights is not None and facts.weights.source and not facts.weights.is_loaded:
        sentences.append(f"{flatten_text(facts.weights.source)} was not read.")
    if not facts.norms:
        sentences.append("There is no norm to look at.")
    elif more:
        sentences.append(f"{more}.")
    return " ".join(sentences)


# ---- findings


def _describe(finding: Finding, width: int, paint: Callable[[str, str], str]) -> list[str]:
    evidence, check = finding.evidence, finding.check
    severity = finding.severity
    head = _wrap(f"{severity.upper()} {check.code}  {check.title}", width, " " * len(f"{severity} {check.code}  "))
    head[0] = head[0].replace(severity.upper(), paint(severity.upper(), severity), 1)

    lines = [*head, *_label("layers", _fold_layers(evidence), width), *_label("seen", evidence.text, width)]
    if check.cost:
        lines += _label("cost", f"{check.cost} [{check.source}]" if check.source else check.cost, width)
    else:
        lines += _label("source", check.source, width)
    lines += _label("remedy", evidence.remedy.text, width)
    lines += [f"{' ' * (_LABEL + 4)}{line}" for line in _list_pastes(evidence.remedy)]
    return [*lines, *_label("more", f"bnext doctor --explain {check.code}", width)]


def _describe_note(finding: Finding, width: int, paint: Callable[[str, str], str]) -> str:
    number = len(finding.evidence.layers)
    text = f"note {finding.code}  {finding.check.title}{f' ({number:,} norms)' if number > 1 else ''}"
    short = text if len(text) <= width else f"{text[: width - 4]} ..."
    return paint("note", "note") + short.removeprefix("note")


def _fold_layers(evidence: Evidence) -> str:
    patterns = list(fold_paths(evidence.layers))
    shown = ", ".join(pattern or "the model" for pattern in patterns[:_MOST_PATTERNS])
    rest = len(patterns) - _MOST_PATTERNS
    more = f" and {rest:,} more" if rest > 0 else ""
    return f"{shown}{more} ({len(evidence.layers):,} norms)" if len(evidence.layers) > 1 else shown


def _list_pastes(remedy: Remedy) -> list[str]:
    """Lines to paste, unbroken: keys as a command line takes them, a command, Python."""
    lines = [flatten_text(pair) for pair in write_pairs(remedy.keys)]
    lines += [flatten_text(remedy.command)] if remedy.command else []
    if remedy.call:
        lines += [flatten_text(line) for line in remedy.call.split("\n")]
    return lines


def write_pairs(keys: Mapping[str, object]) -> list[str]:
    """Keys as KEY VALUE pairs of a command line.

    Example:
        >>> write_pairs({"MODEL.FPN.NORM": "SyncBN", "TEST.AUG.MIN_SIZES": (400, 500)})
        ['MODEL.FPN.NORM SyncBN', "TEST.AUG.MIN_SIZES '(400, 500)'"]
    """
    return [f"{key} {shlex.quote(str(value))}" for key, value in keys.items()]


# ---- the inventory


def _list_norms(diagnosis: Diagnosis, width: int, most: int | None) -> list[str]:
    groups = summarize_norms(diagnosis.facts)
    facets = [find_facets(group) for group in groups]
    usual = {question: answer for question, answer in facets[0].items() if all(question in one for one in facets)}
    usual = {question: answer for question, answer in usual.items() if all(one[question] == answer for one in facets)}

    lines: list[str] = []
    if len(groups) > 1 and usual:
        lines += _wrap(f"All norms: {_join(usual)}.", width, "    ")
    else:
        usual = {}

    for number, (group, answers) in enumerate(zip(groups, facets, strict=True)):
        rest = {question: answer for question, answer in answers.items() if question not in usual}
        names = _name_group(group, len(group.norms) if most is None else _MOST_NAMES)
        block = [*_wrap(names, width, "        "), *_wrap(f"    {_join(rest)}", width, "    ")]
        if most is not None and lines and len(lines) + len(block) > most:
            norms = sum(len(one.norms) for one in groups[number:])
            lines.append(f"... {len(groups) - number} more groups with {norms:,} norms: --all shows them")
            break
        lines += block
    return lines


def _name_group(group: Overview, most: int) -> str:
    patterns = list(group.patterns)
    prefix = _find_prefix(patterns)
    inside = f" in {flatten_text(prefix)}" if prefix else ""
    names = [flatten_text(pattern.removeprefix(f"{prefix}.") if prefix else pattern) for pattern in patterns]
    names = [name or "the model itself" for name in names]
    shown = ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
    return f"{len(group.norms):,} {flatten_text(group.norms[0].record.kind)}{inside}: {shown}"


def _find_prefix(patterns: Sequence[str]) -> str:
    """The parts with which all of them begin; "": none, or there is one pattern alone."""
    if len(patterns) < 2:
        return ""
    shared = []
    for parts in zip(*(pattern.split(".")[:-1] for pattern in patterns), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _join(facets: Mapping[str, str]) -> str:
    words = []
    for question, answer in facets.items():
        words.append(answer if question == "together" else f"{question}: {answer}")
    return flatten_text("; ".join(words))


# ---- advice


def _list_advice(diagnosis: Diagnosis, width: int, *, is_complete: bool) -> list[str]:
    """Places whose norm is none of those that are advised, with their choices; the others are named."""
    followed = [advice.place or "the model" for advice in diagnosis.advice if advice.is_followed]
    shown = [advice for advice in diagnosis.advice if is_complete or not advice.is_followed]

    lines = ["Which norm?"] if diagnosis.advice else []
    if followed:
        lines += _wrap(f"  Yours is one of those with good figures: {', '.join(followed)}.", width, "    ")
    for advice in shown:
        lines += _describe_advice(advice, width, len(advice.options) if is_complete else 1)
    return lines


def _describe_advice(advice: Advice, width: int, most: int) -> list[str]:
    others = ", ".join(option.norm for option in advice.options[most:])
    rest = f"; else {others}" if others else ""
    lines = _wrap(flatten_text(f"  {advice.place or 'The model'}: {advice.situation}{rest}"), width, "    ")
    for option in advice.options[:most]:
        facts = "; ".join(part for part in (option.figure, option.limit) if part)
        words = f"    - {option.norm}{' (yours)' if option.is_chosen else ''}: {facts} [{option.source}]"
        lines += _wrap(flatten_text(words), width, "      ")
        if not advice.is_followed:
            lines += [f"          {flatten_text(pair)}" for pair in write_pairs(option.keys)]
    return lines


# ---- the end


def find_next(diagnosis: Diagnosis) -> str:
    """The line to run next: the first remedy, else what sees more; "": nothing."""
    origin = diagnosis.facts.origin
    for finding in diagnosis.select("warning"):
        remedy = finding.evidence.remedy
        if remedy.command:
            return remedy.command
        if remedy.keys and origin.kind == "config":
            pairs = [str(word) for pair in remedy.keys.items() for word in pair]
            return origin.write_command("doctor", pairs=tuple(pairs))
        if remedy.call:
            return remedy.call
    for finding in diagnosis.select("warning"):
        return f"bnext doctor --explain {finding.code}"

    if diagnosis.depth not in _NEXT or not diagnosis.facts.norms:
        return ""
    options, call = _NEXT[diagnosis.depth]
    return origin.write_command("doctor", *options) if origin.kind != "model" else call


def _tell_next(diagnosis: Diagnosis) -> list[str]:
    command = find_next(diagnosis)
    if not command:
        return ["Nothing is to be done."]
    return ["Next:", *(f"    {flatten_text(line)}" for line in command.split("\n"))]


# ---- the checks themselves


def list_checks(checks: Sequence[Check]) -> str:
    """A line for each check: its code, what it needs, its title."""
    return "\n".join(f"{check.code}  {check.depth:8}  {check.title}" for check in checks)


def explain_check(check: Check, width: int = 100) -> str:
    """All that is to be said of a check without a model: why it is a fault, when it is none, what it costs."""
    looked, _ = DEEPER[check.depth]
    lines = [f"{check.code} {check.name}", "", *_wrap(f"{check.title[:1].upper()}{check.title[1:]}.", width), ""]
    lines += _wrap(check.explanation, width)
    if check.cost:
        lines += ["", *_wrap(f"Cost: {check.cost} [{check.source}]", width)]
    elif check.source:
        lines += ["", *_wrap(f"Source: {check.source}", width)]
    lines += ["", *_wrap(f"Seen with: {looked}. In the docs: {check.page}", width)]
    return "\n".join(lines)


# ---- lines


def _label(label: str, text: str, width: int) -> list[str]:
    if not text:
        return []
    return _wrap(f"  {label:{_LABEL}}{flatten_text(text)}", width, " " * (_LABEL + 2))


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    ) or [""]


def _paint(text: str, kind: str) -> str:
    return f"\x1b[{_COLORS[kind]}m{text}\x1b[0m"


def _leave(text: str, kind: str) -> str:
    return text

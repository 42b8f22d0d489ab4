"""Findings on cards, worst first, and the advice which norm to choose."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.findings import Finding, Remedy
from bnext.diagnostics.fold_paths import fold_paths
from bnext.diagnostics.recommend import Advice, Option
from bnext.diagnostics.reports.page.markup import count_of, draw_sign, write_markdown, write_name, write_paste
from bnext.diagnostics.reports.page.page_data import PageData
from bnext.diagnostics.reports.report_text import DEEPER, find_next, write_pairs

__all__ = ["write_advice", "write_findings"]

_MOST_PATTERNS = 8  # of layers on a card; the inventory has all of them


def write_findings(diagnosis: Diagnosis, data: PageData) -> str:
    """A card for each finding; of a healthy model a word."""
    if not diagnosis.findings:
        if not diagnosis.facts.norms:
            return ""
        words = "No check found anything: what normalizes in training and at inference agrees, as far as was seen."
        more = find_next(diagnosis)
        paste = write_paste(f"{DEEPER[diagnosis.depth][1]}:", more) if more else ""
        return f'<h2>Nothing found</h2><p class="lead">{words}</p>{paste}'

    with_norms = {number for hits in data.norms["findings"] for number in hits}
    cards = [_write_card(finding, number in with_norms) for number, finding in enumerate(diagnosis.findings)]
    return f"<h2>Findings, worst first</h2>{''.join(cards)}"


def _write_card(finding: Finding, has_norms: bool) -> str:
    evidence, check = finding.evidence, finding.check
    parts = [f"<p>{write_markdown(evidence.text)}</p>"]
    if check.cost:
        source = f' <span class="muted">({escape(check.source)})</span>' if check.source else ""
        parts.append(f'<p class="cost"><b>It cost</b><span>{escape(check.cost)}{source}</span></p>')
    elif check.source:
        parts.append(f'<p class="muted">Source: {escape(check.source)}</p>')
    if evidence.layers:
        parts.append(_write_layers(evidence.layers, check.code if has_norms else ""))
    parts.append(
        f'<details class="why"><summary>Why, and when it is none</summary><p>{write_markdown(check.explanation)}</p>'
        f"<p><code>bnext doctor --explain {escape(check.code)}</code></p></details>"
    )
    parts.append(_write_remedy(evidence.remedy))

    badge = f'<span class="badge {finding.severity}">{draw_sign(finding.severity)}{finding.severity}</span>'
    title = write_markdown(check.title[:1].upper() + check.title[1:])
    code = f'<span class="code">{escape(check.code)} {escape(check.name)}</span>'
    return f"""<article class="card {finding.severity}"><header>{badge}<h3>{title}</h3>{code}</header>
{"".join(parts)}</article>"""


def _write_layers(layers: Sequence[str], code: str) -> str:
    patterns = list(fold_paths(layers))
    words = [f"<code>{write_name(pattern) or 'the model'}</code>" for pattern in patterns[:_MOST_PATTERNS]]
    if len(patterns) > _MOST_PATTERNS:
        words.append(f"<span>and {len(patterns) - _MOST_PATTERNS} more patterns</span>")
    if code:
        button = f'<button type="button" class="show" data-code="{escape(code)}" hidden>Show in the inventory</button>'
        words.append(button)
    return f'<p class="layers"><span class="muted">{count_of(len(layers), "layer")}:</span> {" ".join(words)}</p>'


def _write_remedy(remedy: Remedy) -> str:
    blocks = {"Config keys": "\n".join(write_pairs(remedy.keys)), "Command line": remedy.command, "Python": remedy.call}
    figures = "".join(write_paste(title, text) for title, text in blocks.items())
    return f'<div class="remedy"><p>{write_markdown(remedy.text)}</p>{figures}</div>'


# ---- advice


def write_advice(every: Sequence[Advice]) -> str:
    """Advice on norms, place by place, best first."""
    if not every:
        return ""
    figures = "".join(_write_place(advice) for advice in every)
    return f"""<h2>Which norm</h2>
<p class="lead">What the literature measured for such batches, best first; on its models and data, not on yours.</p>
{figures}"""


def _write_place(advice: Advice) -> str:
    options = "".join(_write_option(option) for option in advice.options)
    place = f"{write_name(advice.place)}: " if advice.place else ""
    best = f'<span class="muted">→ {escape(advice.options[0].norm)}</span>' if advice.options else ""
    if advice.is_followed:
        best = '<span class="badge healthy">followed</span>'
    summary = f"<summary>{place}{write_name(advice.situation)} {best}</summary>"
    return f'<details class="advice">{summary}<ol>{options}</ol></details>'


def _write_option(option: Option) -> str:
    parts = [f"<b>{escape(option.norm)}</b>"]
    parts += [f": {escape(option.figure)}"] if option.figure else []
    parts += [' <span class="badge healthy">chosen</span>'] if option.is_chosen else []
    parts.append(f' <span class="muted">({escape(option.source)})</span>')
    parts += [f'<br><span class="muted">{escape(option.limit)}</span>'] if option.limit else []

    pairs = "" if option.is_chosen else "\n".join(write_pairs(option.keys))
    return f"<li>{''.join(parts)}{write_paste('Config keys', pairs)}</li>"

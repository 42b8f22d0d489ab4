"""The inventory: a line for each group of norms, which opens; the script fills in its norms."""

from __future__ import annotations

from html import escape

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.reports.overview import Overview, find_facets
from bnext.diagnostics.reports.page.markup import count_of, write_chip, write_name
from bnext.diagnostics.reports.page.page_data import PageData

__all__ = ["write_inventory"]

_MOST_PATTERNS = 8  # of a line


def write_inventory(diagnosis: Diagnosis, data: PageData) -> str:
    """All norms in groups, with a search."""
    if not data.paths:
        return ""
    options = {"all": "all norms", "findings": "with findings", "frozen": "frozen", "trained": "not frozen"}
    choices = "".join(f'<option value="{key}">{words}</option>' for key, words in options.items())
    groups = "".join(_write_group(group, diagnosis) for group in data.groups)
    return f"""<h2>Inventory</h2>
<p class="lead">Norms that give the same answers to <em>which batch?</em> are one line. Open it for each of them.</p>
<div class="tools"><input type="search" id="query" placeholder="path, kind, place or code" aria-label="Search norms">
<select id="only" aria-label="Norms that are shown">{choices}</select>
<button type="button" id="unfold">Fold all / none</button>
<output id="shown" class="muted" aria-live="polite"></output></div>
<div class="groups">{groups}</div>"""


def _write_group(group: Overview, diagnosis: Diagnosis) -> str:
    facets = find_facets(group)
    paths = set(group.paths)
    codes: dict[str, str] = {}
    for finding in diagnosis.findings:
        if not paths.isdisjoint(finding.evidence.layers):
            codes.setdefault(finding.code, finding.severity)  # findings are worst first

    patterns = group.patterns
    name = ", ".join(patterns[:_MOST_PATTERNS])
    if len(patterns) > _MOST_PATTERNS:
        name += f" and {len(patterns) - _MOST_PATTERNS} more"
    chips = [f'<span class="chip"><b>{escape(group.norms[0].record.kind)}</b></span>']
    chips += [write_chip(question, answer) for question, answer in facets.items()]
    chips += [f'<span class="chip hit {severity}">{escape(code)}</span>' for code, severity in codes.items()]

    headers = ["norm", "channels", "samples together", "elements per channel", "calls", "updates"]
    head = "".join(f'<th scope="col">{header}</th>' for header in headers) + '<th scope="col" class="words"></th>'
    return f"""<details class="group"><summary><span class="path">{write_name(name) or "the model"}</span>
<span class="number">{count_of(len(group.norms), "norm")}</span><span class="chips">{"".join(chips)}</span></summary>
<div class="inside"><div class="scroll" tabindex="0" role="region" aria-label="Norms of this line"><table><thead><tr>\
{head}</tr></thead><tbody></tbody></table></div></div></details>"""

"""The head of the page: how the model is, where it hurts, and what was looked at."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from html import escape

from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import SEVERITIES
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.reports.page.markup import count_of, draw_sign, write_name
from bnext.diagnostics.reports.page.page_data import PageData
from bnext.diagnostics.reports.report_text import DEEPER
from bnext.text import flatten_text

__all__ = ["write_verdict"]

_MOST_BARS = 150  # norms with a bar of their own
_LONG = 30  # letters of a figure that gets twice the room


def write_verdict(diagnosis: Diagnosis, data: PageData) -> str:
    """Everything that is to be seen first."""
    facts = diagnosis.facts
    numbers = {severity: sum(one.severity == severity for one in diagnosis.findings) for severity in SEVERITIES}
    worst = next((severity for severity in SEVERITIES if numbers[severity]), "healthy")
    state = "healthy" if worst == "note" else worst
    if not facts.norms:
        state, words = "note", "There is no norm in this model"
    elif state == "healthy":
        words = "These norms are in good health"
    else:
        words = {"error": "Something is wrong with these norms", "warning": "Something may be wrong"}[state]

    badges = [
        f'<a class="badge {severity}" href="#findings">{draw_sign(severity)}{count_of(number, severity)}</a>'
        for severity, number in numbers.items()
        if number
    ]
    looked = f"{len(find_checks())} checks looked at {DEEPER[diagnosis.depth][0]}"
    counts = f'<p class="counts">{"".join(badges)}</p>' if badges else ""
    figures = "".join(_write_figure(key, value) for key, value in _list_figures(facts))
    return f"""<div class="verdict {state}">
<div class="says">{draw_sign(state)}<div>
<h1>{words}</h1>
<p class="muted"><span class="path">{write_name(facts.model_name) or "a model"}</span> · {looked}</p>
</div></div>
{counts}{_draw_strip(diagnosis, data)}
<dl class="figures">{figures}</dl></div>"""


def _write_figure(key: str, value: str) -> str:
    kind = ' class="wide"' if len(value) > _LONG else ""
    return f"<div{kind}><dt>{key}</dt><dd>{escape(value)}</dd></div>"


def _list_figures(facts: Facts) -> Iterable[tuple[str, str]]:
    yield "norms", f"{len(facts.norms):,}"
    channels = sum(norm.record.num_features for norm in facts.norms)
    if channels:
        yield "channels normalized", f"{channels:,}"
    if facts.num_parameters:
        millions = f"{facts.num_parameters / 1e6:,.1f} million"
        yield "parameters of the model", millions if facts.num_parameters >= 1e6 else f"{facts.num_parameters:,}"

    if facts.training is not None and facts.training.images_per_worker:
        training = facts.training
        workers = training.num_workers or 1
        words = f"{training.images_per_worker} on {count_of(workers, 'worker')}"
        if training.accumulation > 1:
            words += f", {training.accumulation} micro-batches"
        yield "images of a training step", words

    if facts.weights is not None:
        words = flatten_text(facts.weights.source, 120) or "a random initialization"
        if facts.weights.source and not facts.weights.is_loaded:
            words += " (not read)"
        if facts.weights.iteration is not None:
            words += f", iteration {facts.weights.iteration:,}"
        yield "weights", words
    if facts.origin.config_file:
        yield "config", flatten_text(facts.origin.config_file, 120)

    batches = [forward for forward in facts.forwards if not forward.is_noise and not forward.is_alone]
    if batches:
        kinds = [forward.normalized_by for forward in batches]
        number = max(kinds.count(kind) for kind in set(kinds))  # each batch is run by both kinds of statistics
        size = max(forward.num_images for forward in batches)
        words = f"{count_of(number, 'batch', 'batches')} of {count_of(size, 'image')}"
        yield "looked at", f"{words}, and a pass over the data" if facts.population else words


def _draw_strip(diagnosis: Diagnosis, data: PageData) -> str:
    """All norms in the order of the model, as bars: the worse the finding, the higher.

    Findings that all norms have say nothing of where: they count where there are no others.
    """
    if not data.paths:
        return ""
    heights = {"error": 40, "warning": 30, "note": 20, "": 12}
    worst = {number: finding.severity for number, finding in enumerate(diagnosis.findings)}
    everywhere = set.intersection(*map(set, data.norms["findings"]))
    here = [[hit for hit in hits if hit not in everywhere] for hits in data.norms["findings"]]
    shown = here if any(here) else data.norms["findings"]
    of_norms = [worst[min(hits)] if hits else "" for hits in shown]  # findings are worst first

    bars = []
    is_single = len(of_norms) <= _MOST_BARS
    for severity, run in itertools.groupby(range(len(of_norms)), key=of_norms.__getitem__):
        places = list(run)
        kind = f' class="{severity}"' if severity else ""
        height = heights[severity]
        for first in places if is_single else places[:1]:
            name = write_name(data.paths[first]) if is_single else count_of(len(places), "norm")
            width = 0.8 if is_single else len(places)
            title = f"<title>{name}: {severity or 'nothing of its own'}</title>"
            bars.append(f'<rect{kind} x="{first}" y="{40 - height}" width="{width}" height="{height}">{title}</rect>')

    names = [
        f'<li style="flex:{last - first} 1 0" title="{write_name(name)}">{write_name(name)}</li>'
        for name, first, last in data.sections
    ]
    return f"""<figure class="strip"><figcaption>From the input to the output, norm by norm</figcaption>
<svg viewBox="0 0 {len(of_norms)} 40" preserveAspectRatio="none" role="img" aria-label="Norms with findings, in the \
order of the model">{"".join(bars)}</svg>
<ol aria-hidden="true">{"".join(names)}</ol></figure>"""

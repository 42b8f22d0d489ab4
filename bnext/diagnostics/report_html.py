"""The diagnosis as one page that needs nothing else: what is wrong on top, the norms, and charts of their numbers.

What stands in the page is written here; `page/` has its frame, its style, and the script that folds, filters and draws.
Everything from outside goes through `escape` or into JSON. A policy in the page forbids every request and every script
but that one.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import itertools
import platform
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

import bnext
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import SEVERITIES, Finding, Remedy
from bnext.diagnostics.fold_paths import fold_paths
from bnext.diagnostics.overview import Overview, find_facets
from bnext.diagnostics.page_data import PageData, gather_page_data
from bnext.diagnostics.recommend import Advice, Option
from bnext.diagnostics.registry import find_checks
from bnext.diagnostics.report_text import DEEPER, find_next, write_pairs
from bnext.text import flatten_text

__all__ = ["format_html"]

_MOST_PATTERNS = 8  # of layers on a card; the inventory has all of them

# A sign for each state beside its colour: a cross, an exclamation mark, an i, a tick.
_SIGNS = {
    "error": '<circle cx="12" cy="12" r="11"/><path d="M8 8l8 8M16 8l-8 8"/>',
    "warning": '<polygon points="12,1 23.5,22 .5,22"/><path d="M12 9v6M12 18.6v.1"/>',
    "note": '<rect x="1" y="1" width="22" height="22" rx="6"/><path d="M12 11v6M12 7v.1"/>',
    "healthy": '<circle cx="12" cy="12" r="11"/><path d="M7 12.5l3.5 3.5L17 9"/>',
}
_KINDS = {"population": "moving averages", "mini_batch": "mini-batch", "precise": "re-estimated population"}


def format_html(diagnosis: Diagnosis) -> str:
    """The whole report as a page: HTML with its style and script, which asks nothing from anywhere.

    Args:
        diagnosis: see `Diagnosis`.
    """
    data = gather_page_data(diagnosis)
    sections = {
        "Verdict": _write_verdict(diagnosis, data),
        "Findings": _write_findings(diagnosis, data),
        "Inventory": _write_inventory(diagnosis, data),
        "Along depth": _write_profile(data),
        "Averages": _write_comparison(data),
        "Distances": _write_distances(data),
        "Evaluation": _write_evaluation(diagnosis.facts),
        "Which norm": _write_advice(diagnosis.advice),
        "Not known": _write_failures(diagnosis.failures),
    }
    links = [f'<a href="#{_name(title)}">{title}</a>' for title, text in sections.items() if text][1:]

    page = {name: _read_part(f"report.{name}") for name in ("html", "css", "js")}
    return string.Template(page["html"]).substitute(
        title=escape(f"{_shorten(diagnosis.facts.model_name) or 'Model'}: bnext doctor"),
        style=page["css"].strip(),
        script=page["js"],
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(page['js'].encode()).digest()).decode()}",
        navigation="".join(links),
        sections="\n".join(text for text in sections.values() if text),
        data=data.to_json(),
        footer=_write_footer(diagnosis),
    )


def _read_part(name: str) -> str:
    return (resources.files("bnext.diagnostics") / "page" / name).read_text(encoding="utf-8")


# ---- the verdict


def _write_verdict(diagnosis: Diagnosis, data: PageData) -> str:
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
        f'<a class="badge {severity}" href="#findings">{_draw_sign(severity)}{_count(number, severity)}</a>'
        for severity, number in numbers.items()
        if number
    ]
    looked = f"{len(find_checks())} checks looked at {DEEPER[diagnosis.depth][0]}"
    counts = f'<p class="counts">{"".join(badges)}</p>' if badges else ""
    figures = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in _list_figures(facts))
    return f"""<section class="verdict {state}" id="verdict">
<div class="says">{_draw_sign(state)}<div>
<h1>{words}</h1>
<p class="muted"><span class="path">{_write_name(facts.model_name) or "a model"}</span> · {looked}</p>
</div></div>
{counts}{_draw_strip(diagnosis, data)}
<dl class="figures">{figures}</dl>
</section>"""


def _list_figures(facts: Facts) -> Iterable[tuple[str, str]]:
    yield "norms", f"{len(facts.norms):,}"
    channels = sum(norm.record.num_features for norm in facts.norms)
    if channels:
        yield "channels normalized", f"{channels:,}"
    if facts.num_parameters:
        yield "parameters of the model", f"{facts.num_parameters / 1e6:,.1f} million"
    if facts.training is not None and facts.training.images_per_worker:
        training = facts.training
        workers = training.num_workers or 1
        words = f"{training.images_per_worker} on {_count(workers, 'worker')}"
        if training.accumulation > 1:
            words += f", {training.accumulation} micro-batches"
        yield "images of a training step", words
    if facts.weights is not None:
        words = _shorten(facts.weights.source) or "a random initialization"
        if facts.weights.source and not facts.weights.is_loaded:
            words += " (not read)"
        if facts.weights.iteration is not None:
            words += f", iteration {facts.weights.iteration:,}"
        yield "weights", words
    if facts.origin.config_file:
        yield "config", _shorten(facts.origin.config_file)
    images = [forward.num_images for forward in facts.forwards if not forward.is_noise]
    if images:
        yield "looked at", f"{_count(len(images), 'forward')} of {max(images)} images"


def _draw_strip(diagnosis: Diagnosis, data: PageData) -> str:
    """All norms in the order of the model, as bars: the worse the finding, the higher."""
    if not data.paths:
        return ""
    heights = {"error": 40, "warning": 28, "note": 18, "": 8}
    worst = {number: finding.severity for number, finding in enumerate(diagnosis.findings)}
    of_norms = [worst[min(hits)] if hits else "" for hits in data.norms["findings"]]  # findings are worst first

    bars, first = [], 0
    gap = 0.2 if len(of_norms) <= 150 else 0.0
    for severity, run in itertools.groupby(of_norms):
        number = len(list(run))
        kind = f' class="{severity}"' if severity else ""
        size = f'height="{heights[severity]}" y="{40 - heights[severity]}"'
        title = f"<title>{_count(number, 'norm')}: {severity or 'nothing found'}</title>"
        places = range(first, first + number) if gap else [first]
        width = (1 if gap else number) - gap
        bars += [f'<rect{kind} x="{place}" width="{width:g}" {size}>{title}</rect>' for place in places]
        first += number

    names = [
        f'<li style="flex:{last - first} 1 0" title="{_write_name(name)}">{_write_name(name)}</li>'
        for name, first, last in data.sections
    ]
    return f"""<figure class="strip"><figcaption>From the input to the output, norm by norm</figcaption>
<svg viewBox="0 0 {len(of_norms)} 40" preserveAspectRatio="none" role="img" aria-label="Norms with findings, in the \
order of the model">{"".join(bars)}</svg>
<ol aria-hidden="true">{"".join(names)}</ol></figure>"""


# ---- findings


def _write_findings(diagnosis: Diagnosis, data: PageData) -> str:
    if not diagnosis.findings:
        if not diagnosis.facts.norms:
            return ""
        words = "No check found anything: what normalizes in training and at inference agrees, as far as was seen."
        more = find_next(diagnosis)
        paste = _write_paste("Batches of training data show more:", more) if more else ""
        return f'<section id="findings"><h2>Nothing found</h2><p class="lead">{words}</p>{paste}</section>'

    with_norms = {number for hits in data.norms["findings"] for number in hits}
    cards = [_write_card(finding, number in with_norms) for number, finding in enumerate(diagnosis.findings)]
    return f'<section id="findings"><h2>Findings, worst first</h2>{"".join(cards)}</section>'


def _write_card(finding: Finding, has_norms: bool) -> str:
    evidence, check = finding.evidence, finding.check
    parts = [f"<p>{_write_markdown(evidence.text)}</p>"]
    if check.cost:
        source = f' <span class="muted">({escape(check.source)})</span>' if check.source else ""
        parts.append(f'<p class="cost"><b>It cost</b><span>{escape(check.cost)}{source}</span></p>')
    if evidence.layers:
        parts.append(_write_layers(evidence.layers, check.code if has_norms else ""))
    parts.append(
        f'<details class="why"><summary>Why this is a fault</summary><p>{_write_markdown(check.explanation)}</p></details>'
    )
    parts.append(_write_remedy(evidence.remedy))

    return f"""<article class="card {finding.severity}">
<header><span class="badge {finding.severity}">{_draw_sign(finding.severity)}{finding.severity}</span>
<h3>{_write_markdown(check.title)}</h3><span class="code">{escape(check.code)} {escape(check.name)}</span></header>
{"".join(parts)}
</article>"""


def _write_layers(layers: Sequence[str], code: str) -> str:
    patterns = list(fold_paths(layers))
    words = [f"<code>{_write_name(pattern) or 'the model'}</code>" for pattern in patterns[:_MOST_PATTERNS]]
    if len(patterns) > _MOST_PATTERNS:
        words.append(f"<span>and {len(patterns) - _MOST_PATTERNS} more patterns</span>")
    if code:
        button = f'<button type="button" class="show" data-code="{escape(code)}" hidden>Show in the inventory</button>'
        words.append(button)
    return f'<p class="layers"><span class="muted">{_count(len(layers), "layer")}:</span> {" ".join(words)}</p>'


def _write_remedy(remedy: Remedy) -> str:
    blocks = {"Config keys": "\n".join(write_pairs(remedy.keys)), "Command line": remedy.command, "Python": remedy.call}
    figures = "".join(_write_paste(title, text) for title, text in blocks.items())
    return f'<div class="remedy"><p>{_write_markdown(remedy.text)}</p>{figures}</div>'


def _write_paste(title: str, text: str) -> str:
    if not text:
        return ""
    return f'<figure class="paste"><figcaption>{title}</figcaption><pre>{escape(text)}</pre></figure>'


# ---- inventory


def _write_inventory(diagnosis: Diagnosis, data: PageData) -> str:
    if not data.paths:
        return ""
    options = {"all": "all norms", "findings": "with findings", "frozen": "frozen", "trained": "not frozen"}
    choices = "".join(f'<option value="{key}">{words}</option>' for key, words in options.items())
    groups = "".join(_write_group(group, number, diagnosis, data) for number, group in enumerate(data.groups))
    return f"""<section id="inventory"><h2>Inventory</h2>
<p class="lead">Norms that give the same answers to <em>which batch?</em> are one line. Open it for each of them.</p>
<div class="tools"><input type="search" id="query" placeholder="path, kind, place or code" aria-label="Search norms">
<select id="only" aria-label="Norms that are shown">{choices}</select>
<button type="button" id="unfold">Fold all / none</button>
<output id="shown" class="muted" aria-live="polite"></output></div>
<div class="groups">{groups}</div></section>"""


def _write_group(group: Overview, number: int, diagnosis: Diagnosis, data: PageData) -> str:
    facets = find_facets(group)
    members = [place for place, of in enumerate(data.norms["group"]) if of == number]
    hits = sorted({hit for place in members for hit in data.norms["findings"][place]})  # worst first
    codes: dict[str, str] = {}
    for hit in hits:
        codes.setdefault(diagnosis.findings[hit].code, diagnosis.findings[hit].severity)

    name = ", ".join(group.patterns[:_MOST_PATTERNS])
    if len(group.patterns) > _MOST_PATTERNS:
        name += f" and {len(group.patterns) - _MOST_PATTERNS} more"
    chips = [f'<span class="chip"><b>{escape(group.norms[0].record.kind)}</b></span>']
    chips += [_write_chip(question, answer) for question, answer in facets.items()]
    chips += [f'<span class="chip hit {severity}">{escape(code)}</span>' for code, severity in codes.items()]

    headers = ["norm", "channels", "samples together", "elements per channel", "calls", "updates"]
    head = "".join(f'<th scope="col">{header}</th>' for header in headers) + '<th scope="col" class="words"></th>'
    return f"""<details class="group"><summary><span class="path">{_write_name(name) or "the model"}</span>
<span class="number">{_count(len(members), "norm")}</span><span class="chips">{"".join(chips)}</span></summary>
<div class="inside"><div class="scroll" tabindex="0" role="region" aria-label="Norms of this line"><table><thead><tr>\
{head}</tr></thead><tbody></tbody></table></div></div></details>"""


def _write_chip(name: str, value: str) -> str:
    return f'<span class="chip">{name} <b>{_write_name(value)}</b></span>'


# ---- charts


def _write_profile(data: PageData) -> str:
    charts = {
        "mean": ("Running mean", "of each channel, over the population that normalizes at inference"),
        "std": ("Running standard deviation", "channels near 0 are dead, or about to divide by eps"),
        "weight": ("Weight of the affine (gamma)", "channels near 0 are switched off"),
    }
    shown = {key: words for key, words in charts.items() if any(data.profile.get(key, ()))}
    if not shown:
        return ""
    lead = "From the input at the left to the output; of norms with levels or domains each one by itself."
    return _write_charts("Along depth", "Statistics along depth", lead, shown)


def _write_comparison(data: PageData) -> str:
    if not data.comparison:
        return ""
    if data.num_images is None:
        lead = "The running statistics against those of a pass over training images."
    else:
        lead = (
            f"The running statistics against those of {_count(data.num_images, 'image')} that were run. "
            "Few images are noisy: a distance that all layers have alike may be theirs."
        )
    charts = {
        "distance": ("Distance of the means", "in running standard deviations; 0 is right"),
        "ratio": ("Ratio of the standard deviations", "those of the images over the running ones; 1 is right"),
    }
    return _write_charts("Averages", "Moving average against population", lead, charts)


def _write_charts(name: str, title: str, lead: str, charts: Mapping[str, tuple[str, str]]) -> str:
    figures = [
        f'<figure class="chart" id="chart-{key}"><figcaption>{words}<small>{small}</small></figcaption></figure>'
        for key, (words, small) in charts.items()
    ]
    legend = (
        '<p class="legend"><span class="all">all channels</span><span class="most">80 % of them</span>'
        '<span class="middle">median</span></p>'
    )
    return f"""<section id="{_name(name)}"><h2>{title}</h2><p class="lead">{lead}</p>{_NO_SCRIPT}
{legend}{"".join(figures)}</section>"""


_NO_SCRIPT = "<noscript><p>Charts need JavaScript, which is switched off here.</p></noscript>"


def _write_distances(data: PageData) -> str:
    words = {
        "domains": ("Between domains", "statistics of a layer on the images of each domain"),
        "levels": ("Between the features of a forward", "levels, or calls, that reach the same norm"),
        "stored": ("Between stored statistics", "the populations that a norm keeps"),
    }
    figures = [
        f"""<figure class="chart" id="distances-{kind}"><figcaption>{words[kind][0]}<small>{words[kind][1]}</small>
</figcaption><div class="overview"></div>
<div class="pick"><label for="layer-{kind}">Layer</label><input type="range" id="layer-{kind}" min="0" value="0">
<select aria-label="Measure"><option value="means">distance of means</option>\
<option value="ratios">ratio of standard deviations</option></select></div>
<p class="layer path"></p><div class="matrix"></div><output class="readout" aria-live="polite"></output></figure>"""
        for kind in (one["kind"] for one in data.distances)
    ]
    if not figures:
        return ""
    lead = "How many standard deviations apart two sources are: far apart, one set of statistics fits neither."
    return f"""<section id="distances"><h2>Distances between domains and levels</h2><p class="lead">{lead}</p>{_NO_SCRIPT}
{"".join(figures)}</section>"""


# ---- the rest


def _write_evaluation(facts: Facts) -> str:
    evaluation = facts.evaluation
    if evaluation is None or not (evaluation.losses or evaluation.ap):
        return ""
    kinds = dict.fromkeys((*evaluation.ap, *evaluation.losses))
    rows = []
    for kind in kinds:
        ap, loss = evaluation.ap.get(kind), evaluation.losses.get(kind)
        cells = ["–" if ap is None else f"{ap:.1f}", "–" if loss is None else f"{loss:.4g}"]
        name = escape(_KINDS.get(kind, kind))
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')

    on = f" on {_write_name(evaluation.dataset)}" if evaluation.dataset else ""
    return f"""<section id="evaluation"><h2>Evaluation</h2>
<p class="lead">The same weights and images{on}; only what normalizes differs.</p>
<div class="scroll chart"><table><thead><tr><th scope="col">normalized by</th><th scope="col">box AP</th>\
<th scope="col">loss</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>"""


def _write_advice(every: Sequence[Advice]) -> str:
    if not every:
        return ""
    figures = "".join(_write_place(advice) for advice in every)
    return f"""<section id="which-norm"><h2>Which norm</h2>
<p class="lead">What the literature measured for such batches, best first; on its models and data, not on yours.</p>
{figures}</section>"""


def _write_place(advice: Advice) -> str:
    options = "".join(_write_option(option) for option in advice.options)
    place = f"{_write_name(advice.place)}: " if advice.place else ""
    return f'<article class="advice"><h3>{place}{_write_name(advice.situation)}</h3><ol>{options}</ol></article>'


def _write_option(option: Option) -> str:
    chosen = ' <span class="badge healthy">chosen</span>' if option.is_chosen else ""
    figure = f": {escape(option.figure)}" if option.figure else ""
    limit = f'<br><span class="muted">{escape(option.limit)}</span>' if option.limit else ""
    keys = _write_paste("Config keys", "\n".join(write_pairs(option.keys)))
    return f"""<li><b>{escape(option.norm)}</b>{figure}{chosen} <span class="muted">({escape(option.source)})</span>{limit}\
{"" if option.is_chosen else keys}</li>"""


def _write_failures(failures: Sequence[str]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li>{_write_name(failure)}</li>" for failure in failures)
    return f'<section id="not-known"><h2>What could not be found out</h2><ul class="plain">{items}</ul></section>'


def _write_footer(diagnosis: Diagnosis) -> str:
    versions = [f"bnext {bnext.__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "detectron2"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return escape(f"Depth {diagnosis.depth}: {DEEPER[diagnosis.depth][0]}. {', '.join(versions)}. {now}.")


# ---- text


def _draw_sign(severity: str) -> str:
    return f'<svg class="sign {severity}" viewBox="0 0 24 24" aria-hidden="true">{_SIGNS[severity]}</svg>'


def _write_name(text: str) -> str:
    """A name from outside as markup: on one line, nothing in it is taken for a tag."""
    return escape(flatten_text(text))


def _write_markdown(text: str) -> str:
    """Text with `code` and **stress**."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def _write_range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _shorten(text: str) -> str:
    return flatten_text(text, most=120)


def _name(title: str) -> str:
    return title.lower().replace(" ", "-")

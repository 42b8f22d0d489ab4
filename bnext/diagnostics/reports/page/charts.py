"""Frames of the charts, where there is something to draw; the script draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.reports.page.markup import count_of, write_name
from bnext.diagnostics.reports.page.page_data import PageData

__all__ = ["write_comparison", "write_distances", "write_evaluation", "write_profile"]

_KINDS = {"population": "moving averages", "mini_batch": "mini-batch", "precise": "re-estimated population"}
_FEW = 40  # columns of a chart that have room beside another chart


def write_profile(data: PageData) -> str:
    """Running statistics and weights, from the input to the output."""
    charts = {
        "mean": ("Running mean", "of each channel, over the population that normalizes at inference"),
        "std": ("Running standard deviation", "channels near 0 are dead, or about to divide by eps"),
        "weight": ("Weight of the affine (gamma)", "channels near 0 are switched off"),
    }
    bands = {key: [band for band in data.profile.get(key, ()) if band is not None] for key in charts}
    flat = {key: of_key[0][0] for key, of_key in bands.items() if of_key and _is_flat(of_key)}
    shown = {key: words for key, words in charts.items() if bands[key] and key not in flat}
    if not shown and not flat:
        return ""

    lead = "From the input at the left to the output; of norms with levels or domains each one by itself."
    if flat:
        same = ", ".join(f"{charts[key][0].lower()} {value:g}" for key, value in flat.items())
        lead = f"{lead if shown else ''} All channels of all norms have: {same}.".strip()
    return _write_charts("Statistics along depth", lead, shown, len(data.profile["norm"]))


def _is_flat(bands: Sequence[Sequence[float]]) -> bool:
    """Whether all channels of all norms have one value."""
    return min(band[0] for band in bands) == max(band[-1] for band in bands)


def write_comparison(facts: Facts, data: PageData) -> str:
    """Running statistics against a population."""
    if not data.comparison:
        return ""
    if data.num_images is None:
        lead = "The running statistics against those of a pass over training images."
    else:
        lead = (
            f"The running statistics against those of {count_of(data.num_images, 'image')} that were run. "
            "Few images are noisy: a distance that all layers have alike may be theirs."
        )
    if not facts.is_trained:
        lead += " Nobody has trained these norms: their statistics are those of no images yet."

    charts = {
        "distance": ("Distance of the means", "in running standard deviations; 0 is right"),
        "ratio": ("Ratio of the standard deviations", "those of the images over the running ones; 1 is right"),
    }
    return _write_charts("Moving average against population", lead, charts, len(data.comparison["norm"]))


def _write_charts(title: str, lead: str, charts: Mapping[str, tuple[str, str]], num_columns: int) -> str:
    figures = [
        f'<figure class="chart" id="chart-{key}"><figcaption>{words}<small>{small}</small></figcaption></figure>'
        for key, (words, small) in charts.items()
    ]
    few = " few" if num_columns <= _FEW else ""
    drawn = f'{_NO_SCRIPT}{_LEGEND}<div class="charts{few}">{"".join(figures)}</div>' if figures else ""
    return f'<h2>{title}</h2><p class="lead">{lead}</p>{drawn}'


_LEGEND = (
    '<p class="legend"><span class="all">all channels</span><span class="most">80 % of them</span>'
    '<span class="middle">median</span></p>'
)
_NO_SCRIPT = "<noscript><p>Charts need JavaScript, which is switched off here.</p></noscript>"


def write_distances(data: PageData) -> str:
    """Matrices between domains, levels and stored statistics."""
    words = {
        "domains": ("Between domains", "statistics of a layer on the images of each domain"),
        "levels": ("Between the features of a forward", "levels, or calls, that reach the same norm"),
        "stored": ("Between stored statistics", "the populations that a norm keeps"),
    }
    figures = [
        f"""<figure class="chart" id="distances-{kind}"><figcaption>{words[kind][0]}<small>{words[kind][1]}</small>
</figcaption>
<div class="pick"><label for="layer-{kind}">Layer</label><input type="range" id="layer-{kind}" min="0" value="0">
<select aria-label="Measure"><option value="means">distance of means</option>\
<option value="ratios">ratio of standard deviations</option></select></div>
<div class="pair"><div class="overview"></div><div><p class="layer path"></p><div class="matrix"></div>\
<output class="readout" aria-live="polite"></output></div></div></figure>"""
        for kind in (one["kind"] for one in data.distances)
    ]
    if not figures:
        return ""

    lead = "How many standard deviations apart two sources are: far apart, one set of statistics fits neither."
    title = "Distances between domains and levels"
    return f'<h2>{title}</h2><p class="lead">{lead}</p>{_NO_SCRIPT}{"".join(figures)}'


def write_evaluation(facts: Facts) -> str:
    """AP and loss by what normalizes, in a table."""
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

    on = f" on {write_name(evaluation.dataset)}" if evaluation.dataset else ""
    return f"""<h2>Evaluation</h2>
<p class="lead">The same weights and images{on}; only what normalizes differs.</p>
<div class="scroll chart"><table><thead><tr><th scope="col">normalized by</th><th scope="col">AP or score</th>\
<th scope="col">loss</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""

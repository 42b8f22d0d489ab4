"""The diagnosis as one page that needs nothing else: what is wrong on top, the norms, and charts of their numbers.

Its parts are written in `page/`, where its frame, its style and its script are, too. Everything from outside is escaped
or is in JSON; a policy in the page forbids every request, and every script but its own.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.metadata
import platform
import string
from collections.abc import Sequence
from html import escape
from importlib import resources

import bnext
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.reports.page.cards import write_advice, write_findings
from bnext.diagnostics.reports.page.charts import write_comparison, write_distances, write_evaluation, write_profile
from bnext.diagnostics.reports.page.markup import write_name
from bnext.diagnostics.reports.page.norm_list import write_inventory
from bnext.diagnostics.reports.page.page_data import gather_page_data
from bnext.diagnostics.reports.page.verdict import write_verdict
from bnext.diagnostics.reports.report_text import DEEPER
from bnext.text import flatten_text

__all__ = ["format_html"]


def format_html(diagnosis: Diagnosis) -> str:
    """The whole report as a page: HTML with its style and script, which asks nothing from anywhere.

    Args:
        diagnosis: see `Diagnosis`.
    """
    data = gather_page_data(diagnosis)
    # Id of a section -> its name in the line at the top, and its HTML; empty: its facts are not there.
    sections = {
        "verdict": ("", write_verdict(diagnosis, data)),
        "findings": ("Findings", write_findings(diagnosis, data)),
        "inventory": ("Inventory", write_inventory(diagnosis, data)),
        "depth": ("Along depth", write_profile(data)),
        "averages": ("Averages", write_comparison(diagnosis.facts, data)),
        "distances": ("Distances", write_distances(data)),
        "evaluation": ("Evaluation", write_evaluation(diagnosis.facts)),
        "advice": ("Which norm", write_advice(diagnosis.advice)),
        "failures": ("Not known", _write_failures(diagnosis.failures)),
    }
    links = [f'<a href="#{key}">{name}</a>' for key, (name, text) in sections.items() if name and text]
    body = [f'<section id="{key}">{text}</section>' for key, (_, text) in sections.items() if text]

    page = {name: _read_part(f"report.{name}") for name in ("html", "css", "js")}
    return string.Template(page["html"]).substitute(
        title=escape(f"{flatten_text(diagnosis.facts.model_name, 120) or 'Model'}: bnext doctor"),
        style=page["css"].strip(),
        script=page["js"],
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(page['js'].encode()).digest()).decode()}",
        navigation="".join(links),
        sections="\n".join(body),
        data=data.to_json(),
        footer=_write_footer(diagnosis),
    )


def _read_part(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _write_failures(failures: Sequence[str]) -> str:
    if not failures:
        return ""
    items = "".join(f"<li>{write_name(failure)}</li>" for failure in failures)
    return f'<h2>What could not be found out</h2><ul class="plain">{items}</ul>'


def _write_footer(diagnosis: Diagnosis) -> str:
    versions = [f"bnext {bnext.__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "detectron2"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return escape(f"Depth {diagnosis.depth}: {DEEPER[diagnosis.depth][0]}. {', '.join(versions)}. {now}.")

"""Table and picture of AP by domain; the numbers are from `bnext.evaluation.domains`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnext.evaluation.domains import DomainResult, find_worst, summarize
from bnext.figures import COLORS, GREY, make_figure, save_figure, style_axes, to_points
from bnext.tables import format_rows
from bnext.text import escape_math, flatten_text

__all__ = ["draw_domains", "format_domains"]

_NUM_METRICS = 3  # of a task in the table: AP, AP50, AP75
_TASKS = {"bbox": "boxes", "segm": "masks"}
_TEXT = 13  # pixels


def format_domains(domains: Sequence[DomainResult]) -> str:
    """A row for each domain, then their mean and the worst.

    Args:
        domains: one or more, with metrics of the same tasks.
    """
    columns = _choose_columns(domains)
    is_one_task = len({task for task, _ in columns}) == 1
    headers = ["domain", "sets", "images", *(name if is_one_task else f"{task} {name}" for task, name in columns)]
    task = columns[0][0] if columns else ""
    has_specialists = any(domain.specialist for domain in domains)
    if has_specialists:
        headers += ["specialist", "gap"]

    rows = []
    for domain in domains:
        row = [domain.name, ", ".join(domain.sets), f"{sum(domain.sets.values()):,}"]
        row += [_show(domain.metrics, *column) for column in columns]
        if has_specialists:
            row += [_show(domain.specialist, task, "AP"), _show_number(domain.find_gap(task), "{:+.1f}")]
        rows.append(row)

    summary, worst = summarize(domains), find_worst(domains, task)
    for name in ("mean", "worst") if summary else ():
        row = [name, "", "", *(_show(summary[name], *column) for column in columns)]
        rows.append(row + [""] * (len(headers) - len(row)))

    head = [f"{task} AP by domain"]
    if summary and worst is not None:
        mean, least = _show(summary["mean"], task, "AP"), _show(worst.metrics, task, "AP")
        head[0] += f": mean {mean}, worst {worst.name!r} {least}"
    if any(len(domain.sets) > 1 for domain in domains):
        head.append("A domain with several sets has the mean over them")
    if has_specialists:
        head.append("Gap: AP of the domain's own specialist minus this one")
    return f"{'. '.join(head)}.\n{format_rows(rows, headers, num_texts=2)}"


def _choose_columns(domains: Sequence[DomainResult]) -> list[tuple[str, str]]:
    """Task and name of the metrics to show."""
    columns: dict[tuple[str, str], None] = {}
    for domain in domains:
        for task, metrics in domain.metrics.items():
            columns.update(dict.fromkeys((task, name) for name in list(metrics)[:_NUM_METRICS]))
    return sorted(columns, key=lambda column: column[0])


def _show(metrics: Mapping[str, Mapping[str, float]], task: str, name: str) -> str:
    return _show_number(metrics.get(task, {}).get(name, math.nan))


def _show_number(value: float, form: str = "{:.1f}") -> str:
    return form.format(value) if math.isfinite(value) else "-"


def draw_domains(domains: Sequence[DomainResult], path: str | os.PathLike[str], *, note: str = "") -> Path:
    """A bar of AP for each domain, the worst in another colour, their mean and each one's specialist as lines.

    Args:
        domains: one or more.
        path: of the PNG; written whole.
        note: below the bars.
    """
    tasks = _list_tasks(domains)
    figure = make_figure(700 if len(tasks) < 2 else 1000, 150 + 44 * len(domains))
    panels = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]

    for index, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        _draw_task(axes, domains, task)
        axes.set_title(f"COCO AP of {_TASKS.get(task, task)} by domain")
        style_axes(axes, pixels=_TEXT)
        if index:
            axes.set_yticklabels([])

    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, words in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[words] = handle
    options: dict[str, Any] = {"ncols": max(1, len(handles)), "fontsize": to_points(_TEXT), "frameon": False}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", **options)
    if note:
        figure.supxlabel(note, fontsize=to_points(_TEXT), color=GREY, parse_math=False)
    return save_figure(figure, path)


def _list_tasks(domains: Sequence[DomainResult]) -> list[str]:
    """The tasks for which a domain has AP."""
    tasks: dict[str, None] = {}
    for domain in domains:
        tasks |= dict.fromkeys(task for task, names in domain.metrics.items() if "AP" in names)
    return list(tasks)


def _draw_task(axes: Any, domains: Sequence[DomainResult], task: str) -> None:
    worst = find_worst(domains, task) if len(domains) > 1 else None
    farthest = 0.0

    for place, domain in enumerate(domains):
        ap, of_specialist = (of.get(task, {}).get("AP", math.nan) for of in (domain.metrics, domain.specialist))
        color, kind = (COLORS["vermillion"], "worst domain") if domain is worst else (COLORS["blue"], "domain")
        axes.barh(place, 0.0 if math.isnan(ap) else ap, 0.7, color=color, label=kind)
        label = _show_number(ap)

        if math.isfinite(of_specialist):
            line = {"color": COLORS["black"], "linewidth": to_points(4), "solid_capstyle": "butt"}
            axes.plot([of_specialist] * 2, [place - 0.42, place + 0.42], label="its specialist", **line)
            label += f" (gap {_show_number(domain.find_gap(task), '{:+.1f}')})"

        end = max(value for value in (0.0, ap, of_specialist) if not math.isnan(value))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        words = {"va": "center", "fontsize": to_points(_TEXT), "bbox": box}
        axes.annotate(label, (end, place), (8, 0), textcoords="offset pixels", **words)
        farthest = max(farthest, end)

    if worst is not None:
        mean = summarize(domains)["mean"][task]["AP"]
        axes.axvline(mean, color=GREY, linestyle=(0, (4, 3)), linewidth=to_points(2), label="mean", zorder=0)
        axes.set_xlabel(f"mean {mean:.1f}")
    axes.set_yticks(range(len(domains)), [escape_math(flatten_text(domain.name, most=30)) for domain in domains])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * farthest or 1)

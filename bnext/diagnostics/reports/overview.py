"""The doctor's inventory: norms in the groups in which a person reads them, and all that is known of each group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.fold_paths import fold_paths
from bnext.diagnostics.inventory import format_affine, format_mini_batch, format_population, format_range
from bnext.diagnostics.measures.batch_sizes import count_elements, count_together

__all__ = ["Overview", "describe_overview", "find_facets", "summarize_norms"]

Span = tuple[int, int]  # the least and the most


@dataclasses.dataclass(frozen=True, eq=False)
class Overview:
    """Norms that give the same answers, in the same mode, called equally often.

    Args:
        norms: in the order of the model.
        num_calls: of each in one forward; None: nothing was run, and nothing else says it.
        together: samples that are normalized together, over all workers that share; None: not known, or there is no
            mini-batch.
        elements: per channel of a mini-batch, likewise.
        num_updates: mini-batches that running statistics have taken in; None: nobody counts.
    """

    norms: tuple[NormFacts, ...]
    num_calls: int | None
    together: Span | None
    elements: Span | None
    num_updates: Span | None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all norms."""
        return tuple(norm.path for norm in self.norms)

    @property
    def patterns(self) -> tuple[str, ...]:
        """A few patterns that stand for exactly these paths."""
        return tuple(fold_paths(self.paths))


def summarize_norms(facts: Facts) -> list[Overview]:
    """The norms of a model in groups, in the order of the first of each.

    Args:
        facts: see `Facts`.
    """
    groups: dict[Any, list[NormFacts]] = {}
    for norm in facts.norms:
        answers = dataclasses.replace(norm.record, path="", num_features=0, num_parameters=0)
        key = answers, norm.type_name, norm.is_training, norm.reason, norm.sees_rois, _count_calls(facts, norm)
        groups.setdefault(key, []).append(norm)

    return [_summarize(facts, tuple(norms)) for norms in groups.values()]


def _summarize(facts: Facts, norms: tuple[NormFacts, ...]) -> Overview:
    updates = [population.num_updates for norm in norms for population in norm.populations]
    elements = [count_elements(facts, norm) for norm in norms]
    return Overview(
        norms,
        num_calls=_count_calls(facts, norms[0]),
        together=_find_span(count_together(facts, norm) for norm in norms),
        elements=_find_span(number for span in elements if span for number in span),
        num_updates=_find_span(updates),
    )


def _find_span(numbers: Iterable[int | None]) -> Span | None:
    known = [number for number in numbers if number is not None]
    return (min(known), max(known)) if known else None


def _count_calls(facts: Facts, norm: NormFacts) -> int | None:
    """Calls of a norm in one forward, the most that were seen; features that came in one call are one."""
    if not facts.forwards:
        return len(norm.levels) or None
    calls = [forward.calls.get(norm.path, ()) for forward in facts.forwards]
    return max(sum(not call.is_joint for call in of_one) for of_one in calls)


def find_facets(group: Overview) -> dict[str, str]:
    """Question -> answer of a group in words; questions that nobody can answer, or that make no sense, are absent.

    Args:
        group: see `Overview`.
    """
    record, norm = group.norms[0].record, group.norms[0]
    facets = {"in training": _format_training(norm), "together": _format_together(group)}
    facets |= {"at inference": format_population(record), "affine": format_affine(record)}
    facets["calls per forward"] = "" if group.num_calls is None else str(group.num_calls)
    facets["channels"] = format_range([one.record.num_features for one in group.norms])

    if not norm.type_name:  # of a checkpoint alone, which says no more
        del facets["in training"]
        return {question: answer for question, answer in facets.items() if answer}

    facets["eps"] = f"{record.eps:g}"
    if norm.is_by_mini_batch and record.population != "none":
        facets["momentum"] = "cumulative" if record.momentum is None else f"{record.momentum:g}"
        facets["updates"] = "not counted" if group.num_updates is None else format_range(group.num_updates)
    return {question: answer for question, answer in facets.items() if answer}


def _format_training(norm: NormFacts) -> str:
    """By whose statistics a norm normalizes in training, and why so, where it is not by a mini-batch."""
    record, shared = norm.record, format_mini_batch(norm.record)
    words = {"all samples": "all samples of a worker", "frozen": "frozen statistics"}.get(shared, shared)
    return f"{words} ({norm.reason})" if norm.reason and norm.reason != f"frozen: {record.kind}" else words


def _format_together(group: Overview) -> str:
    if group.together is None:
        return ""
    samples = "RoIs" if group.norms[0].sees_rois else "samples"
    if max(group.together) == 1:
        samples = samples.removesuffix("s")
    words = f"{format_range(group.together)} {samples}"
    return words if group.elements is None else f"{words}, {format_range(group.elements)} elements per channel"


def describe_overview(group: Overview) -> Mapping[str, Any]:
    """A group as dictionaries, lists, strings and numbers; see `doctor.schema.json`."""
    record, norm = group.norms[0].record, group.norms[0]
    channels = [one.record.num_features for one in group.norms]

    return {
        "patterns": list(group.patterns),
        "layers": list(group.paths),
        "kind": record.kind,
        "type": norm.type_name,
        "mode": "training" if norm.is_training else "evaluation",
        "reason": norm.reason,
        "place": norm.place,
        "statistics": record.statistics,
        "training": record.training,
        "inference": record.inference,
        "population": record.population,
        "affine": record.affine,
        "frozen": record.frozen,
        "domains": list(record.domains),
        "workers": record.workers,
        "group_size": record.group_size,
        "sees_rois": norm.sees_rois,
        "together": group.together,
        "elements": group.elements,
        "calls": group.num_calls,
        "channels": [min(channels), max(channels)],
        "eps": record.eps,
        "momentum": record.momentum,
        "num_updates": group.num_updates,
        "num_parameters": sum(one.record.num_parameters for one in group.norms),
    }

"""AP by domain: test sets, or the images of one, gathered by the domain that they are of.

    sets evaluated  --split_by_domain-->  shares  --gather_domains-->  domains  --summarize-->  mean and worst

A picture of it is in `bnext.evaluation.domain_report`, with its table.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from bnext.config.domains import count_set_domains
from bnext.data.records import Record
from bnext.errors import ConfigError, Refusal, list_few
from bnext.evaluation.coco_evaluator import COCOEvaluator
from bnext.notices import tell_once

__all__ = [
    "DOMAINS",
    "DomainResult",
    "Share",
    "describe_domains",
    "find_parts",
    "find_worst",
    "gather_domains",
    "list_test_domains",
    "read_specialists",
    "split_by_domain",
    "summarize",
]

DOMAINS = "domains"  # where results have what is of them
Metrics = Mapping[str, Mapping[str, float]]  # task -> name -> 0 to 100; NaN: there is none

_CATEGORY = "AP-"  # how detectron2 begins the name of a category's AP
NOT_APART = (
    "Data set '%s' has images of %d domains, but its evaluator gives no metrics of a part of them: it is in no domain."
)
WITHOUT = "%d image(s) of data set '%s' have no domain: they are in no domain's metrics."
NO_RESULTS = Refusal(
    ConfigError,
    "The file of a specialist",
    "be the results of an evaluation",
    "Give what `bnext train` and `bnext evaluate` write: OUTPUT_DIR/inference/results.json.",
)
NO_DOMAIN = Refusal(
    ConfigError,
    "A specialist",
    "be of a domain of the test sets, {names}",
    "Correct the name, or DATASETS.DOMAINS.TEST.",
)
NO_SETS = Refusal(
    ConfigError,
    "The results of the specialist of {name!r}",
    "be of the test sets that have this domain: {sets}",
    "Evaluate it on them, with their domains in DATASETS.DOMAINS.TEST.",
)


@dataclass(frozen=True)
class Share:
    """The images of one domain in one set.

    Args:
        domain: its name.
        dataset: name of the set.
        num_images: of the domain in it.
        metrics: task -> name -> number, without those of categories.
    """

    domain: str
    dataset: str
    num_images: int
    metrics: Metrics


@dataclass(frozen=True)
class DomainResult:
    """The metrics of one domain.

    Args:
        name: of the domain.
        sets: name -> images of the domain in it.
        metrics: task -> name -> the mean over the sets, each of which counts the same.
        specialist: the same of the detector that was trained on this domain alone; empty: not given.
    """

    name: str
    sets: Mapping[str, int]
    metrics: Metrics
    specialist: Metrics = field(default_factory=dict)

    def find_gap(self, task: str) -> float:
        """AP of the specialist minus AP; NaN: there is none."""
        return self.specialist.get(task, {}).get("AP", math.nan) - self.metrics.get(task, {}).get("AP", math.nan)


def find_parts(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Domain -> ids of its images, in a set with several; "": of those without one. {}: there is one at most."""
    parts: dict[str, list[Any]] = {}
    for record in records:
        parts.setdefault(record.get("domain", ""), []).append(record.get("image_id"))
    return parts if len(parts) > 1 else {}


def split_by_domain(
    name: str, records: Sequence[Record], results: Mapping[str, Any], evaluator: DatasetEvaluator
) -> list[Share]:
    """The shares of the domains in a set that was evaluated; images without a domain are in none.

    Args:
        name: of the set.
        records: its images.
        results: task -> name -> number, of all of them.
        evaluator: whose `parts` were those of `find_parts`.
    """
    parts = find_parts(records)
    if not results:  # on other workers than the first
        return []
    if not parts:
        domain = records[0].get("domain", "")
        metrics = _take_totals(results, evaluator, [record.get("image_id") for record in records])
        return [Share(domain, name, len(records), metrics)] if domain else []

    if not isinstance(evaluator, COCOEvaluator):
        tell_once(logging.getLogger(__name__), name, NOT_APART, name, len(parts))
        return []
    if "" in parts:
        tell_once(logging.getLogger(__name__), name, WITHOUT, len(parts[""]), name)

    shares = []
    for domain, ids in parts.items():
        metrics = _take_totals(evaluator.results_of_parts.get(domain, {}), evaluator, ids)
        if domain:
            shares.append(Share(domain, name, len(ids), metrics))
    return shares


def _take_totals(results: Mapping[str, Any], evaluator: DatasetEvaluator, image_ids: Sequence[Any]) -> Metrics:
    """The metrics that are of no category. Where objects are and nothing was detected, each is 0 and not NaN."""
    has_objects = isinstance(evaluator, COCOEvaluator) and evaluator.has_objects(image_ids)
    return {task: _fill(metrics, has_objects) for task, metrics in results.items() if isinstance(metrics, Mapping)}


def _fill(metrics: Mapping[str, Any], has_objects: bool) -> dict[str, float]:
    totals = {name: math.nan if value is None else float(value) for name, value in metrics.items()}
    totals = {name: value for name, value in totals.items() if not name.startswith(_CATEGORY)}
    is_empty = has_objects and all(map(math.isnan, totals.values()))
    return dict.fromkeys(totals, 0.0) if is_empty else totals


def gather_domains(shares: Iterable[Share], specialists: Mapping[str, Metrics] | None = None) -> list[DomainResult]:
    """The metrics of each domain, in their order; of one with several sets the mean over these.

    Args:
        shares: of all sets.
        specialists: domain -> metrics of its own detector, see `read_specialists`.

    Example:
        >>> shares = [Share("day", "a", 10, {"bbox": {"AP": 20.0}}), Share("day", "b", 90, {"bbox": {"AP": 30.0}})]
        >>> gather_domains(shares)[0].metrics
        {'bbox': {'AP': 25.0}}
    """
    by_domain: dict[str, list[Share]] = {}
    for share in shares:
        by_domain.setdefault(share.domain, []).append(share)

    results = []
    for name, of_domain in by_domain.items():
        sets = {share.dataset: share.num_images for share in of_domain}
        metrics = _join([share.metrics for share in of_domain], _average)
        results.append(DomainResult(name, sets, metrics, (specialists or {}).get(name, {})))
    return results


def summarize(domains: Sequence[DomainResult]) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics of each domain by its name, and their "mean" and "worst", the least of each metric; {}: of one alone.

    What a domain has no number for, as APl without large objects, it has no part in.
    """
    if len(domains) < 2:
        return {}

    each = {domain.name: {task: dict(metrics) for task, metrics in domain.metrics.items()} for domain in domains}
    every = list(each.values())
    return {**each, "mean": _join(every, _average), "worst": _join(every, min)}


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _join(several: Sequence[Metrics], combine: Any) -> dict[str, dict[str, float]]:
    """One number of several for each metric, of those that are numbers."""
    joined: dict[str, dict[str, float]] = {}
    for metrics in several:
        for task, names in metrics.items():
            joined.setdefault(task, {}).update(dict.fromkeys(names, math.nan))

    for task, names in joined.items():
        for name in names:
            values = [metrics.get(task, {}).get(name, math.nan) for metrics in several]
            known = [value for value in values if math.isfinite(value)]
            names[name] = float(combine(known)) if known else math.nan
    return joined


def find_worst(domains: Sequence[DomainResult], task: str) -> DomainResult | None:
    """The domain with the least AP; None: none has one."""
    known = [domain for domain in domains if math.isfinite(domain.metrics.get(task, {}).get("AP", math.nan))]
    return min(known, key=lambda domain: domain.metrics[task]["AP"], default=None)


def describe_domains(domains: Sequence[DomainResult]) -> dict[str, Any]:
    """The results of `summarize`, with the sets of each domain and its specialist, for results.json."""
    described: dict[str, Any] = dict(summarize(domains))
    for domain in domains:
        entry: dict[str, Any] = {"sets": dict(domain.sets), **domain.metrics}
        if domain.specialist:
            entry["specialist"] = domain.specialist
            entry["gap"] = {task: domain.find_gap(task) for task in domain.metrics}
        described[domain.name] = entry
    return described


# ---- before an evaluation


def list_test_domains(cfg: CfgNode) -> list[str]:
    """The domains of the images of DATASETS.TEST, in their order.

    Raises:
        DatasetError: see `load_records`.
    """
    domains: dict[str, None] = {}
    for name in cfg.DATASETS.TEST:
        domains |= dict.fromkeys(count_set_domains(cfg, name))
    return [domain for domain in domains if domain]


def read_specialists(cfg: CfgNode, files: Mapping[str, str]) -> dict[str, Metrics]:
    """The metrics of detectors that were each trained on one domain, on the images of it in DATASETS.TEST.

    Args:
        cfg: DATASETS is read.
        files: domain -> results.json of its specialist, as `evaluate_model` writes it.

    Returns:
        Domain -> task -> name -> number.

    Raises:
        ConfigError: no test set is of the domain; the file cannot be read, or lacks a set of the domain.
    """
    counts = {name: count_set_domains(cfg, name) for name in cfg.DATASETS.TEST if files}
    specialists: dict[str, Metrics] = {}

    for domain, file in files.items():
        sets = {name: of_set[domain] for name, of_set in counts.items() if of_set[domain]}
        if not sets:
            names = list_few(map(repr, list_test_domains(cfg))) or "of which there is none"
            raise NO_DOMAIN.of(repr(domain), file, names=names)

        results = _read_results(file)
        of_domain = results.get(DOMAINS, {}).get(domain, {})
        is_apart = all(len(counts[name]) == 1 for name in sets)
        if of_domain.get("sets") == sets:
            specialists[domain] = _read_metrics(of_domain)
        elif is_apart and sets.keys() <= results.keys():
            specialists[domain] = _join([_read_metrics(results[name]) for name in sets], _average)
        else:
            listed = list_few([repr(name) for name in results if name != DOMAINS]) or "none"
            raise NO_SETS.of(listed, file, name=domain, sets=list_few(map(repr, sets)))
    return specialists


def _read_results(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as opened:
            results = json.load(opened)
    except (OSError, ValueError) as error:
        raise NO_RESULTS.of(f"{type(error).__name__}: {error}", file) from error

    if not isinstance(results, dict) or not all(isinstance(value, dict) for value in results.values()):
        raise NO_RESULTS.of("something else", file)
    return results


def _read_metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics as they are in results.json, where null is no number."""
    others = ("sets", "specialist", "gap")
    tasks = {task: metrics for task, metrics in results.items() if task not in others and isinstance(metrics, Mapping)}
    return {task: _fill(metrics, has_objects=False) for task, metrics in tasks.items()}

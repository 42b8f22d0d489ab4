"""AP of one detector on corrupted pictures: P, mPC and rPC of COCO-C.

    P        = AP on the clean set
    mPC      = mean over corruptions of the mean over severities of AP
    rPC      = mPC / P

Over all fifteen corruptions and five severities these are the numbers of papers; over fewer, those of a quick look.
Nothing is written: variants of the set are corrupted when they are read.

Source: Michaelis et al., *Benchmarking Robustness in Object Detection: Autonomous Driving when Winter is Coming*, 2019,
arXiv 1907.07484, section 3.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from bnext.data.corrupted_sets import name_variant, register_variant
from bnext.data.corruptions.names import COMMON, SEVERITIES
from bnext.data.domains import select_sets
from bnext.evaluation.coco import build_evaluator, evaluate_with, flatten_metrics
from bnext.evaluation.compare import count_together, recompute_kind
from bnext.progress import showing_progress
from bnext.repair.kinds import KINDS, use_kind
from bnext.seeding import seeded

__all__ = ["STATISTICS", "is_as_published", "measure_robustness", "summarize"]

# Of `KINDS`: those that need nothing but the file and the pictures that are evaluated, without labels.
STATISTICS = ("moving_average", "mini_batch", "mini_batch_as_trained", "adaptive")
_CATEGORY = "/AP-"  # in the names of metrics of one category
_TASKS = ("bbox", "segm", "keypoints")
_log = logging.getLogger(__name__)


def measure_robustness(
    cfg: CfgNode,
    model: nn.Module,
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = SEVERITIES,
    *,
    statistics: str = "moving_average",
    measured: Mapping[str, Any] | None = None,
    on_result: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """COCO AP of a model on the clean set and on its corrupted variants.

    Args:
        cfg: the one data set of DATASETS.TEST is corrupted.
        model: the detector; as it was afterwards.
        corruptions: some of `bnext.data.corruptions.names.NAMES`.
        severities: some of 1 to 5.
        statistics: one of `STATISTICS`, in which every variant, and the clean set, is evaluated; "adaptive": estimated
            anew on the pictures of each, without labels.
        measured: results of an earlier call, of which nothing is measured again.
        on_result: called with what is measured so far after each evaluation, on every worker.

    Returns:
        {"clean": {"bbox/AP": ...}, "corrupted": {corruption: {severity as text: the same}}}, with numbers on the main
        process; `summarize` gives P, mPC and rPC.

    Raises:
        ConfigError, LaunchError: a corruption is none, or needs what is not installed.
        DatasetError: a picture is too small or cannot be read.

    Note:
        A collective: every worker evaluates its share. A variant is of the clean set's domain.
    """
    name = str(cfg.DATASETS.TEST[0])
    results: dict[str, Any] = {"clean": None, "corrupted": {}, **(measured or {})}
    corrupted = results["corrupted"]
    todo = []
    for corruption in corruptions:
        there = corrupted.get(corruption, {})
        todo += [(corruption, severity) for severity in severities if str(severity) not in there]

    is_main = comm.is_main_process()

    with showing_progress("robustness", len(todo) + 1, "evaluation", is_wanted=is_main) as bar:
        if results["clean"] is None:
            clean = _measure(cfg, model, name, statistics)
            results["clean"] = clean
            _log.info("%s, clean: box AP %s.", name, _show(clean))
            on_result(results)
        bar.update()

        begin = time.perf_counter()
        for number, (corruption, severity) in enumerate(todo, start=1):
            metrics = _measure(cfg, model, name_variant(name, corruption, severity), statistics)
            corrupted.setdefault(corruption, {})[str(severity)] = metrics
            on_result(results)
            bar.update()

            left = (time.perf_counter() - begin) / number * (len(todo) - number)
            words = "%s, severity %d: box AP %s; %d of %d, about %.0f min left."
            _log.info(words, corruption, severity, _show(metrics), number, len(todo), left / 60)

    return results


def _measure(cfg: CfgNode, model: nn.Module, name: str, statistics: str) -> dict[str, float | None]:
    """COCO's metrics on a set, which has the domain of the clean one."""
    register_variant(name)
    pointed = _point_to(cfg, name)
    kind = KINDS[statistics]
    size = count_together(cfg, model) if kind.is_as_trained else 1

    with (
        use_kind(model, kind, {"test": name}, partial(recompute_kind, pointed)) as (adapted, _),
        tempfile.TemporaryDirectory() as folder,  # for detections, which nobody wants of 76 sets
        seeded(max(cfg.SEED, 0)),  # what detectron2's loader draws
    ):
        evaluator = build_evaluator(pointed, name, folder)
        metrics = flatten_metrics(evaluate_with(pointed, adapted, name, evaluator, size), _TASKS)
    return {key: value for key, value in metrics.items() if _CATEGORY not in key}


def _point_to(cfg: CfgNode, name: str) -> CfgNode:
    """The config of an evaluation on one set."""
    cfg = cfg.clone()
    cfg.defrost()
    select_sets(cfg, "TEST", [name])
    return cfg


def _show(metrics: Mapping[str, float | None]) -> str:
    value = metrics.get("bbox/AP")
    return "-" if value is None else f"{value:.1f}"


def summarize(
    results: Mapping[str, Any], corruptions: Sequence[str], severities: Sequence[int], metric: str = "bbox/AP"
) -> dict[str, Any]:
    """P, mPC and rPC of one metric.

    Args:
        results: of `measure_robustness`.
        corruptions, severities: over which the means are taken; all are measured.
        metric: task/name.

    Returns:
        {"P", "mPC": 0 to 100, "rPC": 0 to 1, or None where P is 0, "means": {corruption: mean over its severities}}.

    Example:
        >>> foggy = {"1": {"bbox/AP": 20.0}, "2": {"bbox/AP": 10.0}}
        >>> summarize({"clean": {"bbox/AP": 40.0}, "corrupted": {"fog": foggy}}, ["fog"], [1, 2])
        {'P': 40.0, 'mPC': 15.0, 'rPC': 0.375, 'means': {'fog': 15.0}}
    """
    means = {}
    for corruption in corruptions:
        rows = results["corrupted"][corruption]
        means[corruption] = sum(rows[str(severity)][metric] for severity in severities) / len(severities)

    clean, mean = results["clean"][metric], sum(means.values()) / len(means)
    return {"P": clean, "mPC": mean, "rPC": mean / clean if clean else None, "means": means}


def is_as_published(corruptions: Sequence[str], severities: Sequence[int]) -> bool:
    """Whether mPC and rPC are over all that COCO-C has, as those of papers."""
    return set(corruptions) == set(COMMON) and set(severities) == set(SEVERITIES)

"""Same checkpoint, which statistics? One model evaluated with the statistics of its file and with others.

Users ask it in ultralytics/ultralytics#5891, open-mmlab/mmaction2#1054 and facebookresearch/maskrcnn-benchmark#1006.
What kinds there are is in `bnext.repair.kinds`; words, table and plot in `bnext.evaluation.compare_report`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from bnext.data.batches import build_evaluation_batches, build_shuffled_batches, build_validation_batches
from bnext.data.records import has_labels, load_records
from bnext.errors import ConfigError, StatisticsError, check_choice
from bnext.evaluation.coco import build_evaluator, evaluate_with, flatten_metrics
from bnext.evaluation.compare_scopes import FailingLast, try_measuring
from bnext.evaluation.reestimate import recompute_statistics
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.repair.kinds import KINDS, count_images_as_trained, find_obstacle
from bnext.repair.mini_batch_inference import normalizing_evaluation_by_mini_batch
from bnext.scope import use_domain
from bnext.seeding import seeded
from bnext.statistics.observe import restoring
from bnext.surgery import convert_norm

__all__ = [
    "KINDS",
    "check_domain",
    "compare_statistics",
    "find_obstacle",
    "normalizing_evaluation_by_mini_batch",
    "read_three_ways",
]

_TASKS = ("bbox", "segm")


def compare_statistics(
    cfg: CfgNode,
    model: nn.Module,
    kinds: Sequence[str] = tuple(KINDS),
    *,
    domain: str | None = None,
    domain_dataset: str | None = None,
    lost: Sequence[str] = (),
    on_kind: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """COCO AP of a model with several kinds of statistics, and where it loses what it has learned.

    Args:
        cfg: the one data set of DATASETS.TEST is evaluated; statistics are re-estimated as `recompute_statistics` does.
        model: the detector; as it was afterwards.
        kinds: some of `KINDS`, each of which is measured once.
        domain: of all images, where norms have statistics or weights per domain; None: as the config says.
        domain_dataset: training images, labelled or not, of the domain that is evaluated, for "per_domain".
        lost: norms whose statistics the file does not have, see `Checkpointer.left_out`; only others are compared.
        on_kind: called with what is measured so far after each kind, on every worker.

    Returns:
        {"rows": {kind: {"bbox/AP": ...}}, "not_applicable": {kind: why}, "reports": {kind: re-estimation}, "reading":
        see `read_three_ways`}. The rows are empty on other workers than the first. A kind that fails, as activations
        are not finite or a mini-batch has one element, does not apply; its message says why.

    Raises:
        ConfigError: an unknown kind; none applies; not one labelled data set; a domain is missing or unknown.
        StatisticsError: every kind has failed.

    Note:
        A collective: every worker evaluates its share.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, sections 3, 4 and 5.
    """
    for kind in kinds:
        check_choice("kinds", kind, tuple(KINDS), where="compare_statistics")
    kinds = list(dict.fromkeys(kinds))
    check_domain(cfg, domain)
    name = _find_dataset(cfg)
    obstacles = {kind: find_obstacle(model, kind, _count_own_images(cfg)) for kind in kinds}
    if "per_domain" in kinds and domain_dataset is None:
        obstacles["per_domain"] = "no data set of the domain is named (--domain-dataset)"
    no_average = f"statistics in the file are not finite ({lost[0]}{', ...' * (len(lost) > 1)})" if lost else ""
    obstacles |= {"moving_average": no_average} if lost and "moving_average" in kinds else {}
    results: dict[str, Any] = {"dataset": name, "domain": domain, "rows": {}, "reports": {}}
    results["not_applicable"] = {kind: reason for kind, reason in obstacles.items() if reason}
    if len(results["not_applicable"]) == len(kinds):
        kind, reason = next(iter(results["not_applicable"].items()))
        raise ConfigError(f"kinds must hold one that applies to the model; got {kind}: {reason}. Choose others.")
    with contextlib.nullcontext() if domain is None else use_domain(domain):
        for kind in (kind for kind in kinds if not obstacles[kind]):
            images = {"adaptive": name, "per_domain": domain_dataset}.get(kind)
            row, failure = try_measuring(model, partial(_measure, cfg, model, kind, name, images, results["reports"]))
            results |= {"not_applicable": results["not_applicable"] | {kind: failure}} if failure else {}
            results["rows"] |= {} if failure else {kind: row}
            found = f"does not apply: {failure}" if failure else f"box AP {row.get('bbox/AP') or 0:.1f}"
            logging.getLogger(__name__).info("%s: %s.", KINDS[kind], found)
            on_kind(results)
        if not results["rows"]:
            kind, failure = next((kind, why) for kind, why in results["not_applicable"].items() if not obstacles[kind])
            raise StatisticsError(f"kinds must hold one that can be evaluated; got {kind}: {failure}. Choose others.")
        read = partial(read_three_ways, cfg, model, results["rows"])
        reading, failure = ({}, no_average) if lost else try_measuring(model, read)
        results["reading"] = {"not_applicable": failure} if failure else reading
    return results


def check_domain(cfg: CfgNode, domain: str | None) -> None:
    """Raise ConfigError unless it is known of which domain the images are, where norms have domains."""
    names, fallback = tuple(cfg.MODEL.BNEXT.DOMAINS.NAMES), cfg.MODEL.BNEXT.DOMAINS.FALLBACK
    if domain is not None and domain not in names:
        raise ConfigError(
            f"--domain must be one of the model's domains {names}; got {domain!r} (MODEL.BNEXT.DOMAINS.NAMES). "
            f"Correct it, or leave --domain out."
        )
    if names and domain is None and not fallback:
        raise ConfigError(
            f"--domain must name the domain of the images where norms have domains; got none of {names} "
            f"(compare_statistics). Give --domain NAME, or set MODEL.BNEXT.DOMAINS.FALLBACK."
        )


def _measure(
    cfg: CfgNode, model: nn.Module, kind: str, name: str, images: str | None, reports: dict[str, Any]
) -> dict[str, float | None]:
    """COCO's metrics with one kind of statistics."""
    size = _find_batch_size(cfg, model) if kind == "mini_batch_as_trained" else 1
    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", kind))
    drawing = seeded(max(cfg.SEED, 0))  # what detectron2's loader draws
    with _using(cfg, model, kind, images, reports) as variant, drawing:
        last = FailingLast(variant)
        metrics = evaluate_with(cfg, last, name, evaluator, size)
    if last.failure is not None:
        raise last.failure
    return flatten_metrics(metrics, [task for task in _TASKS if task in metrics])


def _count_own_images(cfg: CfgNode) -> int:
    """Of this worker, in an SGD step."""
    return max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())


def _find_batch_size(cfg: CfgNode, model: nn.Module) -> int:
    """How many images are normalized together in training, of a model of which `find_obstacle` says nothing."""
    return next(iter(count_images_as_trained(model, _count_own_images(cfg))))


def _find_dataset(cfg: CfgNode) -> str:
    if len(cfg.DATASETS.TEST) != 1:
        raise ConfigError(
            f"DATASETS.TEST must name one data set, which gives the table its AP; got {cfg.DATASETS.TEST} "
            f"(compare_statistics). Name one, or give --target-dataset."
        )
    name = str(cfg.DATASETS.TEST[0])
    if not has_labels(load_records(name, cfg)):
        raise ConfigError(
            f"DATASETS.TEST must be labelled, as AP and loss are measured; got {name!r} without annotations "
            f"(compare_statistics). For statistics alone use recompute_statistics, which needs no labels."
        )
    return name


@contextlib.contextmanager
def _using(
    cfg: CfgNode, model: nn.Module, kind: str, images: str | None, reports: dict[str, Any]
) -> Iterator[nn.Module]:
    """The model with statistics of a kind, of the training's images or of a data set; as it was after the scope."""
    if kind == "moving_average":
        yield model
        return
    if kind in ("mini_batch", "mini_batch_as_trained"):
        with normalizing_evaluation_by_mini_batch(model):
            yield model
        return
    variant, options = model, {"estimator": "mean_of_batches" if kind == "mean_of_batches" else "pooled"}
    if kind == "per_level":
        variant = copy.deepcopy(model)
        convert_norm(variant, population="per_level")
    if images is not None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.BNEXT.PRECISE_BN.ROIS = "top_scored"  # no labels
        options["batches"] = build_shuffled_batches(cfg, [images])
    with restoring(variant):
        reports[kind] = recompute_statistics(cfg, variant, **options).as_dict()
        yield variant


def read_three_ways(
    cfg: CfgNode, model: nn.Module, rows: Mapping[str, Mapping[str, float | None]] | None = None
) -> dict[str, Any]:
    """Three losses of a model whose differences tell why it is worse on validation images than in training.

        fit                      = loss(training images, mini-batch statistics)
        generalization gap       = loss(validation images, mini-batch statistics) - fit
        train-test inconsistency = loss(validation images, population statistics) - the former

    Args:
        cfg: DATASETS.TRAIN, its first set, and DATASETS.TEST; batches have SOLVER.IMS_PER_BATCH images, as in training.
            As many training images are used as there are validation images.
        model: the detector; bitwise as it was afterwards.
        rows: COCO's metrics of `compare_statistics`; the same three ways in AP are added to what they have.

    Returns:
        {"mini_batch_train", "mini_batch_val", "population_val": {"loss": ..., and AP}, "generalization_gap",
        "inconsistency"}; or {"not_applicable": why}.

    Note:
        A collective. Compare losses of the same number of images per worker alone: detectron2 divides those of a dense
        detector by a moving average of foreground anchors, which begins at 100 whatever the batch.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 4.1.
    """
    obstacle = find_obstacle(model, "precise")
    train, val = cfg.DATASETS.TRAIN[:1], cfg.DATASETS.TEST[0]
    if not obstacle and not (train and has_labels(load_records(train[0], cfg))):
        obstacle = f"DATASETS.TRAIN has no labelled data set ({list(train)})"
    if obstacle:
        return {"not_applicable": obstacle}
    own = cfg.clone()
    own.defrost()
    num_batches = -(-len(load_records(val, cfg)) // cfg.SOLVER.IMS_PER_BATCH)
    own.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES = min(num_batches, cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES or 10**9)
    ways = {
        "mini_batch_train": (train[0], "mini_batch"),
        "mini_batch_val": (val, "mini_batch"),
        "population_val": (val, "population"),
    }
    reading: dict[str, Any] = {}
    for way, (name, statistics) in ways.items():
        batches = build_validation_batches(own, name)
        losses = compute_validation_loss(model, batches, statistics=statistics, seed=max(cfg.SEED, 0))
        reading[way] = {"loss": losses["total_loss"], "losses": losses}
    fit, val_loss, population = (reading[way]["loss"] for way in ways)
    reading |= {"generalization_gap": val_loss - fit, "inconsistency": population - val_loss}
    if rows is not None:
        _add_aps(cfg, model, reading, rows)
    return reading


def _add_aps(cfg: CfgNode, model: nn.Module, reading: dict[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    for way, kind in (("mini_batch_val", "mini_batch_as_trained"), ("population_val", "moving_average")):
        reading[way] |= {key: value for key, value in rows.get(kind, {}).items() if key.endswith("/AP")}
    if "mini_batch_as_trained" in rows:
        metrics = _evaluate_training_images(cfg, model, len(load_records(cfg.DATASETS.TEST[0], cfg)))
        reading["mini_batch_train"] |= {key: value for key, value in metrics.items() if key.endswith("/AP")}


def _evaluate_training_images(cfg: CfgNode, model: nn.Module, number: int) -> dict[str, float | None]:
    """COCO's metrics with mini-batch statistics on the first `number` training images; {} if they are not COCO's."""
    name, rank, world_size = cfg.DATASETS.TRAIN[0], comm.get_rank(), comm.get_world_size()
    try:
        evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", "training_images"))
    except ConfigError:
        return {}
    records = load_records(name, cfg)[:number]
    evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in records])
    loader = build_evaluation_batches(cfg, records, range(rank, len(records), world_size), _find_batch_size(cfg, model))
    with normalizing_evaluation_by_mini_batch(model), contextlib.redirect_stdout(io.StringIO()):
        metrics = inference_on_dataset(model, loader, evaluator) or {}
    return flatten_metrics(metrics, [task for task in _TASKS if task in metrics])

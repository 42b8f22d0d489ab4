"""Same checkpoint, which statistics? One detector evaluated with the statistics of its file and with others.

The kinds, and how they are measured, are in `bnext.repair`; here are COCO's AP and the three losses. Words, table and
plot are in `bnext.evaluation.compare_report`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from bnext.config.domains import check_domains
from bnext.config.recipe import resolve_norms
from bnext.data.batches import build_evaluation_batches, build_shuffled_batches, build_validation_batches
from bnext.data.domains import find_domain
from bnext.data.records import Record, has_labels, load_records
from bnext.data.sampling.samplers import count_micro_batch
from bnext.errors import ConfigError, DatasetError
from bnext.evaluation.coco import build_evaluator, evaluate_with, flatten_metrics
from bnext.evaluation.ground_truth import is_crowd
from bnext.evaluation.reestimate import recompute_statistics
from bnext.evaluation.rehearsal import rehearse
from bnext.evaluation.validation_loss import Statistics, compute_validation_loss
from bnext.repair.compare import FAILURES, can_go_on, compare_kinds, failing_alone
from bnext.repair.kinds import KINDS, Kind, count_images_as_trained, find_obstacle, normalizing_evaluation_by_mini_batch
from bnext.scope import use_domain
from bnext.seeding import seeded
from bnext.statistics import RecomputeReport

__all__ = ["compare_statistics", "count_together", "read_three_ways", "recompute_kind"]

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
        domain: of all images, where norms have statistics or weights per domain; None: as their records say.
        domain_dataset: training images, labelled or not, of the domain that is evaluated, for "per_domain".
        lost: norms whose statistics the file does not have, see `Checkpointer.left_out`; only others are compared.
        on_kind: called with what is measured so far after each kind, on every worker.

    Returns:
        {"weights", "dataset", "num_objects", "domain", "domain_dataset", "places" that have batch norms, and what
        `bnext.repair.compare_kinds` returns, with {"bbox/AP": ...} for each kind, empty on other workers than the
        first; "reading": see `read_three_ways`}.

    Raises:
        ConfigError: an unknown kind; none applies; not one labelled data set; see `check_domains`.
        StatisticsError: every kind has failed.

    Note:
        A collective: every worker evaluates its share.
    """
    name = _find_dataset(cfg)
    check_domains(cfg, eval_only=True, domain=domain)
    rehearse(cfg, build=build_evaluator)
    norms = resolve_norms(cfg)
    of_set = find_domain(cfg, name)
    about: dict[str, Any] = {
        "weights": cfg.MODEL.WEIGHTS,
        "dataset": name,
        "num_objects": _count_objects(load_records(name, cfg)),
        "domain": domain or (of_set if of_set in norms.domains else None),
        "domain_dataset": domain_dataset,
        "places": [place for place, norm in norms.places.items() if norm.is_batch_norm],
    }

    data = {"training": None, "test": name, "domain": domain_dataset}
    obstacles = {}
    if domain_dataset is None:
        obstacles["per_domain"] = "no data set of the domain is named (--domain-dataset)"
    if lost:
        obstacles["moving_average"] = f"statistics in the file are not finite ({lost[0]}{', ...' * (len(lost) > 1)})"

    def tell(kind: Kind, results: dict[str, Any]) -> None:
        outcome = f"does not apply: {results['not_applicable'].get(kind.name)}"
        if kind.name in results["rows"]:
            outcome = f"box AP {results['rows'][kind.name].get('bbox/AP') or 0:.1f}"
        logging.getLogger(__name__).info("%s: %s.", kind.words, outcome)
        on_kind({**about, **results})

    with contextlib.nullcontext() if domain is None else use_domain(domain):
        results = compare_kinds(
            model,
            data,
            partial(_measure_ap, cfg),
            kinds,
            num_images=_count_images(cfg),
            recompute=partial(recompute_kind, cfg),
            obstacles=obstacles,
            on_kind=tell,
        )
        if lost:
            reading = {"not_applicable": obstacles["moving_average"]}
        else:
            with failing_alone(model) as failures:
                reading = read_three_ways(cfg, model, results["rows"])
            if failures:
                reading = {"not_applicable": failures[0]}

    return {**about, **results, "reading": reading}


def _find_dataset(cfg: CfgNode) -> str:
    if len(cfg.DATASETS.TEST) != 1:
        rule, remedy = "name one data set, which gives the table its AP", "Name one, or give --target-dataset."
        raise ConfigError.of("DATASETS.TEST", rule, got=cfg.DATASETS.TEST, where="compare_statistics", remedy=remedy)

    name = str(cfg.DATASETS.TEST[0])
    if not has_labels(load_records(name, cfg)):
        rule, got = "be labelled, as AP and loss are measured", f"{name!r} without annotations"
        remedy = "For statistics alone use `bnext reestimate --dataset`, which needs no labels."
        raise ConfigError.of("DATASETS.TEST", rule, got=got, where="compare_statistics", remedy=remedy)
    return name


def _count_objects(records: Sequence[Record]) -> int:
    """Objects that count in COCO's metrics."""
    return sum(not is_crowd(each) for record in records for each in record.get("annotations", ()))


def _count_images(cfg: CfgNode) -> int:
    """Images of this worker that a training runs through the model together."""
    return max(1, count_micro_batch(cfg) // comm.get_world_size())


def count_together(cfg: CfgNode, model: nn.Module) -> int:
    """Images that training normalizes together, of a model that has one number of them: see `find_obstacle`."""
    return next(iter(count_images_as_trained(model, _count_images(cfg))))


def recompute_kind(cfg: CfgNode, model: nn.Module, dataset: str | None, *, estimator: str) -> RecomputeReport:
    """Re-estimate on the training's images, or on those of a data set."""
    if dataset is None:
        return recompute_statistics(cfg, model, estimator=estimator)

    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.BNEXT.PRECISE_BN.ROIS = "top_scored"  # no labels
    return recompute_statistics(cfg, model, estimator=estimator, batches=build_shuffled_batches(cfg, [dataset]))


def _measure_ap(cfg: CfgNode, model: nn.Module, kind: Kind) -> dict[str, float | None]:
    """COCO's metrics with one kind of statistics."""
    name = cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", kind.name))
    size = count_together(cfg, model) if kind.is_as_trained else 1

    last = _FailingLast(model)
    with seeded(max(cfg.SEED, 0)):  # what detectron2's loader draws
        metrics = evaluate_with(cfg, last, name, evaluator, size)
    if last.failure is not None:
        raise last.failure

    return flatten_metrics(metrics, _TASKS)


class _FailingLast(nn.Module):
    """A model that after a failure detects nothing: the worker comes to the end of the evaluation like the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.failure: Exception | None = None
        self.training = model.training

    def forward(self, batch: Any) -> Any:
        if self.failure is not None:
            return []

        try:
            return self.model(batch)
        except FAILURES as error:
            if comm.get_world_size() == 1 or not can_go_on(self.model):
                raise
            self.failure = error
            return []


def read_three_ways(
    cfg: CfgNode, model: nn.Module, rows: Mapping[str, Mapping[str, float | None]] | None = None
) -> dict[str, Any]:
    """Three losses of a model whose differences tell why it is worse on validation images than in training.

        fit                      = loss(training images, mini-batch statistics)
        generalization gap       = loss(validation images, mini-batch statistics) - fit
        train-test inconsistency = loss(validation images, population statistics) - the former

    Args:
        cfg: DATASETS.TRAIN, its first set, and DATASETS.TEST; batches have as many images as in training.
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
    train, val = cfg.DATASETS.TRAIN[:1], cfg.DATASETS.TEST[0]
    obstacle = find_obstacle(model, "precise")
    if not obstacle and not (train and has_labels(load_records(train[0], cfg))):
        obstacle = f"DATASETS.TRAIN has no labelled data set ({list(train)})"
    if obstacle:
        return {"not_applicable": obstacle}

    num_images = len(load_records(val, cfg))
    num_batches = -(-num_images // count_micro_batch(cfg))
    cfg = cfg.clone()
    cfg.defrost()
    limit = cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES or num_batches
    cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES = min(num_batches, limit)

    def measure_loss(name: str, statistics: Statistics) -> dict[str, Any]:
        batches = build_validation_batches(cfg, name)
        losses = compute_validation_loss(model, batches, statistics=statistics, seed=max(cfg.SEED, 0))
        return {"loss": losses["total_loss"], "losses": losses}

    fit = measure_loss(train[0], "mini_batch")
    mini_batch = measure_loss(val, "mini_batch")
    population = measure_loss(val, "population")

    if rows is not None:
        population |= _select_ap(rows.get("moving_average", {}))
        mini_batch |= _select_ap(rows.get("mini_batch_as_trained", {}))
        if "mini_batch_as_trained" in rows:
            fit |= _select_ap(_evaluate_training_images(cfg, model, num_images))
    return {
        "mini_batch_train": fit,
        "mini_batch_val": mini_batch,
        "population_val": population,
        "generalization_gap": mini_batch["loss"] - fit["loss"],
        "inconsistency": population["loss"] - mini_batch["loss"],
    }


def _select_ap(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: value for key, value in metrics.items() if key.endswith("/AP")}


def _evaluate_training_images(cfg: CfgNode, model: nn.Module, number: int) -> dict[str, float | None]:
    """COCO's metrics with mini-batch statistics on the first `number` training images; {} if they are not COCO's."""
    name = cfg.DATASETS.TRAIN[0]
    try:
        evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", "training_images"))
    except (ConfigError, DatasetError):
        return {}

    records = load_records(name, cfg)[:number]
    evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in records])
    share = range(comm.get_rank(), len(records), comm.get_world_size())
    loader = build_evaluation_batches(cfg, records, share, count_together(cfg, model))

    with normalizing_evaluation_by_mini_batch(model), contextlib.redirect_stdout(io.StringIO()):
        metrics = inference_on_dataset(model, loader, evaluator) or {}
    return flatten_metrics(metrics, _TASKS)

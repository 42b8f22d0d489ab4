"""The best checkpoint by a metric, and a training that ends when it gets no better.

What was evaluated is remembered in OUTPUT_DIR/best.json, so that a resume goes on with it, also from a checkpoint that
is older than the last evaluation. The end follows from that list alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.data.classes import IGNORED, LEFT_OUT, rename_categories
from bnext.distributed import unwrap_model
from bnext.engine.averaged_weights import AVERAGE, AverageWeights
from bnext.engine.hooks import is_due
from bnext.errors import ConfigError, Refusal, list_few
from bnext.evaluation.domains import DOMAINS, list_test_domains
from bnext.files import find_local_file, write_json
from bnext.text import suggest

__all__ = ["BestCheckpoint", "build_best", "check_best_metric", "find_end", "limit_iterations"]

FILE = "model_best"
MEMORY = "best.json"
KEY = "TEST.BNEXT.BEST.METRIC"
NO_TASK = "Let the evaluator return {'task': {'metric': value}}, and write task/metric; or set it to ''."
UNKNOWN_METRIC = Refusal(ConfigError, KEY, "name a metric of the evaluation", "{remedy}")

# Of Detectron2's COCO evaluation, beside those of each class.
_SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_METRICS = {"bbox": _SIZES, "segm": _SIZES, "keypoints": ("AP", "AP50", "AP75", "APm", "APl")}
_SWITCHES = {
    AVERAGE: "SOLVER.BNEXT.EMA.ENABLED",
    "validation_loss": "TEST.BNEXT.VALIDATION_LOSS.PERIOD",
    DOMAINS: "DATASETS.DOMAINS.TEST",
}
_WITH_BOXES = ("RetinaNet", "FCOS", "GeneralizedRCNN")


class Evaluation(NamedTuple):
    """A value of the metric; None: it was no number."""

    iteration: int
    value: float | None


class BestCheckpoint(HookBase):
    """Keeps the weights with the best metric as model_best.pth, and may end a training that gets no better.

    Args:
        cfg: TEST.EVAL_PERIOD, TEST.BNEXT.BEST and OUTPUT_DIR are read.
        averages: the hook that has them, for a metric of averaged weights ("ema/..."), which are saved then.

    Raises:
        ConfigError: at the first evaluation, on every worker, if it has no such metric.

    Note:
        A collective after every evaluation, which comes before it in the list of hooks. NaN and infinity are never
        best. The training ends with the iteration after the evaluation that used up the patience, with a checkpoint
        and an evaluation as always.
    """

    def __init__(self, cfg: CfgNode, averages: AverageWeights | None = None) -> None:
        node = cfg.TEST.BNEXT.BEST
        self._metric, self._mode, self._patience = node.METRIC, _find_mode(cfg), node.PATIENCE
        self._period = cfg.TEST.EVAL_PERIOD
        self._folder = cfg.OUTPUT_DIR
        self._averages = averages
        self.evaluations: list[Evaluation] = []

    def before_train(self) -> None:
        if comm.is_main_process():
            self.evaluations = _read_evaluations(self._folder, self._metric, self.trainer.start_iter)

    def after_step(self) -> None:
        trainer = self.trainer
        is_last = trainer.iter + 1 >= trainer.max_iter
        if not is_last and is_due(trainer.iter, self._period, trainer.max_iter):
            self._look(trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # else it has failed
            self._look(self.trainer.iter - 1)

    def _look(self, iteration: int) -> None:
        """Take in the evaluation of an iteration, the last one done."""
        is_best, end, remedy = False, None, ""
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            fresh = {name: float(value) for name, (value, when) in latest.items() if when >= iteration and "/" in name}
            value = _find_value(self._metric, fresh)
            if value is None:
                remedy = _remedy(self._metric, [*fresh]) or NO_TASK
            else:
                self.evaluations.append(Evaluation(iteration, value if math.isfinite(value) else None))
                is_best = _find_best(self.evaluations, self._mode) == self.evaluations[-1]
                end = find_end(self.evaluations, self._patience, self._mode)

        is_best, end, remedy = comm.all_gather((is_best, end, remedy))[0]
        if remedy:
            raise UNKNOWN_METRIC.of(repr(self._metric), "config", remedy=remedy)

        if is_best:
            self._save(iteration)
        if comm.is_main_process():
            self._remember()
        if end is not None and end < self.trainer.max_iter:
            self.trainer.max_iter = end
            logging.getLogger(__name__).info(
                "%s has got no better in %d evaluation(s) (TEST.BNEXT.BEST.PATIENCE): iteration %d is the last.",
                self._metric,
                self._patience,
                end - 1,
            )

    def _save(self, iteration: int) -> None:
        if self._averages is not None and self._metric.startswith(f"{AVERAGE}/"):
            with self._averages.lent() as model:
                self._write(model, iteration)
        else:
            self._write(unwrap_model(self.trainer.model), iteration)

    def _write(self, model: nn.Module, iteration: int) -> None:
        if comm.is_main_process():
            best = {"metric": self._metric, **self.evaluations[-1]._asdict()}
            Checkpointer(model, self._folder).save_weights(FILE, iteration=iteration, best=best)
            logging.getLogger(__name__).info(
                "%s %.4g of iteration %d is the best so far: %s.pth.", self._metric, best["value"], iteration, FILE
            )

    def _remember(self) -> None:
        if find_local_file(self._folder) is None:
            return
        best = _find_best(self.evaluations, self._mode)
        memory = {
            "metric": self._metric,
            "mode": self._mode,
            "best": best and best._asdict(),
            "evaluations": [evaluation._asdict() for evaluation in self.evaluations],
        }
        write_json(os.path.join(self._folder, MEMORY), memory)


def _find_mode(cfg: CfgNode) -> str:
    """Whether the metric is best where it is largest, "max", or least, "min"."""
    node = cfg.TEST.BNEXT.BEST
    if node.MODE != "auto":
        return str(node.MODE)
    return "min" if "loss" in node.METRIC else "max"


def _find_value(metric: str, fresh: Mapping[str, float]) -> float | None:
    """The value of a metric; NaN where its task has none at all, as without detections; None: it does not exist."""
    task = metric.rpartition("/")[0]
    siblings = [value for name, value in fresh.items() if name.rpartition("/")[0] == task]
    is_empty = bool(siblings) and all(math.isnan(value) for value in siblings)
    return fresh.get(metric, math.nan if is_empty else None)


def _find_best(evaluations: Iterable[Evaluation], mode: str) -> Evaluation | None:
    """The first one with the best value; None: there is no number."""
    best: Evaluation | None = None
    for evaluation in evaluations:
        if evaluation.value is not None and (best is None or _is_better(evaluation.value, best.value, mode)):
            best = evaluation
    return best


def _is_better(value: float, other: float | None, mode: str) -> bool:
    return other is None or (value > other if mode == "max" else value < other)


def find_end(evaluations: Sequence[Evaluation], patience: int, mode: str) -> int | None:
    """The number of iterations of a training that gets no better; None: it goes on.

    Args:
        evaluations: in their order.
        patience: so many after the best one end it; 0: never. Before there is a number none counts.
        mode: whether the metric is to be "max" or "min".

    Example:
        >>> values = [Evaluation(9, 1.0), Evaluation(19, 3.0), Evaluation(29, 2.0), Evaluation(39, None)]
        >>> find_end(values, 2, "max"), find_end(values, 3, "max")
        (41, None)
    """
    for number in range(1, len(evaluations) + 1) if patience else ():
        seen = evaluations[:number]
        best = _find_best(seen, mode)
        if best is not None and len(seen) - 1 - seen.index(best) >= patience:
            return seen[-1].iteration + 2
    return None


def limit_iterations(cfg: CfgNode, start_iter: int, max_iter: int) -> int:
    """The number of iterations of a training that resumes, which may have ended early before. A collective."""
    node = cfg.TEST.BNEXT.BEST
    if not node.PATIENCE or start_iter == 0:
        return max_iter

    end: int | None = None
    if comm.is_main_process():
        end = find_end(_read_evaluations(cfg.OUTPUT_DIR, node.METRIC, start_iter), node.PATIENCE, _find_mode(cfg))
    end = comm.all_gather(end)[0]
    if end is None or end >= max_iter:
        return max_iter

    logging.getLogger(__name__).info(
        "The training ended early, at iteration %d, by TEST.BNEXT.BEST.PATIENCE %d; a larger one lets it go on.",
        end,
        node.PATIENCE,
    )
    return end


def _read_evaluations(folder: str, metric: str, start_iter: int) -> list[Evaluation]:
    """The evaluations before an iteration that an earlier run of the training has remembered."""
    path = os.path.join(folder, MEMORY)
    if start_iter == 0 or find_local_file(folder) is None or not os.path.isfile(path):
        return []

    try:
        with open(path) as file:
            memory = json.load(file)
        pairs = [(int(one["iteration"]), one["value"]) for one in memory["evaluations"]]
        evaluations = [Evaluation(when, value if value is None else float(value)) for when, value in pairs]
        former = memory["metric"]
    except (ValueError, TypeError, KeyError, AttributeError):
        former, evaluations = f"nothing that can be read in {path}", []

    if former != metric:
        logging.getLogger(__name__).warning("The search for the best %s begins anew: before it was %s.", metric, former)
        return []
    return [evaluation for evaluation in evaluations if evaluation.iteration < start_iter]


# ---- names of metrics


def check_best_metric(cfg: CfgNode) -> None:
    """Refuse a metric that bnext's evaluation of the config's data sets does not give.

    Args:
        cfg: TEST.BNEXT.BEST.METRIC, DATASETS.TEST and what the model predicts are read.

    Raises:
        ConfigError: names the nearest ones.
    """
    metric = cfg.TEST.BNEXT.BEST.METRIC
    known = _list_metrics(cfg) if metric else []
    has_names = all(_list_classes(cfg, name) for name in cfg.DATASETS.TEST)
    is_of_class = "/AP-" in metric and not has_names  # which are not read yet
    if metric and known and metric not in known and not is_of_class:
        kind = metric.partition("/")[0]
        switch = _SWITCHES.get(kind)
        is_off = not any(name.startswith(f"{kind}/") for name in known)
        remedy = f"Set {switch}, or choose one of {list_few(known)}." if switch and is_off else _remedy(metric, known)
        raise UNKNOWN_METRIC.of(repr(metric), "config", remedy=remedy)


def _remedy(metric: str, known: Sequence[str]) -> str:
    return suggest(metric, known, f"Choose one of {list_few(known, 8)}.") if known else ""


def _list_metrics(cfg: CfgNode) -> list[str]:
    """The names of all metrics; empty: they are not known before an evaluation."""
    if cfg.MODEL.META_ARCHITECTURE.removeprefix("BNext") not in _WITH_BOXES:
        return []

    is_given = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    tasks = [task for task, given in is_given.items() if given]
    names: list[str] = []
    for data_set in cfg.DATASETS.TEST:
        prefix = f"{data_set}/" if len(cfg.DATASETS.TEST) > 1 else ""
        classes = _list_classes(cfg, data_set)
        for task in tasks:
            names += [f"{prefix}{task}/{name}" for name in (*_METRICS[task], *classes)]

    domains = list_test_domains(cfg)
    for domain in (*domains, "mean", "worst") if len(domains) > 1 else ():
        for task in tasks:
            names += [f"{DOMAINS}/{domain}/{task}/{name}" for name in _METRICS[task]]

    if cfg.SOLVER.BNEXT.EMA.ENABLED:
        names += [f"{AVERAGE}/{name}" for name in names]
    if cfg.TEST.BNEXT.VALIDATION_LOSS.PERIOD:
        names += _list_losses(cfg)
    return names


def _list_classes(cfg: CfgNode, data_set: str) -> list[str]:
    """Metrics of the classes, which there are with more than one."""
    metadata: Mapping[str, Any] = MetadataCatalog.get(data_set).as_dict()
    names = rename_categories(cfg, data_set, metadata.get("thing_classes", []))
    classes = [name for name in dict.fromkeys(names) if name not in (LEFT_OUT, IGNORED)]
    return [f"AP-{name}" for name in classes] if len(classes) > 1 else []


def _list_losses(cfg: CfgNode) -> list[str]:
    several = len(cfg.DATASETS.TEST) > 1
    middles = [f"{data_set}/" for data_set in cfg.DATASETS.TEST] if several else [""]
    return [f"validation_loss/{middle}total_loss" for middle in middles]


def build_best(cfg: CfgNode, averages: AverageWeights | None, *, is_known: bool) -> BestCheckpoint | None:
    """The hook that TEST.BNEXT.BEST.METRIC asks for, if it does.

    Args:
        cfg: see `BestCheckpoint`.
        averages: see `BestCheckpoint`.
        is_known: whether bnext's own evaluation gives the metrics.

    Raises:
        ConfigError: see `check_best_metric`.
    """
    if not cfg.TEST.BNEXT.BEST.METRIC:
        return None
    if is_known:
        check_best_metric(cfg)
    return BestCheckpoint(cfg, averages)

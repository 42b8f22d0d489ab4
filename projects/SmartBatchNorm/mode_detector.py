"""The four modes on a RetinaNet: one training without norms, one with batch norm, read by COCO AP along the way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from bnext.cli.train import check_run
from bnext.distributed import unwrap_model
from bnext.engine.population import estimate_in_one_epoch, normalizing_by_mini_batch
from bnext.engine.trainer import Trainer
from bnext.errors import ConfigError
from bnext.evaluation.coco import build_evaluator, evaluate_with, flatten_metrics
from bnext.layers.walk import find_bnext_norms
from bnext.scope.model import restoring
from bnext.studies.runner import load_row, prepare_folder

__all__ = ["NUM_READINGS", "list_detector_trials"]

NUM_READINGS = 8  # along a training
CONFIGS = Path(__file__).parent / "configs"


def list_detector_trials(
    output: str, seeds: Sequence[int], opts: Sequence[str] = ()
) -> dict[str, Callable[[int], Mapping[str, Any]]]:
    """Name -> training of a RetinaNet, a function of the seed: "none" without norms, "bn" with batch norm.

    Args:
        output: folder of the study; each training has a folder of its own in it.
        seeds: that will be trained.
        opts: KEY VALUE pairs that override the configs.

    Raises:
        BNextError: a config or a data set is wrong.
    """
    trials = {}
    for norm in ("none", "bn"):
        file = str(CONFIGS / f"retinanet_{norm}.yaml")
        configs = {seed: load_row(file, output, f"{norm}_seed{seed}", ["SEED", str(seed), *opts]) for seed in seeds}
        _check(configs[seeds[0]])
        trials[norm] = partial(_train_and_read, configs, norm)
    return trials


def _check(cfg: CfgNode) -> None:
    if cfg.SOLVER.MAX_ITER < NUM_READINGS or cfg.SOLVER.MAX_ITER % NUM_READINGS:
        rule = f"be a multiple of {NUM_READINGS}, the times that a training is read"
        remedy = "Use 400, or 800."
        raise ConfigError.of("SOLVER.MAX_ITER", rule, got=cfg.SOLVER.MAX_ITER, where="--opts", remedy=remedy)
    if len(cfg.DATASETS.TEST) != 1:
        rule = "name one data set, whose AP is read"
        raise ConfigError.of("DATASETS.TEST", rule, got=cfg.DATASETS.TEST, where="--opts", remedy="Name one.")
    check_run(cfg)


class ReadModes(HookBase):
    """Reads a detector along its training, by population and by mini-batch statistics; the training is as without it.

    Args:
        cfg: of the training.
        has_norms: whether there are statistics to read by.

    Attributes:
        curves: reading -> AP after each part of the training.
        first: running statistics at the first reading.
    """

    def __init__(self, cfg: CfgNode, *, has_norms: bool) -> None:
        self.cfg, self.has_norms = cfg, has_norms
        self.curves: dict[str, list[float]] = {}
        self.first: dict[str, Any] = {}

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % (self.trainer.max_iter // NUM_READINGS):
            return

        model = unwrap_model(self.trainer.model)
        if not self.first:
            self.first = {name: buffer.clone() for name, buffer in model.named_buffers()}
        readings = ("moving_average", "mini_batch") if self.has_norms else ("none",)
        for reading in readings:
            images = self.cfg.SOLVER.IMS_PER_BATCH if reading == "mini_batch" else 1
            self.curves.setdefault(reading, []).append(measure_ap(self.cfg, model, reading, images))


def measure_ap(cfg: CfgNode, model: nn.Module, reading: str, images_per_batch: int = 1) -> float:
    """COCO AP on cfg.DATASETS.TEST; the model is as before.

    Args:
        cfg: of the model.
        model: a detector.
        reading: by "mini_batch" statistics, or by those that the model has.
        images_per_batch: evaluated at a time.
    """
    name = cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", reading))
    scope = normalizing_by_mini_batch(model) if reading == "mini_batch" else contextlib.nullcontext()
    with restoring(model), scope:
        metrics = evaluate_with(cfg, model.eval(), name, evaluator, images_per_batch)
    return flatten_metrics(metrics)["bbox/AP"] or 0.0


def _train_and_read(configs: Mapping[int, CfgNode], norm: str, seed: int) -> dict[str, Any]:
    """A training, read along the way, and tested in all ways at its end.

    Returns:
        {"val": {reading: [AP, ...]}, "test": {reading: {images at a time: AP}}}.
    """
    cfg = configs[seed]
    prepare_folder(cfg)
    trainer = Trainer(cfg)
    hook = ReadModes(cfg, has_norms=norm == "bn")
    trainer.register_hooks([hook])
    trainer.train()

    test = _test(cfg, unwrap_model(trainer.model), hook)
    return {"val": hook.curves, "test": test}


def _test(cfg: CfgNode, model: nn.Module, hook: ReadModes) -> dict[str, dict[str, float]]:
    """Reading -> images at a time -> AP of the final weights. By population statistics their number does not count."""
    if not hook.has_norms:
        return {"none": {"1": hook.curves["none"][-1]}}

    batch_size = cfg.SOLVER.IMS_PER_BATCH
    results = {
        "moving_average": {"1": hook.curves["moving_average"][-1]},
        "mini_batch": {
            "1": measure_ap(cfg, model, "mini_batch", 1),
            str(batch_size): hook.curves["mini_batch"][-1],
        },
    }

    with restoring(model):
        for norm in find_bnext_norms(model).values():
            norm.reset_running_stats()
        results["fresh"] = {"1": measure_ap(cfg, model, "fresh")}

    with restoring(model):
        for name, buffer in model.named_buffers():
            buffer.copy_(hook.first[name])
        results["stale"] = {"1": measure_ap(cfg, model, "stale")}

    estimate_in_one_epoch(cfg, model)
    results["estimated"] = {"1": measure_ap(cfg, model, "estimated")}
    return results

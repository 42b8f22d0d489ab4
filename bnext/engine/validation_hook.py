"""The validation loss in a training: a hook that puts it into the storage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from bnext.data.batches import build_validation_batches
from bnext.engine.hooks import is_due
from bnext.engine.population import is_validated_by_mini_batch
from bnext.evaluation.validation_loss import Statistics, compute_validation_loss, find_device

__all__ = ["ValidationLoss", "build_validation_loss"]


class ValidationLoss(HookBase):
    """Puts the validation loss into the storage, as "validation_loss/<loss>"; see `compute_validation_loss`.

    With several data sets as "validation_loss/<data set>/<loss>". It depends on what a checkpoint of bnext's trainer
    has: the weights, with statistics="population" the running statistics, and the moving averages of foreground anchors
    of detectron2's dense detectors. So a resumed training has the values of an uninterrupted one.

    Args:
        period: iterations between two; also after the last one.
        batches: for each data set this worker's batches, which are gone through again each time.
        statistics: called as statistics(iteration), says what normalizes.
        uses_amp: whether the forward runs under autocast, as the training's.

    Note:
        What is drawn at random follows the trainer's `seed`; a trainer without, as detectron2's, has seed 0.
    """

    def __init__(
        self,
        period: int,
        batches: Mapping[str, Iterable[Any]],
        statistics: Callable[[int], Statistics] = lambda iteration: "population",
        uses_amp: bool = False,
    ) -> None:
        self._period = period
        self._batches = batches
        self._statistics = statistics
        self._uses_amp = uses_amp

    def after_step(self) -> None:
        trainer = self.trainer
        if not is_due(trainer.iter, self._period, trainer.max_iter):
            return

        statistics = self._statistics(trainer.iter)
        seed = max(0, getattr(trainer, "seed", 0))

        for name, batches in self._batches.items():
            losses = compute_validation_loss(
                trainer.model, batches, statistics=statistics, forward=self._run, seed=seed
            )

            prefix = "validation_loss" if len(self._batches) == 1 else f"validation_loss/{name}"
            for loss, value in losses.items():
                trainer.storage.put_scalar(f"{prefix}/{loss}", value, smoothing_hint=False)
            logging.getLogger(__name__).info(
                "Validation loss on %s, normalized by %s statistics: %.4g.", name, statistics, losses["total_loss"]
            )

    def _run(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast(find_device(model).type, enabled=self._uses_amp):
            return model(batch)


def build_validation_loss(cfg: CfgNode) -> list[ValidationLoss]:
    """The hook that TEST.BNEXT.VALIDATION_LOSS asks for, if it does.

    Raises:
        ConfigError: see `build_validation_batches`.
    """
    node = cfg.TEST.BNEXT.VALIDATION_LOSS
    if node.PERIOD == 0:
        return []

    def choose_statistics(iteration: int) -> Statistics:
        return "mini_batch" if is_validated_by_mini_batch(cfg, iteration) else node.STATISTICS

    batches = {name: build_validation_batches(cfg, name) for name in cfg.DATASETS.TEST}
    return [ValidationLoss(node.PERIOD, batches, choose_statistics, cfg.SOLVER.AMP.ENABLED)]

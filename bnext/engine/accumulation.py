"""Gradient accumulation in a training: Detectron2's two kinds of steps, of several micro-batches each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from bnext.errors import ConfigError
from bnext.notices import tell_once
from bnext.repair.accumulation import accumulate_gradients, split_batch

__all__ = ["build_step", "check_accumulation"]

KEY = "SOLVER.BNEXT.ACCUMULATE"
EQUALITY = (
    "Each step has %d micro-batches of %d images on each worker (SOLVER.BNEXT.ACCUMULATE), its normalization batches. "
    "The gradient is that of the whole batch as far as losses are means over images: RetinaNet's moving average of "
    "foreground anchors, FCOS' foreground points and the sampled RoIs of an R-CNN are those of a micro-batch. "
    "Running statistics move %d times a step: to reach back as far as before, they need the momentum "
    "1 - (1 - momentum)^(1/%d)."
)


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's step in float32, from several micro-batches.

    Args:
        model, data_loader, optimizer: as of `SimpleTrainer`; a batch of the loader is a list of this worker's images.
        number: of micro-batches.
    """

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        super().__init__(model, data_loader, optimizer)
        self.number = number

    def run_step(self) -> None:
        _run_step(self, self.model, torch.Tensor.backward)
        self.optimizer.step()


class AccumulatingAMPTrainer(AMPTrainer):
    """Detectron2's step in mixed precision, from several micro-batches: one scale, one step and one update for all."""

    def __init__(self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        super().__init__(model, data_loader, optimizer)
        self.number = number

    def run_step(self) -> None:
        def call(batch: Any) -> Any:
            with torch.autocast("cuda"):
                return self.model(batch)

        _run_step(self, call, lambda loss: self.grad_scaler.scale(loss).backward())
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def _run_step(trainer: Any, call: Callable[[Any], Any], backward: Callable[[Tensor], object]) -> None:
    """Up to the step of the optimizer; the images are those that a step without micro-batches would have."""
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start

    number, micro_batches = trainer.number, split_batch(batch, trainer.number)
    tell_once(logging.getLogger(__name__), trainer, EQUALITY, number, len(micro_batches[0]), number, number)

    trainer.optimizer.zero_grad()
    losses = accumulate_gradients(trainer.model, micro_batches, call, backward=backward)
    trainer._write_metrics({"total_loss": losses["loss"]} if [*losses] == ["loss"] else losses, data_time)


def build_step(cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    """The trainer of a step: detectron2's own, or one of several micro-batches.

    Args:
        cfg: SOLVER.AMP.ENABLED and SOLVER.BNEXT.ACCUMULATE are read.
        model: with DistributedDataParallel, where there are workers.
        data_loader, optimizer: see `SimpleTrainer`.

    Raises:
        ConfigError: see `check_accumulation`.
    """
    number = cfg.SOLVER.BNEXT.ACCUMULATE
    check_accumulation(cfg, comm.get_world_size())
    if number == 1:
        return (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, data_loader, optimizer)

    step = AccumulatingAMPTrainer if cfg.SOLVER.AMP.ENABLED else AccumulatingTrainer
    return step(model, data_loader, optimizer, number)


def check_accumulation(cfg: CfgNode, num_workers: int) -> None:
    """Refuse a number of micro-batches that does not divide the images of a worker in a step.

    Args:
        cfg: SOLVER.IMS_PER_BATCH and SOLVER.BNEXT.ACCUMULATE are read.
        num_workers: 1 or more.

    Raises:
        ConfigError: names both keys.
    """
    number, size = cfg.SOLVER.BNEXT.ACCUMULATE, cfg.SOLVER.IMS_PER_BATCH // num_workers
    if number < 1 or size % number:
        divisors = ", ".join(str(k) for k in range(1, size + 1) if size % k == 0)
        raise ConfigError.of(
            KEY,
            f"divide the {size} images of a worker in a step (SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, "
            f"{num_workers} worker(s))",
            got=number,
            where="config",
            remedy=f"Use one of {divisors}, or another batch.",
        )

"""A step in a training from several micro-batches: Detectron2's two kinds of steps, with gradients accumulated.

The micro-batches are parts of the step's images, copies of them in an auxiliary domain, or both.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from bnext.engine.auxiliary import AuxiliaryImages, build_auxiliary
from bnext.errors import ConfigError
from bnext.losses import name_losses
from bnext.notices import tell_once
from bnext.repair.accumulation import accumulate_gradients, split_batch
from bnext.statistics.data_pass import Forward

__all__ = ["build_step", "check_accumulation"]

KEY = "SOLVER.BNEXT.ACCUMULATE"
EQUALITY = (
    "Each step has %d micro-batches of %d images on each worker (SOLVER.BNEXT.ACCUMULATE), its normalization batches. "
    "The gradient is that of the whole batch as far as losses are means over images: RetinaNet's moving average of "
    "foreground anchors, FCOS' foreground points and the sampled RoIs of an R-CNN are those of a micro-batch. "
    "Running statistics move %d times a step: to reach back as far as before, they need the momentum "
    "1 - (1 - momentum)^(1/%d)."
)


class _OfMicroBatches:
    """A step of several micro-batches, and of copies of their images; goes before a trainer of Detectron2.

    Args:
        model, data_loader, optimizer: as of `SimpleTrainer`; a batch of the loader is a list of this worker's images.
        number: of micro-batches.
        auxiliary: makes the copies; None: there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        number: int,
        auxiliary: AuxiliaryImages | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)  # type: ignore[call-arg]
        self.number = number
        self.auxiliary = auxiliary


class AccumulatingTrainer(_OfMicroBatches, SimpleTrainer):
    """Detectron2's step in float32."""

    def run_step(self) -> None:
        _run_step(self, _call, torch.Tensor.backward)
        self.optimizer.step()


class AccumulatingAMPTrainer(_OfMicroBatches, AMPTrainer):
    """The same step in mixed precision: one scale, one step and one update for all micro-batches."""

    def run_step(self) -> None:
        def call(model: nn.Module, batch: Any) -> Any:
            with torch.autocast("cuda"):
                return model(batch)

        _run_step(self, call, lambda loss: self.grad_scaler.scale(loss).backward(), self.grad_scaler.scale)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _run_step(
    trainer: Any,
    call: Forward,
    backward: Callable[[Tensor], object],
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:
    """Up to the step of the optimizer; the images are those that a step without micro-batches would have."""
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start

    number, micro_batches = trainer.number, split_batch(batch, trainer.number)
    if number > 1:
        tell_once(logging.getLogger(__name__), trainer, EQUALITY, number, len(micro_batches[0]), number, number)

    parts = [_Part(images, index) for index, images in enumerate(micro_batches)]
    if trainer.auxiliary is not None:
        parts += [dataclasses.replace(part, is_auxiliary=True) for part in parts]

    def compute_losses(part: _Part) -> dict[str, Tensor]:
        losses = _compute_losses(trainer, part, call, scale)
        times = len(parts) // number  # the mean over all parts is to be a sum over both kinds
        return {name: times * loss for name, loss in losses.items()}

    trainer.optimizer.zero_grad()
    losses = accumulate_gradients(
        trainer.model, parts, compute_losses, num_samples=lambda part: len(part.images), backward=backward
    )
    trainer._write_metrics({"total_loss": losses["loss"]} if [*losses] == ["loss"] else losses, data_time)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Images that go through the model together in a step.

    Args:
        images: of this worker.
        index: of the micro-batch.
        is_auxiliary: whether copies of them do.
    """

    images: Any
    index: int
    is_auxiliary: bool = False


def _compute_losses(trainer: Any, part: _Part, call: Forward, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The losses of a part by name; copies are made only now, so that the step's own images come first."""
    model, auxiliary = trainer.model, trainer.auxiliary
    if not part.is_auxiliary:
        return name_losses(call(model, part.images), "a training step")

    def forward(inner: nn.Module, images: Any) -> dict[str, Tensor]:
        losses = name_losses(call(inner, images), "a training step")
        return {name: scale(loss) for name, loss in losses.items()}  # else gradients of pixels would vanish in float16

    return auxiliary.name(call(model, auxiliary.make(model, part.images, forward, part.index)))


def build_step(cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    """The trainer of a step: detectron2's own, or one of several micro-batches, or with copies of its images.

    Args:
        cfg: SOLVER.AMP.ENABLED, SOLVER.BNEXT.ACCUMULATE and SOLVER.BNEXT.AUXILIARY are read.
        model: with DistributedDataParallel, where there are workers.
        data_loader, optimizer: see `SimpleTrainer`.

    Raises:
        ConfigError: see `check_accumulation`.
    """
    number, auxiliary = cfg.SOLVER.BNEXT.ACCUMULATE, build_auxiliary(cfg)
    check_accumulation(cfg, comm.get_world_size())
    if number == 1 and auxiliary is None:
        return (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, data_loader, optimizer)

    step = AccumulatingAMPTrainer if cfg.SOLVER.AMP.ENABLED else AccumulatingTrainer
    return step(model, data_loader, optimizer, number, auxiliary)


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

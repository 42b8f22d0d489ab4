"""The norms of a training: a line for each group of them at its start, and metrics of their mini-batches on the way."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from bnext.data.sampling.samplers import count_micro_batch
from bnext.diagnostics import (
    MiniBatch,
    NormGroup,
    describe_mini_batch,
    find_norm_groups,
    format_norm_groups,
    observing_mini_batches,
)
from bnext.layers.walk import find_norms

__all__ = ["NormMetrics", "TellNorms", "build_norm_metrics"]

PREFIX = "norms"
_ROI_HEADS = "roi_heads."  # their samples are RoIs, whose number is another in every step


class TellNorms(HookBase):
    """Logs one line for each group of norms when a training starts; see `find_norm_groups`.

    Args:
        model: the detector.
        num_images: of a worker that go through it together.
    """

    def __init__(self, model: nn.Module, num_images: int) -> None:
        self._model = model
        self._num_images = num_images

    def before_train(self) -> None:
        groups = find_norm_groups(self._model, self._count_samples)
        number = sum(len(group.records) for group in groups)
        logger = logging.getLogger(__name__)
        if not groups:
            logger.info("The model has no norms.")
            return
        logger.info("The model has %d norms, of %d kinds:\n%s", number, len(groups), format_norm_groups(groups))

    def _count_samples(self, path: str) -> int | None:
        return None if path.startswith(_ROI_HEADS) else self._num_images


class NormMetrics(HookBase):
    """Puts numbers of the mini-batches that norms see into the metrics, as "norms/<group>/<number>".

    See `describe_mini_batch` for the numbers: means over the norms of a group and over workers, in the first forward of
    the model in a step.

    Args:
        model: the detector, without DistributedDataParallel.
        period: iterations between two; 1 or more.

    Note:
        A collective, every period. The training is bitwise the one without it.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self._model = model
        self._period = period
        self._scope = ExitStack()
        self._seen: Mapping[str, MiniBatch] = {}
        self._groups: list[NormGroup] = []

    def before_train(self) -> None:
        self._groups = find_norm_groups(self._model)

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self._period:
            return

        self._seen = self._scope.enter_context(observing_mini_batches(find_norms(self._model)))
        first = self._model.register_forward_hook(lambda *_: self._scope.close())  # a step may have micro-batches
        self._scope.callback(first.remove)

    def after_step(self) -> None:
        self._scope.close()
        if (self.trainer.iter + 1) % self._period:
            return

        numbers = _read_numbers({path: describe_mini_batch(seen) for path, seen in self._seen.items()})
        self._seen = {}
        every = comm.gather(self._average_groups(numbers))
        for name, value in _average(every).items():  # on the main worker, which alone has metrics
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def after_train(self) -> None:
        self._scope.close()  # of a step that failed

    def _average_groups(self, numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        averages: dict[str, float] = {}
        for group in self._groups:
            of_norms = [numbers[path] for path in group.paths if path in numbers]
            for name, value in _average(of_norms).items():
                averages[f"{PREFIX}/{group.name}/{name}"] = value
        return averages


def _read_numbers(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The same as numbers, those that are finite; it waits for the device once."""
    places = [(path, name) for path, named in tensors.items() for name in named]
    if not places:
        return {}

    values = torch.stack([tensors[path][name].double() for path, name in places]).tolist()
    numbers: dict[str, dict[str, float]] = {}
    for (path, name), value in zip(places, values, strict=True):
        if math.isfinite(value):
            numbers.setdefault(path, {})[name] = value
    return numbers


def _average(every: list[Mapping[str, float]] | list[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over those that have it."""
    values: dict[str, list[float]] = {}
    for numbers in every:
        for name, value in numbers.items():
            values.setdefault(name, []).append(value)
    return {name: sum(of_all) / len(of_all) for name, of_all in values.items()}


def build_norm_metrics(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """The hooks that tell of norms.

    Args:
        cfg: SOLVER.BNEXT.NORM_METRICS, SOLVER.BNEXT.ACCUMULATE and SOLVER.IMS_PER_BATCH are read.
        model: the detector, without DistributedDataParallel.
    """
    num_images = count_micro_batch(cfg) // comm.get_world_size()
    hooks: list[HookBase] = [TellNorms(model, num_images)]
    period = cfg.SOLVER.BNEXT.NORM_METRICS.PERIOD
    if period and find_norms(model):
        hooks.append(NormMetrics(model, period))
    return hooks

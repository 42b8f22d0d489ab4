"""Re-estimation of population statistics in a training: the hook PreciseBN, and which hook a config asks for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from bnext.distributed import unwrap_model
from bnext.distributed.equal_buffers import equalize_buffers, norm_buffers
from bnext.engine.hooks import is_due
from bnext.engine.norm_schedules import are_statistics_frozen
from bnext.engine.smart_batch_norm import SmartBatchNorm, estimate_in_one_epoch

__all__ = ["PreciseBN", "build_estimates", "keeping_averages"]


@contextlib.contextmanager
def keeping_averages(model: nn.Module) -> Iterator[None]:
    """In this scope running statistics may be re-estimated, saved and evaluated; then they are bitwise as they were.

    What the hook `PreciseBN` does, for loops of one's own. Averages that differ between workers stay so.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from bnext.statistics import recompute_population_statistics
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> with keeping_averages(model):
        ...     report = recompute_population_statistics(model, [torch.randn(8, 3, 4, 4)])
        ...     saved = {name: value.clone() for name, value in model.state_dict().items()}
        >>> bool(saved["1.running_mean"].any()), bool(model[1].running_mean.any())
        (True, False)
    """
    before = [(buffer, buffer.clone()) for _, buffer in norm_buffers(model)]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)


class PreciseBN(HookBase):
    """Re-estimates the statistics before checkpoints and evaluations, as detectron2's hook of this name does.

    Detectron2's cannot: fvcore's estimate refuses a norm that is used for several levels. What is saved and evaluated
    has the estimate. The training goes on without it: before the next step the running statistics are again the
    moving averages that they were, so that weights, statistics, images and random numbers are bitwise those of a
    training without this hook. The averages are in the checkpoint, too, as this hook's state, for an exact resume.

    Args:
        recompute: does it.
        periods: of what follows in the list of hooks, such as checkpoints, validation losses and evaluations, in
            iterations; 0: after the last one alone, when there is always an estimate.
        stays: called as stays(iteration) before a step: whether the statistics are frozen by then, so that the
            estimate stays.

    Note:
        A collective, as norm buffers are first made equal on all workers.
    """

    def __init__(
        self, recompute: Callable[[], object], *periods: int, stays: Callable[[int], bool] = lambda iteration: False
    ) -> None:
        self._recompute, self._periods, self._stays = recompute, periods, stays
        self._averages: dict[str, Tensor] = {}

    def before_step(self) -> None:
        if self._averages and not self._stays(self.trainer.iter):
            buffers = dict(norm_buffers(unwrap_model(self.trainer.model)))
            if {name: b.shape for name, b in buffers.items()} == {n: b.shape for n, b in self._averages.items()}:
                for name, buffer in buffers.items():
                    buffer.data.copy_(self._averages[name])
            else:  # a resume with other norms, whose state was converted
                logging.getLogger(__name__).warning("The running statistics go on from the estimate of the checkpoint.")
        self._averages = {}

    def after_step(self) -> None:
        trainer = self.trainer
        if any(is_due(trainer.iter, period, trainer.max_iter) for period in (0, *self._periods)):
            equalize_buffers(trainer.model)
            self._averages = {name: buffer.clone() for name, buffer in norm_buffers(unwrap_model(trainer.model))}
            self._recompute()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._averages = state["averages"]


def build_estimates(cfg: CfgNode, model: nn.Module, recompute: Callable[[], object] | None) -> list[HookBase]:
    """The hook that TEST.PRECISE_BN or TEST.BNEXT.SMART_BATCH_NORM asks for, if one does.

    Args:
        cfg: TEST.*, SOLVER.CHECKPOINT_PERIOD and SOLVER.BNEXT.FREEZE are read. There is an estimate before
            evaluations, before checkpoints if BEFORE_CHECKPOINTS, and before validation losses that the population
            normalizes: each curve is of one kind of statistics.
        model: the detector.
        recompute: re-estimates its statistics; None: TEST.PRECISE_BN.ENABLED is False.
    """
    if cfg.TEST.BNEXT.SMART_BATCH_NORM:
        return [SmartBatchNorm(model, lambda: estimate_in_one_epoch(cfg, model))]
    if recompute is None:
        return []
    periods, validation = [cfg.TEST.EVAL_PERIOD], cfg.TEST.BNEXT.VALIDATION_LOSS
    if cfg.TEST.BNEXT.PRECISE_BN.BEFORE_CHECKPOINTS:
        periods.append(cfg.SOLVER.CHECKPOINT_PERIOD)
    if validation.STATISTICS == "population":
        periods.append(validation.PERIOD)  # 0: never
    return [PreciseBN(recompute, *periods, stays=partial(are_statistics_frozen, cfg))]

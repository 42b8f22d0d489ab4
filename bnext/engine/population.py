"""Population statistics in a training: re-estimated for what is saved and evaluated, without moving the training.

    PreciseBN:         before evaluations, checkpoints and validation losses; then the moving averages go on
    smart batch norm:  mini-batches normalize in training and in its evaluations; with the final weights one epoch
                       over the training images estimates the population, for the last checkpoint and evaluation

The same for loops of one's own: `bnext.scope.model.restoring` around a re-estimation, `normalizing_by_mini_batch`,
`estimate_in_one_epoch`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor, nn

from bnext.data.records import load_train_records
from bnext.distributed import unwrap_model
from bnext.distributed.equal_buffers import equalize_buffers, norm_buffers
from bnext.engine.hooks import is_due
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.walk import find_bnext_norms, find_foreign_norms
from bnext.scope.statistics import answering
from bnext.statistics import RecomputeReport

__all__ = [
    "PreciseBN",
    "build_estimates",
    "count_batches",
    "estimate_in_one_epoch",
    "is_validated_by_mini_batch",
    "normalizing_by_mini_batch",
]


class PreciseBN(HookBase):
    """Re-estimates the statistics before checkpoints and evaluations, as detectron2's hook of this name does.

    Detectron2's cannot: fvcore's estimate refuses a norm that is used for several levels. What is saved and evaluated
    has the estimate. The training goes on without it: before the next step the running statistics are again the
    moving averages that they were, so that weights, statistics, images and random numbers are bitwise those of a
    training without this hook. The averages are in the checkpoint, too, as this hook's state, for an exact resume.

    Args:
        recompute: does it.
        periods: of what follows in the list of hooks, such as checkpoints, validation losses and evaluations, in
            iterations. After the last iteration there is always an estimate.
        frozen_from: first iteration with frozen statistics. The last estimate comes right before it, and stays.

    Note:
        A collective, as norm buffers are first made equal on all workers.
    """

    def __init__(self, recompute: Callable[[], object], *periods: int, frozen_from: float = math.inf) -> None:
        self._recompute = recompute
        self._periods = (0, *periods)
        self._frozen_from = frozen_from
        self._averages: dict[str, Tensor] = {}

    @property
    def is_in_force(self) -> bool:
        """Whether the model has an estimate, in the place of which the next step puts the moving averages."""
        return bool(self._averages)

    def before_step(self) -> None:
        averages, self._averages = self._averages, {}
        if not averages or self.trainer.iter >= self._frozen_from:
            return

        buffers = dict(norm_buffers(unwrap_model(self.trainer.model)))
        if {name: b.shape for name, b in buffers.items()} != {name: a.shape for name, a in averages.items()}:
            # A resume with other norms, whose state was converted.
            logging.getLogger(__name__).warning("The running statistics go on from the estimate of the checkpoint.")
            return

        for name, buffer in buffers.items():
            buffer.data.copy_(averages[name])

    def after_step(self) -> None:
        trainer = self.trainer
        is_last = trainer.iter + 1 == self._frozen_from
        is_wanted = is_last or any(is_due(trainer.iter, period, trainer.max_iter) for period in self._periods)
        if not is_wanted or trainer.iter >= self._frozen_from:
            return

        equalize_buffers(trainer.model)
        self._averages = {name: buffer.clone() for name, buffer in norm_buffers(unwrap_model(trainer.model))}
        self._recompute()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"averages": self._averages}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._averages = state["averages"]


def build_estimates(cfg: CfgNode, model: nn.Module) -> list[PreciseBN]:
    """The hook that TEST.PRECISE_BN or TEST.BNEXT.SMART_BATCH_NORM asks for, if one does.

    Args:
        cfg: TEST.*, SOLVER.CHECKPOINT_PERIOD and SOLVER.BNEXT.FREEZE are read. There is an estimate before
            evaluations, before checkpoints if BEFORE_CHECKPOINTS, and before validation losses that the population
            normalizes: each curve is of one kind of statistics.
        model: the detector, without DistributedDataParallel.

    Raises:
        ConfigError: smart batch norm has no norm to act on, see `normalizing_by_mini_batch`.
    """
    test = cfg.TEST.BNEXT
    if test.SMART_BATCH_NORM:
        _find_mini_batch_norms(model)
        return [PreciseBN(lambda: estimate_in_one_epoch(cfg, model))]
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return []

    periods = [cfg.TEST.EVAL_PERIOD]
    if test.PRECISE_BN.BEFORE_CHECKPOINTS:
        periods.append(cfg.SOLVER.CHECKPOINT_PERIOD)
    if test.VALIDATION_LOSS.STATISTICS == "population":
        periods.append(test.VALIDATION_LOSS.PERIOD)  # 0: never

    freeze = cfg.SOLVER.BNEXT.FREEZE
    is_frozen = freeze.ITER >= 0 and freeze.WHAT != "affine"
    return [
        PreciseBN(
            lambda: recompute_statistics(cfg, model), *periods, frozen_from=freeze.ITER if is_frozen else math.inf
        )
    ]


def estimate_in_one_epoch(cfg: CfgNode, model: nn.Module) -> RecomputeReport:
    """Estimate the population statistics of a model whose weights no longer change, on one epoch of training images.

    Args:
        cfg: as of `recompute_statistics`; TEST.PRECISE_BN.NUM_ITER is not read.
        model: the detector.

    Raises:
        StatisticsError: see `recompute_population_statistics`.

    Note:
        A collective. With a TEST.BNEXT.PRECISE_BN.TOLERANCE it may end before the epoch does.
    """
    return recompute_statistics(cfg, model, num_batches=count_batches(cfg))


def count_batches(cfg: CfgNode) -> int:
    """Batches of SOLVER.IMS_PER_BATCH images in one epoch over DATASETS.TRAIN, the last one filled up."""
    return math.ceil(len(load_train_records(cfg)) / cfg.SOLVER.IMS_PER_BATCH)


def is_validated_by_mini_batch(cfg: CfgNode, iteration: int) -> bool:
    """Whether smart batch norm has not estimated the population yet: mini-batches normalize what is validated.

    Args:
        cfg: TEST.BNEXT.SMART_BATCH_NORM and SOLVER.MAX_ITER are read.
        iteration: the one just done, from 0.
    """
    return cfg.TEST.BNEXT.SMART_BATCH_NORM and iteration + 1 < cfg.SOLVER.MAX_ITER


@contextlib.contextmanager
def normalizing_by_mini_batch(model: nn.Module) -> Iterator[None]:
    """In this scope norms that mini-batches normalize in training are normalized by them in evaluation mode, too.

    The mini-batch is that of the call, on this worker: detectron2 evaluates images one by one. In the RoI heads of
    bnext's architectures it is the RoIs of an image, however many images are evaluated together.

    Args:
        model: its norms are bnext's. Frozen ones, and those with training="renorm" or "population", stay as they are.

    Raises:
        ConfigError: no norm of the model is normalized by mini-batches in training, or one is not bnext's.

    Example:
        >>> import torch
        >>> norm = BatchNorm2d(3).eval()
        >>> with normalizing_by_mini_batch(norm):
        ...     output = norm(torch.randn(8, 3, 4, 4) + 5)
        >>> bool(output.mean().abs() < 1e-5)
        True
    """
    with answering(_find_mini_batch_norms(model), inference="mini_batch"):
        yield


def _find_mini_batch_norms(model: nn.Module) -> list[BatchNorm2d]:
    norms = []
    for norm in find_bnext_norms(model).values():
        if norm.spec.training == "mini_batch" and not norm.spec.has_frozen_statistics:
            norms.append(norm)

    foreign = list(find_foreign_norms(model))
    if foreign or not norms:
        raise ConfigError.of(
            "The model",
            "have batch norms of bnext that mini-batches normalize in training, and no others",
            got=f"another at {foreign[0] or 'its root'}" if foreign else "none",
            where="TEST.BNEXT.SMART_BATCH_NORM in a config",
            remedy="Choose BN or SyncBN in one of bnext's architectures, or convert the norms with convert_norm.",
        )
    return norms

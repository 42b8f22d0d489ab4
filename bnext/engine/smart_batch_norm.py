"""Smart batch norm: mini-batches normalize in training and validation; the population is estimated once, at the end.

    training, and evaluations in it:  statistics of the mini-batch
    then, with frozen weights:        one epoch over the training images estimates the population statistics
    last checkpoint and evaluation:   population statistics

`normalizing_by_mini_batch` and `estimate_in_one_epoch` are the same for loops of one's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from bnext.data.records import load_train_records
from bnext.engine.hooks import is_due
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers.batch_norm import BatchNorm2d
from bnext.scope.statistics import answering
from bnext.statistics import RecomputeReport
from bnext.surgery.freezing import find_batch_norms

__all__ = ["SmartBatchNorm", "count_batches", "estimate_in_one_epoch", "normalizing_by_mini_batch", "validating"]


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
        >>> bool(output.mean().abs() < 1e-5), norm.spec.inference
        (True, 'population')
    """
    with answering(_find_norms(model), inference="mini_batch"):
        yield


def _find_norms(model: nn.Module) -> list[BatchNorm2d]:
    norms = list(find_batch_norms(model))
    foreign = [path for path, norm in norms if not isinstance(norm, BatchNorm2d)]
    own = [norm for _, norm in norms if isinstance(norm, BatchNorm2d)]
    found = [norm for norm in own if norm.spec.training == "mini_batch" and not norm.spec.has_frozen_statistics]
    if foreign or not found:
        got = f"another at {foreign[0] or 'its root'}" if foreign else "none"
        raise ConfigError(
            f"The model must have batch norms of bnext that mini-batches normalize in training, and no others; got "
            f"{got} (TEST.BNEXT.SMART_BATCH_NORM in a config). Choose BN or SyncBN in one of bnext's architectures, or "
            f"convert the norms with convert_norm."
        )
    return found


def count_batches(cfg: CfgNode) -> int:
    """Batches of SOLVER.IMS_PER_BATCH images in one epoch over DATASETS.TRAIN, the last one filled up."""
    return -(-len(load_train_records(cfg)) // cfg.SOLVER.IMS_PER_BATCH)


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


def validating(cfg: CfgNode, model: nn.Module, iteration: int) -> contextlib.AbstractContextManager[None]:
    """The scope of an evaluation after an iteration: by mini-batches in a smart batch norm until its estimate is there.

    Args:
        cfg: TEST.BNEXT.SMART_BATCH_NORM and SOLVER.MAX_ITER are read.
        model: that is evaluated.
        iteration: the one just done, from 0.
    """
    is_before = cfg.TEST.BNEXT.SMART_BATCH_NORM and iteration + 1 < cfg.SOLVER.MAX_ITER
    return normalizing_by_mini_batch(model) if is_before else contextlib.nullcontext()


class SmartBatchNorm(HookBase):
    """Estimates the population statistics once, after the last iteration, before its checkpoint and evaluation.

    Args:
        model: the detector, without DistributedDataParallel.
        estimate: does it.

    Raises:
        ConfigError: where `normalizing_by_mini_batch` raises it.
    """

    def __init__(self, model: nn.Module, estimate: Callable[[], object]) -> None:
        _find_norms(model)
        self._estimate = estimate

    def after_step(self) -> None:
        if is_due(self.trainer.iter, 0, self.trainer.max_iter):
            self._estimate()

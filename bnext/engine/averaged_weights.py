"""An average of the weights beside a training: kept in its checkpoints, saved as a file of its own, and evaluated.

The training is bitwise the one without it. `AverageWeights` comes right after the step, before anything puts other
statistics into the model; `SaveAverage` right before the checkpoint, which holds the average as that hook's state.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.distributed import unwrap_model
from bnext.engine.hooks import is_due
from bnext.errors import CheckpointError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.repair.averaged_weights import AveragedWeights
from bnext.statistics.observe import select_norms

__all__ = ["AVERAGE", "AverageWeights", "SaveAverage", "build_averages"]

AVERAGE = "ema"  # name of its metrics, and of its folder
FILE = "model_ema"


class AverageWeights(HookBase):
    """Averages the weights of the model after every step; see `AveragedWeights`.

    Args:
        cfg: SOLVER.BNEXT.EMA is read, and what `recompute_statistics` reads.

    Note:
        The average begins with the weights that a training starts from, and a resume goes on with that of the
        checkpoint.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._cfg = cfg
        self._loaded: dict[str, Any] = {}
        self.average: AveragedWeights | None = None

    def before_train(self) -> None:
        node, model = self._cfg.SOLVER.BNEXT.EMA, self.trainer.model
        average = AveragedWeights(model, node.DECAY, node.BUFFERS, warms_up=node.WARM_UP)

        if self._loaded:
            self._load(average)
        elif self.trainer.start_iter > 0:
            logging.getLogger(__name__).warning(
                "The checkpoint holds no average of weights (SOLVER.BNEXT.EMA): it begins with the weights of "
                "iteration %d.",
                self.trainer.start_iter,
            )
        self.average, self._loaded = average, {}

    def _load(self, average: AveragedWeights) -> None:
        try:
            average.load_state_dict(self._loaded)
        except CheckpointError as error:
            raise CheckpointError.of(
                "The average of weights (SOLVER.BNEXT.EMA) of the resumed training",
                "be that of the checkpoint",
                got="another",
                where=f"{error}; OUTPUT_DIR {self._cfg.OUTPUT_DIR}",
                remedy="Resume with the SOLVER.BNEXT.EMA.BUFFERS of the training, or start another with "
                "MODEL.WEIGHTS <file> and another OUTPUT_DIR.",
            ) from error

    def after_step(self) -> None:
        assert self.average is not None
        self.average.update(self.trainer.model)

    @contextlib.contextmanager
    def lent(self) -> Iterator[nn.Module]:
        """The model of the trainer, in this scope with the averaged weights. A collective."""
        assert self.average is not None
        model = unwrap_model(self.trainer.model)
        with self.average.lent_to(model, lambda lent: recompute_statistics(self._cfg, lent)):
            yield model

    def evaluate(self, test: Callable[[CfgNode, nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """Metrics of the averaged weights by their own name; nothing on workers that have no metrics.

        Args:
            test: evaluates a model with a config, whose OUTPUT_DIR is a folder of the average's own.
        """
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, AVERAGE)
        cfg.freeze()

        logging.getLogger(__name__).info("The averaged weights are evaluated, as %s/...:", AVERAGE)
        with self.lent() as model:
            results = test(cfg, model)
        return {AVERAGE: results} if results else {}

    def state_dict(self) -> dict[str, Any]:
        return self._loaded if self.average is None else self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state
        self.average = None


class SaveAverage(HookBase):
    """Saves a model with the averaged weights as model_ema.pth, whenever a checkpoint is written.

    Args:
        averages: a hook of the same trainer.
        folder: for the file, which is replaced each time.
        period: iterations between checkpoints.
        periods: of what else needs averaged statistics that are equal on all workers.

    Note:
        A collective, when it saves.
    """

    def __init__(self, averages: AverageWeights, folder: str, period: int, *periods: int) -> None:
        self._averages = averages
        self._folder = folder
        self._period = period
        self._periods = (period, *periods)

    def after_step(self) -> None:
        trainer, average = self.trainer, self._averages.average
        if not any(is_due(trainer.iter, period, trainer.max_iter) for period in self._periods):
            return

        assert average is not None
        average.equalize(trainer.model)
        if not is_due(trainer.iter, self._period, trainer.max_iter):
            return
        with self._averages.lent() as model:
            saver = Checkpointer(model, self._folder, save_to_disk=comm.is_main_process())
            saver.save_weights(FILE, iteration=trainer.iter)


def build_averages(cfg: CfgNode, model: nn.Module) -> tuple[AverageWeights, SaveAverage] | None:
    """The two hooks that SOLVER.BNEXT.EMA.ENABLED asks for, if it does.

    Args:
        cfg: SOLVER.BNEXT.EMA, SOLVER.CHECKPOINT_PERIOD, TEST.EVAL_PERIOD and OUTPUT_DIR are read.
        model: the detector.

    Raises:
        StatisticsError: statistics are to be re-estimated, and the model has none.
    """
    if not cfg.SOLVER.BNEXT.EMA.ENABLED:
        return None
    if cfg.SOLVER.BNEXT.EMA.BUFFERS == "re_estimated":
        select_norms(model)

    averages = AverageWeights(cfg)
    return averages, SaveAverage(averages, cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)

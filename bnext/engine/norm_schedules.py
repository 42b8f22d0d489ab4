"""Hooks that change norms during a training. All are functions of the iteration alone: a resume needs no state.

In a list of hooks `FreezeNorms` comes after the LR scheduler's, and before checkpoints are written.
"""

from __future__ import annotations

import logging
from typing import Any, get_args

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import CycleBatchNormList
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed.equal_buffers import equalize_buffers
from bnext.errors import ConfigError, check_choice
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.walk import find_bnext_norms, find_foreign_norms, find_norms
from bnext.surgery.freezing import Freezable, freeze_norms
from bnext.surgery.schedules import Points, check_points, interpolate, set_momentum, set_renorm_limits

__all__ = ["FreezeNorms", "NormSchedule", "build_norm_schedules"]


class FreezeNorms(HookBase):
    """Freeze all batch norms of the model from an iteration on, as FrozenBN; then the learning rate warms up.

        factor of the learning rate in iteration t:  min(1, (t - iteration + 1) / (warmup_iters + 1))

    Args:
        iteration: the first one with frozen norms, from 0.
        what: population "statistics" (they normalize from then on), "affine", or "both".
        warmup_iters: iterations with less than the learning rate that the scheduler sets; 0: none.

    Raises:
        ConfigError: `iteration` or `warmup_iters` is negative; before training, where the model has nothing to freeze.

    Note:
        Statistics are made equal on all workers before they are frozen: a collective. `PreciseBN` re-estimates them
        before that. torch's norms, and other subclasses, are put into evaluation mode before every step (a trainer
        whose step calls `model.train()` undoes that: convert them with `convert_norm`); those without population
        statistics keep their mini-batch.
        The affine keeps its `requires_grad`, as DistributedDataParallel expects its gradient, but the optimizer's
        step leaves it out, so that momentum and weight decay do not move it either.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 4: frozen for the last 20 of 100 epochs, of
        which the first is a linear warm-up.
    """

    def __init__(self, iteration: int, what: Freezable = "both", warmup_iters: int = 0) -> None:
        check_choice("what", what, get_args(Freezable), where="FreezeNorms")
        for name, value in (("iteration", iteration), ("warmup_iters", warmup_iters)):
            if value < 0:
                remedy = "Leave out what is not wanted."
                raise ConfigError.of(name, "be 0 or more", got=value, where="FreezeNorms", remedy=remedy)

        self._iteration = iteration
        self._warmup_iters = warmup_iters
        self._freezes_statistics = what != "affine"
        self._freezes_affine = what != "statistics"

        self._norms: list[BatchNorm2d] = []
        self._foreign_norms: list[_BatchNorm] = []
        self._affine: list[nn.Parameter] = []

        self._handles: list[Any] = []
        self._left_out: list[tuple[dict[str, Any], list[nn.Parameter], Any]] = []  # during a step of the optimizer

    def select_norms(self, model: nn.Module) -> None:
        """Find what will be frozen.

        Raises:
            ConfigError: there is nothing.
        """
        self._norms, self._foreign_norms, self._affine = [], [], []

        if self._freezes_statistics:
            self._norms = [n for n in find_bnext_norms(model).values() if n.spec.population != "none"]
            self._foreign_norms = [n for n in find_foreign_norms(model).values() if n.running_mean is not None]

        if self._freezes_affine:
            affine: dict[nn.Parameter, None] = {}  # norms may share some
            for module in model.modules():
                if isinstance(module, (_BatchNorm, CycleBatchNormList)):
                    affine.update(dict.fromkeys(module.parameters()))
            self._affine = [parameter for parameter in affine if parameter.requires_grad]

        is_moving = bool(self._foreign_norms) or not all(norm.spec.has_frozen_statistics for norm in self._norms)
        is_first = not self._handles  # a second training may find what the first one froze
        if is_first and not is_moving and not self._affine:
            raise ConfigError.of(
                "The model",
                "have a batch norm that is not frozen yet",
                got=f"{len(find_norms(model))} batch norms, none of which FreezeNorms would change",
                where="SOLVER.BNEXT.FREEZE in a config",
                remedy="Leave it out.",
            )

    def before_train(self) -> None:
        self.select_norms(self.trainer.model)

        selected = {*self._norms, *self._foreign_norms}
        left = [path for path, norm in find_norms(self.trainer.model).items() if norm not in selected]
        if left and self._freezes_statistics:
            logging.getLogger(__name__).warning(
                "%d norms have no population statistics to freeze (%s, ...): they go on with their mini-batch.",
                len(left),
                left[0],
            )

        optimizer = self.trainer.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]

    def after_train(self) -> None:
        self._after_optimizer_step()  # where a step has failed

        for handle in self._handles:
            handle.remove()

    def before_step(self) -> None:
        trainer = self.trainer
        if trainer.iter < self._iteration:
            return

        if trainer.iter in (self._iteration, trainer.start_iter):
            logging.getLogger(__name__).info(
                "Norms are frozen from iteration %d on: the statistics of %d norms (PreciseBN will leave them, too) "
                "and %d affine parameters.",
                self._iteration,
                len(self._norms) + len(self._foreign_norms),
                len(self._affine),
            )

        for norm in self._norms:
            if not norm.spec.has_frozen_statistics:
                freeze_norms(norm, "statistics")
        for foreign in self._foreign_norms:
            foreign.eval()  # in every iteration: an evaluation puts the whole model into training mode again

    def after_step(self) -> None:
        trainer = self.trainer

        factor = self.factor(trainer.iter)
        if factor < 1 and "lr" in trainer.storage.histories():
            rate = trainer.storage.history("lr").latest()
            trainer.storage.put_scalar("lr", rate * factor, smoothing_hint=False)  # what was used

        if self._freezes_statistics and trainer.iter + 1 == self._iteration:
            equalize_buffers(trainer.model)

    def factor(self, iteration: int) -> float:
        """By what the learning rate of the scheduler is multiplied."""
        if iteration < self._iteration:
            return 1.0
        return min(1.0, (iteration - self._iteration + 1) / (self._warmup_iters + 1))

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Gradient clipping nests the steps of two classes, and torch calls the hooks for both.
        if self.trainer.iter < self._iteration or self._left_out:
            return

        factor = self.factor(self.trainer.iter)
        frozen = set(self._affine)

        for group in optimizer.param_groups:
            self._left_out.append((group, group["params"], group["lr"]))
            group["params"] = [parameter for parameter in group["params"] if parameter not in frozen]
            group["lr"] = group["lr"] * factor if factor < 1 else group["lr"]

    def _after_optimizer_step(self, *_: Any) -> None:
        # Scheduler and checkpoint see their own rate and all parameters: nothing compounds, a resume needs no state.
        for group, parameters, rate in self._left_out:
            group["params"], group["lr"] = parameters, rate
        self._left_out = []


class NormSchedule(HookBase):
    """Set the momentum of all running statistics, or the limits of Batch Renormalization, in every iteration.

    Args:
        points: of "momentum" (torch's sense, in (0, 1]), "r_max" or "d_max", each (iteration, value) pairs, see
            `bnext.surgery.schedules.interpolate`. What is left out stays as it is.

    Raises:
        ConfigError: no such points; before training, where no norm has a moving average, or renorm.

    Source:
        Ioffe, *Batch Renormalization*, 2017; `bnext.surgery.schedules.RENORM_R_MAX_POINTS` and `..D_MAX_POINTS`.
    """

    def __init__(self, **points: Points) -> None:
        self._points = {name: check_points(pairs, name, name, where="NormSchedule") for name, pairs in points.items()}

    def apply(self, model: nn.Module, iteration: int) -> None:
        """Set them for one iteration."""
        values = {name: interpolate(points, iteration) for name, points in self._points.items()}

        if "momentum" in values:
            set_momentum(model, values.pop("momentum"))
        if values:
            set_renorm_limits(model, **values)

    def before_step(self) -> None:
        self.apply(self.trainer.model, self.trainer.iter)


def build_norm_schedules(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """The hooks that SOLVER.BNEXT asks for.

    Args:
        cfg: SOLVER.BNEXT is read.
        model: that they will change; momentum and renorm limits become those of iteration 0.

    Raises:
        ConfigError: the model has no norm on which one of them would act.
    """
    node = cfg.SOLVER.BNEXT
    hooks: list[HookBase] = []

    if node.FREEZE.ITER >= 0:
        freeze = FreezeNorms(node.FREEZE.ITER, node.FREEZE.WHAT, node.FREEZE.WARMUP_ITERS)
        freeze.select_norms(model)
        hooks.append(freeze)

    momentum = {"momentum": node.MOMENTUM}
    limits = {"r_max": node.RENORM.R_MAX, "d_max": node.RENORM.D_MAX}
    for key, points in (("MOMENTUM", momentum), ("RENORM", limits)):
        given = {name: value for name, value in points.items() if value}
        if not given:
            continue

        schedule = NormSchedule(**given)
        try:
            schedule.apply(model, 0)
        except ConfigError as error:
            raise ConfigError(f"SOLVER.BNEXT.{key} must have a norm to act on: {error}") from error
        hooks.append(schedule)

    return hooks

"""Hooks that change norms during a training. All are functions of the iteration alone: a resume needs no state.

In a list of hooks `FreezeNorms` comes after the LR scheduler's, and before checkpoints are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, get_args

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.layers import CycleBatchNormList
from torch import nn

from bnext.config.schedules import PLACE
from bnext.distributed.equal_buffers import equalize_buffers
from bnext.engine.hooks import is_due
from bnext.errors import ConfigError, check_choice
from bnext.layers.batch_norm import BatchNorm2d
from bnext.surgery.freezing import Freezable, find_batch_norms, freeze_norms
from bnext.surgery.schedules import Points, check_points, interpolate, set_momentum, set_renorm_limits

__all__ = ["FreezeNorms", "MomentumSchedule", "RenormSchedule", "are_statistics_frozen", "build_norm_schedules"]


class FreezeNorms(HookBase):
    """Freeze all batch norms of the model from an iteration on, as FrozenBN; then the learning rate warms up.

        factor of the learning rate in iteration t:  min(1, (t - iteration + 1) / (warmup_iters + 1))

    Args:
        iteration: the first one with frozen norms, from 0.
        what: population "statistics" (they normalize from then on), "affine", or "both".
        warmup_iters: iterations with less than the learning rate that the scheduler sets; 0: none.
        recompute: re-estimates population statistics; called once, before they are frozen.

    Raises:
        ConfigError: `iteration` or `warmup_iters` is negative; before training, where the model has nothing to freeze.

    Note:
        Statistics are made equal on all workers before they are frozen: a collective. torch's norms, and other
        subclasses, are put into evaluation mode before every step (a trainer whose step calls `model.train()` undoes
        that: convert them with `convert_norm`); those without population statistics keep their mini-batch.
        The affine keeps its `requires_grad`, as DistributedDataParallel expects its gradient, but the optimizer's
        step leaves it out, so that momentum and weight decay do not move it either.

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 4: frozen for the last 20 of 100 epochs, of
        which the first is a linear warm-up.
    """

    def __init__(
        self,
        iteration: int,
        what: Freezable = "both",
        warmup_iters: int = 0,
        recompute: Callable[[], object] | None = None,
    ) -> None:
        for name, value in (("iteration", iteration), ("warmup_iters", warmup_iters)):
            if value < 0:
                raise ConfigError(f"{name} must be 0 or more; got {value} (FreezeNorms). Leave out what is not wanted.")
        check_choice("what", what, get_args(Freezable), where="FreezeNorms")
        self._iteration, self._warmup_iters = iteration, warmup_iters
        self._freezes_statistics, self._freezes_affine = what != "affine", what != "statistics"
        self._recompute = recompute
        self._own: list[BatchNorm2d] = []
        self._others: list[nn.Module] = []
        self._affine: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._kept: list[tuple[dict[str, Any], list[nn.Parameter], Any]] = []  # what a step of the optimizer lacks

    def find_norms(self, model: nn.Module) -> None:
        """Find what will be frozen.

        Raises:
            ConfigError: there is nothing.
        """
        norms: list[tuple[str, Any]] = list(find_batch_norms(model))
        self._own = self._others = self._affine = []
        if self._freezes_statistics:
            self._own = [n for _, n in norms if isinstance(n, BatchNorm2d) and n.spec.population != "none"]
            self._others = [n for _, n in norms if not isinstance(n, BatchNorm2d) and n.running_mean is not None]
        if self._freezes_affine:
            owners = [n for _, n in norms] + [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
            found = {p: None for owner in owners for p in owner.parameters() if p.requires_grad}
            self._affine = list(found)
        is_moving = bool(self._others) or not all(norm.spec.has_frozen_statistics for norm in self._own)
        is_first = not self._handles  # a second training may find what the first one froze
        if is_first and not is_moving and not self._affine:
            raise ConfigError(
                f"The model must have a batch norm that is not frozen yet; got {len(norms)} batch norms, none of which "
                f"FreezeNorms would change ({PLACE}.FREEZE in a config). Leave it out."
            )

    def before_train(self) -> None:
        self.find_norms(self.trainer.model)
        self._tell_without_population()
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
        if self.trainer.iter < self._iteration:
            return
        if self.trainer.iter in (self._iteration, self.trainer.start_iter):
            logging.getLogger(__name__).info(
                "Norms are frozen from iteration %d on: the statistics of %d norms (PreciseBN will leave them, too) "
                "and %d affine parameters.",
                self._iteration,
                len(self._own) + len(self._others),
                len(self._affine),
            )
        for norm in self._own:
            if not norm.spec.has_frozen_statistics:
                freeze_norms(norm, "statistics")
        for norm in self._others:
            norm.eval()  # in every iteration: an evaluation puts the whole model into training mode again

    def after_step(self) -> None:
        factor = self.factor(self.trainer.iter)
        if factor < 1 and "lr" in self.trainer.storage.histories():
            rate = self.trainer.storage.history("lr").latest()
            self.trainer.storage.put_scalar("lr", rate * factor, smoothing_hint=False)  # what was used
        if self._freezes_statistics and self.trainer.iter + 1 == self._iteration:
            if self._recompute is not None:
                self._recompute()
            equalize_buffers(self.trainer.model)

    def _tell_without_population(self) -> None:
        if not self._freezes_statistics:
            return
        found = {*self._own, *self._others}
        paths = [path for path, norm in find_batch_norms(self.trainer.model) if norm not in found]
        if paths:
            logging.getLogger(__name__).warning(
                "%d norms have no population statistics to freeze (%s, ...): they go on with their mini-batch.",
                len(paths),
                paths[0],
            )

    def factor(self, iteration: int) -> float:
        """By what the learning rate of the scheduler is multiplied."""
        if iteration < self._iteration:
            return 1.0
        return min(1.0, (iteration - self._iteration + 1) / (self._warmup_iters + 1))

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Gradient clipping nests the steps of two classes, and torch calls the hooks for both.
        if self.trainer.iter < self._iteration or self._kept:
            return
        factor, frozen = self.factor(self.trainer.iter), set(self._affine)
        for group in optimizer.param_groups:
            self._kept.append((group, group["params"], group["lr"]))
            group["params"] = [parameter for parameter in group["params"] if parameter not in frozen]
            group["lr"] = group["lr"] * factor if factor < 1 else group["lr"]

    def _after_optimizer_step(self, *_: Any) -> None:
        # Scheduler and checkpoint see their own rate and all parameters: nothing compounds, a resume needs no state.
        for group, parameters, rate in self._kept:
            group["params"], group["lr"] = parameters, rate
        self._kept = []


class MomentumSchedule(HookBase):
    """Set the momentum of all running statistics in every iteration.

    Args:
        points: (iteration, momentum) pairs, see `bnext.surgery.schedules.interpolate`; torch's sense, in (0, 1].

    Raises:
        ConfigError: no such points; before training, where no norm has a moving average.
    """

    def __init__(self, points: Points) -> None:
        self._points = check_points(points, "points", "momentum", where="MomentumSchedule")

    def apply(self, model: nn.Module, iteration: int) -> None:
        """Set it for one iteration."""
        set_momentum(model, interpolate(self._points, iteration))

    def before_step(self) -> None:
        self.apply(self.trainer.model, self.trainer.iter)


class RenormSchedule(HookBase):
    """Set the limits of Batch Renormalization in every iteration.

    Args:
        r_max_points, d_max_points: (iteration, limit) pairs; None: that limit stays as it is.

    Raises:
        ConfigError: no such points; before training, where no norm has renorm.

    Source:
        Ioffe, *Batch Renormalization*, 2017; `bnext.surgery.schedules.RENORM_R_MAX_POINTS` and `..D_MAX_POINTS`.
    """

    def __init__(self, r_max_points: Points | None = None, d_max_points: Points | None = None) -> None:
        self._points = {
            name: check_points(points, f"{name}_points", name, where="RenormSchedule")
            for name, points in (("r_max", r_max_points), ("d_max", d_max_points))
            if points is not None
        }

    def apply(self, model: nn.Module, iteration: int) -> None:
        """Set them for one iteration."""
        set_renorm_limits(model, **{name: interpolate(points, iteration) for name, points in self._points.items()})

    def before_step(self) -> None:
        self.apply(self.trainer.model, self.trainer.iter)


def are_statistics_frozen(cfg: CfgNode, iteration: int) -> bool:
    """Whether SOLVER.BNEXT.FREEZE holds the population statistics in an iteration."""
    freeze = cfg.SOLVER.BNEXT.FREEZE
    return freeze.WHAT != "affine" and 0 <= freeze.ITER <= iteration


def build_norm_schedules(
    cfg: CfgNode, model: nn.Module, recompute: Callable[[], object] | None = None
) -> list[HookBase]:
    """The hooks that SOLVER.BNEXT asks for.

    Args:
        cfg: SOLVER.BNEXT, SOLVER.MAX_ITER and TEST.EVAL_PERIOD are read.
        model: that they will change; momentum and renorm limits become those of iteration 0.
        recompute: re-estimates population statistics at every TEST.EVAL_PERIOD; also before they are frozen.

    Raises:
        ConfigError: the model has no norm on which one of them would act.
    """
    node, hooks = cfg.SOLVER.BNEXT, []
    if node.FREEZE.ITER >= 0:
        is_done = is_due(node.FREEZE.ITER - 1, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER)
        freeze = FreezeNorms(
            node.FREEZE.ITER, node.FREEZE.WHAT, node.FREEZE.WARMUP_ITERS, None if is_done else recompute
        )
        freeze.find_norms(model)
        hooks.append(freeze)
    if node.MOMENTUM:
        hooks.append(_check_acts(MomentumSchedule(node.MOMENTUM), model, "MOMENTUM"))
    if node.RENORM.R_MAX or node.RENORM.D_MAX:
        renorm = RenormSchedule(node.RENORM.R_MAX or None, node.RENORM.D_MAX or None)
        hooks.append(_check_acts(renorm, model, "RENORM"))
    return hooks


def _check_acts(schedule: MomentumSchedule | RenormSchedule, model: nn.Module, key: str) -> HookBase:
    try:
        schedule.apply(model, 0)
    except ConfigError as error:
        raise ConfigError(f"{PLACE}.{key} must have a norm to act on: {error}") from error
    return schedule

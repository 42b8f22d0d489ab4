"""The optimizer and the schedule of a config: detectron2's SGD, or AdamW, which trains a small detector much faster.

A LazyConfig calls whatever it likes: its `optimizer` and `lr_multiplier`.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.solver import LRMultiplier
from detectron2.solver.build import build_lr_scheduler as build_stock_scheduler
from detectron2.solver.build import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from bnext.config.check import check_values
from bnext.config.keys import KEYS
from bnext.errors import ConfigError
from bnext.lazy_config import copy_node, find_target, is_lazy, name_target

__all__ = ["build_lr_scheduler", "build_optimizer", "check_solver", "name_optimizer"]

_OPTIMIZER = "L(torch.optim.SGD)(params=L(get_default_optimizer_params)(), lr=0.01)"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that SOLVER.OPTIMIZER names, or that a LazyConfig calls.

    Args:
        cfg: SOLVER.* is read; "ADAMW" takes BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, the keys for
            biases and CLIP_GRADIENTS as detectron2's SGD does, and has no use for MOMENTUM and NESTEROV.
        model: its norms' weights and biases get WEIGHT_DECAY_NORM.

    Raises:
        ConfigError: SOLVER.OPTIMIZER is neither.
    """
    if is_lazy(cfg):
        check_solver(cfg)
        node = copy_node(cfg, "optimizer")
        node.params.model = model
        return instantiate(node)

    solver = cfg.SOLVER
    check_values([KEYS["SOLVER.OPTIMIZER"]], {"SOLVER.OPTIMIZER": solver.OPTIMIZER})
    if solver.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)

    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return adamw(parameters, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate: that of SOLVER.*, or the `lr_multiplier` of a LazyConfig."""
    if not is_lazy(cfg):
        return build_stock_scheduler(cfg, optimizer)

    check_solver(cfg)
    multiplier = instantiate(copy_node(cfg, "lr_multiplier"))
    if not isinstance(multiplier, ParamScheduler):
        rule, got = "be a ParamScheduler of fvcore", type(multiplier).__name__
        remedy = "Take L(WarmupParamScheduler)(...), as detectron2's common/coco_schedule.py has it."
        raise ConfigError.of("lr_multiplier", rule, got=got, where=cfg.LAZY.FILE, remedy=remedy)
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=cfg.SOLVER.MAX_ITER)


def check_solver(cfg: CfgNode) -> None:
    """Refuse a LazyConfig that lacks what a training needs.

    Raises:
        ConfigError: it has no `optimizer`, none that takes the model, or no `lr_multiplier`.
    """
    if not is_lazy(cfg):
        return

    node = copy_node(cfg, "optimizer", "for a training", _OPTIMIZER)
    if find_target(node) is None or find_target(node.get("params")) is None:
        rule, remedy = "be a call that takes the model", f"Write it as {_OPTIMIZER}."
        raise ConfigError.of("optimizer.params", rule, got=repr(node.get("params")), where=cfg.LAZY.FILE, remedy=remedy)
    copy_node(cfg, "lr_multiplier", "for a training", "L(WarmupParamScheduler)(...) in common/coco_schedule.py")


def name_optimizer(cfg: CfgNode) -> str:
    """The name of the optimizer of a config, by which a resume knows it again."""
    return name_target(copy_node(cfg, "optimizer")) if is_lazy(cfg) else str(cfg.SOLVER.OPTIMIZER)

"""The optimizer of a config: detectron2's SGD, or AdamW, which trains a small detector from scratch much faster."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from bnext.config.check import check_values
from bnext.config.keys import KEYS

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that SOLVER.OPTIMIZER names.

    Args:
        cfg: SOLVER.* is read; "ADAMW" takes BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, the keys for
            biases and CLIP_GRADIENTS as detectron2's SGD does, and has no use for MOMENTUM and NESTEROV.
        model: its norms' weights and biases get WEIGHT_DECAY_NORM.

    Raises:
        ConfigError: SOLVER.OPTIMIZER is neither.
    """
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

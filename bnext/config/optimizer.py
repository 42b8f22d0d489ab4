"""SOLVER.OPTIMIZER: its values and its check."""

from __future__ import annotations

from detectron2.config import CfgNode

from bnext.errors import check_choice

__all__ = ["OPTIMIZERS", "check_optimizer"]

OPTIMIZERS = ("SGD", "ADAMW")


def check_optimizer(cfg: CfgNode) -> None:
    """Refuse a SOLVER.OPTIMIZER that `build_optimizer` does not know.

    Raises:
        ConfigError: names the value and those that are allowed.
    """
    check_choice("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, OPTIMIZERS, where="config")

"""Config keys of what changes in the norms during a training: SOLVER.BNEXT, its defaults and its check."""

from __future__ import annotations

from typing import get_args

from detectron2.config import CfgNode

from bnext.errors import ConfigError, check_choice
from bnext.surgery.freezing import Freezable
from bnext.surgery.schedules import check_points

__all__ = ["add_schedule_keys", "check_schedules"]

PLACE = "SOLVER.BNEXT"
_FREEZE = {"ITER": -1, "WHAT": "both", "WARMUP_ITERS": 0}


def add_schedule_keys(cfg: CfgNode) -> None:
    """Add SOLVER.BNEXT; its defaults change nothing during a training."""
    cfg.SOLVER.BNEXT = CfgNode()
    cfg.SOLVER.BNEXT.FREEZE = CfgNode()
    # The first iteration with frozen norms, as FrozenBN; -1: never. The paper froze for the last fifth.
    cfg.SOLVER.BNEXT.FREEZE.ITER = _FREEZE["ITER"]
    # What is frozen: population "statistics" (which then normalize in training), "affine", or "both".
    cfg.SOLVER.BNEXT.FREEZE.WHAT = _FREEZE["WHAT"]
    # For so many iterations from ITER on the learning rate rises linearly to that of its schedule.
    cfg.SOLVER.BNEXT.FREEZE.WARMUP_ITERS = _FREEZE["WARMUP_ITERS"]
    # Momentum of the running statistics: [[iteration, value], ...], linear between; []: as the norms have it.
    cfg.SOLVER.BNEXT.MOMENTUM = []
    # Limits of Batch Renormalization, likewise. The paper: [[5000, 1], [40000, 3]] and [[5000, 0], [25000, 5]].
    cfg.SOLVER.BNEXT.RENORM = CfgNode()
    cfg.SOLVER.BNEXT.RENORM.R_MAX = []
    cfg.SOLVER.BNEXT.RENORM.D_MAX = []
    # Virtual BN: so many more images per step, over all workers, are run forward only and enlarge the mini-batches.
    cfg.SOLVER.BNEXT.VIRTUAL_IMAGES = 0


def check_schedules(cfg: CfgNode) -> None:
    """Refuse values of SOLVER.BNEXT that are out of range or would have no effect.

    Raises:
        ConfigError: names the key, its value, and what is allowed.

    Note:
        Whether the model has norms on which they act is checked when its hooks are built.
    """
    node = cfg.SOLVER.BNEXT
    _check_freeze(node.FREEZE, cfg.SOLVER.MAX_ITER)
    for key, points, quantity in (
        ("MOMENTUM", node.MOMENTUM, "momentum"),
        ("RENORM.R_MAX", node.RENORM.R_MAX, "r_max"),
        ("RENORM.D_MAX", node.RENORM.D_MAX, "d_max"),
    ):
        if len(points):
            check_points(points, f"{PLACE}.{key}", quantity, where="config")


def _check_freeze(node: CfgNode, max_iter: int) -> None:
    place = f"{PLACE}.FREEZE"
    check_choice(f"{place}.WHAT", node.WHAT, get_args(Freezable), where="config")
    if not -1 <= node.ITER < max_iter:
        raise ConfigError(
            f"{place}.ITER must be an iteration of the training, 0 to {max_iter - 1}, or -1 for never; got {node.ITER} "
            f"(SOLVER.MAX_ITER is {max_iter}). Freeze earlier, or set -1."
        )
    if node.WARMUP_ITERS < 0:
        raise ConfigError(f"{place}.WARMUP_ITERS must be 0 or more; got {node.WARMUP_ITERS} (config). Use 0 for none.")
    changed = [key for key, default in _FREEZE.items() if node[key] != default]
    if node.ITER == -1 and changed:
        raise ConfigError(
            f"{place}.{changed[0]} must keep its default where nothing is frozen; got {node[changed[0]]!r} "
            f"({place}.ITER is -1). Set {place}.ITER, or remove the key."
        )

"""The line of a training about itself before its first iteration; the config is said by the command line."""

from __future__ import annotations

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from bnext.data.loader import TrainLoader
from bnext.engine.auxiliary import describe_auxiliary

__all__ = ["describe_training"]


def describe_training(cfg: CfgNode, loader: Any, start_iter: int = 0) -> str:
    """The data, the schedule and the auxiliary images in a line.

    Args:
        cfg: DATASETS.TRAIN, SOLVER.IMS_PER_BATCH, MAX_ITER and BNEXT.AUXILIARY are read.
        loader: of the training; of a foreign one the number of images is not known.
        start_iter: the iteration to begin with.
    """
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER
    workers = comm.get_world_size()
    share = f" over {workers} workers" if workers > 1 else ""
    rest = f" from iteration {start_iter:,}" if start_iter else ""

    words = f"Training on {', '.join(cfg.DATASETS.TRAIN)}"
    if isinstance(loader, TrainLoader):
        epochs = batch * steps / max(1, loader.num_images)
        shown = f"{epochs:.1f}" if epochs < 10 else f"{math.floor(epochs):,}"
        words += f": {loader.num_images:,} images, {shown} epochs"
    words += f"; {batch} images a step{share}, {steps:,} steps{rest}."
    return f"{words} {describe_auxiliary(cfg)}".rstrip()

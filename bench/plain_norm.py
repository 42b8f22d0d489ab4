"""BN of one feature map costs what torch's costs; in channels_last it pays for the digits that torch's kernel loses."""

from __future__ import annotations

from functools import partial

from torch import nn

from bench.harness import CHANNELS, IMAGES, Comparison
from bnext import BatchNorm2d

__all__ = ["ROWS"]

ROWS = [
    Comparison(
        "BN",
        "BatchNorm2d",
        IMAGES,
        partial(BatchNorm2d, CHANNELS),
        partial(nn.BatchNorm2d, CHANNELS),
        goals={"NCHW": 1.0, "channels_last": 0.95},
        goal_on_gpu=1.0,
        shows_errors=True,
    )
]

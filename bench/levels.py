"""Several levels as one mini-batch need no concatenation: rows 1 and 6 of Table 5 on an FPN."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, Comparison
from bnext import LevelBatchNorm2d, NormSpec

__all__ = ["ROWS"]

# p3 to p7 of two images of 800 x 1344 pixels
SIDES = {"p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21), "p7": (7, 11)}
PYRAMID = {level: (2, CHANNELS, *side) for level, side in SIDES.items()}


class ConcatenatedBatchNorm(nn.BatchNorm2d):
    """Row 1 as it is usually written: flatten, concatenate, normalize, split."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        flat = [feature.flatten(2) for feature in features.values()]
        normalized = super().forward(torch.cat(flat, dim=2).unsqueeze(-1)).squeeze(-1)
        parts = normalized.split([part.shape[2] for part in flat], dim=2)
        return {level: part.view_as(features[level]) for level, part in zip(features, parts, strict=True)}


class BatchNormPerLevel(nn.ModuleDict):
    """Row 6 as it is usually written: a BatchNorm2d for each level."""

    def __init__(self) -> None:
        super().__init__({level: nn.BatchNorm2d(CHANNELS) for level in PYRAMID})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {level: self[level](feature) for level, feature in features.items()}


def make_row(row: int) -> LevelBatchNorm2d:
    """Ours, of a row of Table 5."""
    return LevelBatchNorm2d(CHANNELS, tuple(PYRAMID), NormSpec.from_table5_row(row))


ROWS = [
    Comparison(
        "row 1, against concatenate, BN, split",
        PYRAMID,
        partial(make_row, 1),
        partial(ConcatenatedBatchNorm, CHANNELS),
        sees_all=True,
        goals={"NCHW": 1.3, "channels_last": 4.0},
        goal_on_gpu=1.6,
        shows_errors=True,
    ),
    Comparison(
        "row 6, against one BatchNorm2d per level",
        PYRAMID,
        partial(make_row, 6),
        BatchNormPerLevel,
        sees_all=True,
        goals={"NCHW": 1.0, "channels_last": 0.95},
    ),
]

"""Several levels as one mini-batch need no concatenation: rows 1 and 6 of Table 5 on an FPN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, Comparison, Features
from bench.memory import PeakMemory
from bnext import LevelBatchNorm2d, NormSpec

__all__ = ["ROWS"]

# p3 to p7 of two images of 800 x 1344 pixels
SIDES = {"p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21), "p7": (7, 11)}
PYRAMID = {level: (2, CHANNELS, *side) for level, side in SIDES.items()}


def concatenate(features: Features) -> Tensor:
    """All positions of all levels: [N, C, positions, 1]."""
    flat = [feature.flatten(2) for feature in features.values()]
    return torch.cat(flat, dim=2).unsqueeze(-1)


def split(positions: Tensor, features: Features) -> Features:
    """The positions of each level, in the shapes of the features."""
    sizes = [feature[0, 0].numel() for feature in features.values()]
    parts = positions.squeeze(-1).split(sizes, dim=2)
    return {level: part.view_as(features[level]) for level, part in zip(features, parts, strict=True)}


class ConcatenatedBatchNorm(nn.BatchNorm2d):
    """Row 1 as it is usually written: flatten, concatenate, normalize, split."""

    def forward(self, features: Features) -> Features:  # type: ignore[override]
        return split(super().forward(concatenate(features)), features)


class BatchNormPerLevel(nn.ModuleDict):
    """Row 6 as it is usually written: a BatchNorm2d for each level."""

    def __init__(self) -> None:
        super().__init__({level: nn.BatchNorm2d(CHANNELS) for level in PYRAMID})

    def forward(self, features: Features) -> Features:
        return {level: self[level](feature) for level, feature in features.items()}


class FourLayers(nn.Module):
    """Four norms, one after the other, each with a ReLU.

    Args:
        make_norm: builds a norm of all levels.
    """

    def __init__(self, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([make_norm() for _ in range(4)])

    def forward(self, features: Features) -> Features:
        for norm in self.norms:
            features = {level: feature.relu() for level, feature in norm(features).items()}
        return features


def make_row(row: int) -> LevelBatchNorm2d:
    """Ours, of a row of Table 5."""
    return LevelBatchNorm2d(CHANNELS, tuple(PYRAMID), NormSpec.from_table5_row(row))


make_row_1 = partial(make_row, 1)
make_concatenated = partial(ConcatenatedBatchNorm, CHANNELS)

ROWS = [
    Comparison(
        "row 1",
        "concatenate, BN, split",
        PYRAMID,
        make_row_1,
        make_concatenated,
        sees_all=True,
        goals={"NCHW": 1.3, "channels_last": 4.0},
        goal_on_gpu=1.6,
        shows_errors=True,
    ),
    Comparison(
        "row 6",
        "a BatchNorm2d per level",
        PYRAMID,
        partial(make_row, 6),
        BatchNormPerLevel,
        sees_all=True,
        goals={"NCHW": 1.0, "channels_last": 0.95},
    ),
    PeakMemory(
        "row 1",
        "concatenate, BN, split",
        PYRAMID,
        make_row_1,
        make_concatenated,
        sees_all=True,
        goal=4.0,
    ),
    PeakMemory(
        "row 1 and ReLU, four times",
        "concatenate, BN, split",
        PYRAMID,
        partial(FourLayers, make_row_1),
        partial(FourLayers, make_concatenated),
        sees_all=True,
        goal=10.0,
    ),
]

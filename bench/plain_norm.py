"""BN of one feature map costs what torch's costs; in channels_last it pays for the digits that torch's kernel loses."""

from __future__ import annotations

from torch import nn

from bench.harness import CHANNELS, Comparison, OnEveryFeature
from bnext import BatchNorm2d

__all__ = ["IMAGES", "list_comparisons"]

IMAGES = {"p4": (16, CHANNELS, 50, 84)}


def list_comparisons() -> list[Comparison]:
    """BN."""
    return [
        Comparison(
            "BN, against BatchNorm2d",
            IMAGES,
            lambda: OnEveryFeature(BatchNorm2d(CHANNELS)),
            lambda: OnEveryFeature(nn.BatchNorm2d(CHANNELS)),
        )
    ]

"""Ghost BN needs no chunks: groups are normalized in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, Comparison, OnEveryFeature
from bench.plain_norm import IMAGES
from bnext import BatchNorm2d, NormSpec

__all__ = ["list_comparisons"]

SIZE = 4


class ChunkedBatchNorm(nn.BatchNorm2d):
    """Ghost BN as it is usually written: chunk, normalize each, concatenate."""

    def forward(self, input: Tensor) -> Tensor:
        normalize = super().forward
        return torch.cat([normalize(chunk) for chunk in input.split(SIZE)])


def list_comparisons() -> list[Comparison]:
    """Ghost BN."""
    spec = NormSpec(normalization_batch_size=SIZE)
    return [
        Comparison(
            "Ghost BN of 4, against chunks",
            IMAGES,
            lambda: OnEveryFeature(BatchNorm2d(CHANNELS, spec)),
            lambda: OnEveryFeature(ChunkedBatchNorm(CHANNELS)),
        )
    ]

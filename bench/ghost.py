"""Ghost BN needs no chunks: groups are normalized in one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, IMAGES, Comparison
from bnext import BatchNorm2d, NormSpec

__all__ = ["ROWS"]

SIZE = 4


class ChunkedBatchNorm(nn.BatchNorm2d):
    """Ghost BN as it is usually written: chunk, normalize each, concatenate."""

    def forward(self, input: Tensor) -> Tensor:
        normalize = super().forward
        return torch.cat([normalize(chunk) for chunk in input.split(SIZE)])


make_ours = partial(BatchNorm2d, CHANNELS, NormSpec(normalization_batch_size=SIZE))

ROWS = [
    Comparison(
        "Ghost BN of 4",
        "chunks, BN, concatenate",
        IMAGES,
        make_ours,
        partial(ChunkedBatchNorm, CHANNELS),
        averages_differ="as of chunks each counts as a mini-batch",
        goals={"NCHW": 1.2, "channels_last": 1.0},
    )
]

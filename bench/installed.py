"""Norms of other packages, where they are installed: the same statistics, without their loops over chunks."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from bench.ghost import SIZE, make_ours
from bench.harness import CHANNELS, IMAGES, Comparison, Peer
from bnext import BatchNorm2d, NormSpec, use_domain

__all__ = ["ROWS"]

HALVES = ("clean", "adversarial")
NUM_IMAGES = IMAGES["p4"][0]


class TwoHalves(nn.Module):
    """Our norm for a batch whose second half is of another domain."""

    def __init__(self) -> None:
        super().__init__()
        spec = NormSpec(domains=HALVES, statistics="per_domain", population="per_domain", affine="per_domain")
        self.norm = BatchNorm2d(CHANNELS, spec)

    def forward(self, input: Tensor) -> Tensor:
        first, second = ((name,) * (NUM_IMAGES // 2) for name in HALVES)
        with use_domain(first + second):
            return self.norm(input)


def make_split() -> nn.Module:
    """timm's norm of a batch in two halves."""
    from timm.layers.split_batchnorm import SplitBatchNorm2d

    return SplitBatchNorm2d(CHANNELS, num_splits=2)


def make_ghost() -> nn.Module:
    """composer's Ghost BN."""
    from composer.functional import apply_ghost_batchnorm

    model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    apply_ghost_batchnorm(model, ghost_batch_size=SIZE)
    return model


ROWS = [
    Comparison(
        "2 halves of a batch",
        "timm's SplitBatchNorm2d",
        IMAGES,
        TwoHalves,
        make_split,
        needs=Peer("timm", "timm"),
    ),
    Comparison(
        f"Ghost BN of {SIZE}",
        "composer's",
        IMAGES,
        make_ours,
        make_ghost,
        averages_differ="as of chunks each counts as a share of a mini-batch",
        needs=Peer("composer", "mosaicml"),
    ),
    Comparison(
        "BN over 2 workers",
        "SyncBatchNorm",
        IMAGES,
        partial(BatchNorm2d, CHANNELS, NormSpec(workers="all")),
        partial(nn.SyncBatchNorm, CHANNELS),
        num_workers=2,
        goal_on_gpu=1.3,
        device="cuda",
    ),
]

"""Shuffle BN without moving a RoI: four norms of a head, whose statistics are dealt out at random.

In one process, dealt to groups, and over two workers against moved features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.harness import CHANNELS, Comparison
from bench.traffic import Traffic
from bnext import BatchNorm2d, NormSpec, Shuffled, deal_statistics
from bnext.functional import deal_samples
from bnext.layers.deal import draw_seed
from bnext.layers.spec import Workers

__all__ = ["ROWS"]

ROIS = {"rois": (512, CHANNELS, 7, 7)}  # of a worker
NUM_NORMS = 4
WORKERS = 2


def make_head(workers: Workers = "one") -> nn.Sequential:
    """Four norms of ours."""
    return nn.Sequential(*(BatchNorm2d(CHANNELS, NormSpec(workers=workers)) for _ in range(NUM_NORMS)))


def make_dealt(workers: Workers, num_groups: int | None = None) -> nn.Sequential:
    """Four norms that are dealt to."""
    head = make_head(workers)
    deal_statistics(head, num_groups)
    return head


def make_plain() -> nn.Sequential:
    """Four norms of torch."""
    return nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(NUM_NORMS)))


def make_moved() -> Shuffled:
    """Four norms on features that are sent to the worker they are dealt to."""
    return Shuffled(make_head())


class GatherAll(torch.autograd.Function):
    """Rows of all workers, as many on each; the gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class GatheringShuffle(nn.Module):
    """Shuffle BN as it is usually written: gather all, take a random share, gather the outputs, take back one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = make_head()

    def forward(self, rows: Tensor) -> Tensor:
        num_workers = dist.get_world_size()
        seed = torch.tensor(draw_seed(), device=rows.device)
        dist.broadcast(seed, src=0)
        groups = deal_samples([len(rows)] * num_workers, num_workers, int(seed))  # ours, so that both are equal
        deal = torch.cat(groups).to(rows.device)

        order = deal.argsort(stable=True)
        share, back = (index.chunk(num_workers)[dist.get_rank()] for index in (order, order.argsort()))
        return GatherAll.apply(self.head(GatherAll.apply(rows)[share]))[back]


NO_DEAL = "as the other does not shuffle; the ratio is the price of a shuffle"
over_workers = partial(
    Comparison,
    shapes=ROIS,
    make_ours=partial(make_dealt, "all"),
    layouts=("NCHW",),
    num_norms=NUM_NORMS,
    num_workers=WORKERS,
)
moving = partial(over_workers, averages_differ="as of moved features each worker counts those that it was dealt")

in_groups = partial(
    Comparison,
    peer="4 BatchNorm2d",
    shapes=ROIS,
    make_ours=partial(make_dealt, "one", 4),
    make_other=make_plain,
    differs=NO_DEAL,
    num_norms=NUM_NORMS,
    goals={"NCHW": 0.95, "channels_last": 0.8},
)

ROWS = [
    in_groups("4 norms dealt to 4 groups"),
    in_groups("4 norms dealt to 4 groups, compiled passes", kernels="compiled", compiles=True),
    moving("4 dealt norms on 2 workers", "gathered features", make_other=GatheringShuffle, goals={"NCHW": 2.5}),
    moving("4 dealt norms on 2 workers", "moved features (Shuffled)", make_other=make_moved),
    over_workers(
        "4 dealt norms on 2 workers", "no shuffle", make_other=make_head, differs=NO_DEAL, goals={"NCHW": 1 / 1.2}
    ),
    Traffic(
        "4 dealt norms",
        "gathered features",
        ROIS,
        partial(make_dealt, "all"),
        GatheringShuffle,
        num_workers=4,
        share=1 / 1000,
    ),
]

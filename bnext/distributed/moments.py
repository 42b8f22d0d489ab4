"""Moments of all workers of a group, merged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bnext.distributed.collectives import all_gather_stacked, all_to_all_rows
from bnext.functional import Moments, merge_moments

__all__ = ["LEAST_OWNERS", "count_rows", "has_owners", "merge_moments_over_workers"]

# Workers from which on each merges a share of the parts for all: fewer bytes, but two collectives instead of one.
LEAST_OWNERS = 16


def merge_moments_over_workers(moments: Moments, group: dist.ProcessGroup | None, where: str = "") -> Moments:
    """The moments of the union of what the workers have seen; one collective, or two where parts have owners.

    Args:
        moments: of this worker, count [...], mean and var [..., C]; of the same shape on every worker. A count of
            0 goes with mean 0 and variance 0.
        group: the workers; None: this one alone.
        where: the norm, for the error.

    Raises:
        WorkerError: another worker has failed, or did not come in time.
    """
    if group is None:
        return moments

    shape = moments.count.shape
    if len(shape) == 1 and has_owners(group.size(), shape[0]):
        return _merge_by_owners(moments, group, where)
    return merge_moments(_unpack(all_gather_stacked(_pack(moments), group, where)))


def has_owners(num_workers: int, num_parts: int) -> bool:
    """Whether the moments of each part go to one worker alone, which merges them: the same answer on all workers.

    Args:
        num_workers: that share moments.
        num_parts: G, of the mini-batch: levels, domains, groups of a deal.
    """
    return num_workers >= LEAST_OWNERS and num_parts >= num_workers


def count_rows(num_workers: int, num_parts: int, *, by_owners: bool) -> int:
    """The rows of 2C + 1 numbers that a worker receives from the others.

        gathered:   (R - 1) G                 grows with R^2 where every worker has a part, as in a deal
        by owners:  2 (R - 1) ceil(G / R)     once from all for its share, once the shares of all, merged

    Args:
        num_workers: R.
        num_parts: G.
        by_owners: whether each part has an owner.
    """
    share = -(-num_parts // num_workers)
    return (num_workers - 1) * (2 * share if by_owners else num_parts)


def _merge_by_owners(moments: Moments, group: dist.ProcessGroup, where: str) -> Moments:
    """Worker r merges parts r K to (r + 1) K - 1 for all; K = ceil(G / R), and parts that are missing are empty."""
    num_workers, num_parts = group.size(), len(moments.count)
    share = -(-num_parts // num_workers)
    sizes = [share] * num_workers

    rows = F.pad(_pack(moments), (0, 0, 0, share * num_workers - num_parts))
    received = all_to_all_rows(rows, sizes, sizes, group, where)
    merged = merge_moments(_unpack(received.unflatten(0, (num_workers, share))))

    every = all_gather_stacked(_pack(merged), group, where)
    return _unpack(every.flatten(0, 1)[:num_parts])


def _pack(moments: Moments) -> Tensor:
    """[..., 2C + 1]."""
    return torch.cat([moments.count.unsqueeze(-1), moments.mean, moments.var], dim=-1)


def _unpack(message: Tensor) -> Moments:
    num_channels = message.shape[-1] // 2
    count, mean, var = message.split([1, num_channels, num_channels], dim=-1)
    return Moments(count.squeeze(-1), mean, var)

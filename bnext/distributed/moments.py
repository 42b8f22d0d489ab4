"""Moments of all workers of a group, merged."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bnext.distributed.collectives import all_gather_stacked
from bnext.functional import Moments, merge_moments

__all__ = ["merge_moments_over_workers"]


def merge_moments_over_workers(moments: Moments, group: dist.ProcessGroup | None, where: str = "") -> Moments:
    """The moments of the union of what the workers have seen; one collective.

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

    num_channels = moments.mean.shape[-1]
    message = torch.cat([moments.count.unsqueeze(-1), moments.mean, moments.var], dim=-1)
    count, mean, var = all_gather_stacked(message, group, where).split([1, num_channels, num_channels], dim=-1)
    return merge_moments(Moments(count.squeeze(-1), mean, var))

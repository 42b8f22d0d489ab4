"""Collectives out of place: the input is never changed, and a missing group is the identity.

They carry no gradient; functions with a backward of their own call them in both directions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_stacked", "all_reduce_sum"]


def all_gather_stacked(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack the tensors of all workers of the group: [R, *tensor.shape], in rank order.

    Note:
        The shape and type must be equal on all workers: send counts beside sums, never rows of
        uneven number.
    """
    if group is None:
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the tensors of all workers of the group."""
    if group is None:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total

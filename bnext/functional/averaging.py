"""The moments of a new mini-batch, taken into running statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.functional.moments import Moments

__all__ = ["update_running_statistics"]


def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Move running statistics towards the moments of a mini-batch, as torch's BatchNorm does.

        running += momentum * (new - running),  with the variance of correction 1

    Args:
        running_mean, running_var: [C].
        moments: count [], mean and var [C] of the mini-batch.
        momentum: weight of the new value, 0 to 1.

    Returns:
        The new running mean and variance [C], in the types of the old ones. Both are the old values
        where the mini-batch has fewer than two elements per channel: one element has no variance.
    """
    # In the wider type: the variance of half features may not fit into half statistics before it is averaged.
    dtype = torch.promote_types(running_mean.dtype, moments.mean.dtype)
    # Not torch.where(..., momentum, 0.0): two Python numbers make a float32, too short for float64 statistics.
    weight = (moments.count >= 2).to(dtype) * momentum
    mean = torch.lerp(running_mean.to(dtype), moments.mean.to(dtype), weight)
    var = torch.lerp(running_var.to(dtype), moments.unbiased_var().to(dtype), weight)
    return mean.to(running_mean.dtype), var.to(running_var.dtype)

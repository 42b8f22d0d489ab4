"""Moments of channels: how many elements, their mean, their variance; and how to merge them.

Everything here merges by Chan's formula. E[x^2] - E[x]^2 is never formed: in float32 it has no
correct digit left once the mean is a thousand standard deviations (it even turns negative).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "batch_moments", "group_moments", "merge_moments"]


class Moments(NamedTuple):
    """Count, mean and variance of some elements, per channel.

    `var` divides by the count (correction 0). A count of zero goes with mean 0 and variance 0.

    Args:
        count: elements per channel, shape [...], in the floating type of `mean`.
        mean: shape [..., C].
        var: shape [..., C].
    """

    count: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    mean: Tensor
    var: Tensor

    def unbiased_var(self) -> Tensor:
        """The variance with correction 1, shape [..., C]; 0 where fewer than two elements were seen."""
        count = self.count.unsqueeze(-1)
        return self.var * (count / (count - 1).clamp(min=1))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half types are kept in float32, of float32 and float64 in their own type."""
    return torch.promote_types(dtype, torch.float32)


def batch_moments(features: Tensor) -> Moments:
    """Moments of each channel over samples and positions, in two passes.

    Args:
        features: [N, C, ...], any memory format, may be empty.

    Returns:
        count [], mean [C], var [C], float32 or wider.

    Note:
        Two passes in channels_last and for half types: torch's one-pass statistics lose the mean in
        channels_last (1e-3 standard deviations at a mean/std ratio of 1,000) and round it in half types.
    """
    dtype = accumulation_dtype(features.dtype)
    num_channels = features.shape[1]
    num_elements = features.numel() // max(num_channels, 1)
    count = torch.full((), num_elements, dtype=dtype, device=features.device)
    if num_elements == 0:
        zeros = torch.zeros(num_channels, dtype=dtype, device=features.device)
        return Moments(count, zeros, zeros.clone())
    if features.is_contiguous() and features.dtype == dtype:
        return Moments(count, *torch.batch_norm_update_stats(features, None, None, 0.0))
    dims = [0, *range(2, features.dim())]
    mean = features.mean(dims, keepdim=True, dtype=dtype)
    var = (features - mean).square_().mean(dims)
    return Moments(count, mean.flatten(), var)


def merge_moments(parts: Moments, dim: int = 0) -> Moments:
    """The moments of the union of parts, by Chan's formula.

        n = sum n_p,  mean = sum (n_p/n) mean_p,  var = sum (n_p/n) (var_p + (mean_p - mean)^2)

    Args:
        parts: count [..., P, ...], mean and var [..., P, ..., C].
        dim: the dimension of `count` that is merged away, counted from the front.

    Returns:
        Moments without that dimension. Parts with count 0 have no influence.

    Source:
        Chan, Golub, LeVeque, *Updating formulae and a pairwise algorithm for computing sample
        variances*, 1979.
    """
    count = parts.count.sum(dim)
    weight = (parts.count / count.unsqueeze(dim).clamp(min=1)).unsqueeze(-1)
    mean = (weight * parts.mean).sum(dim)
    var = (weight * (parts.var + (parts.mean - mean.unsqueeze(dim)).square())).sum(dim)
    return Moments(count, mean, var)


def group_moments(parts: Moments, membership: Tensor) -> Moments:
    """Merge parts into several unions at once.

    Args:
        parts: count [P], mean and var [P, C].
        membership: [B, P], true where part p belongs to union b.

    Returns:
        count [B], mean and var [B, C].
    """
    count = parts.count * membership.to(parts.count.dtype)
    num_unions = membership.shape[0]
    mean = parts.mean.expand(num_unions, *parts.mean.shape)
    var = parts.var.expand(num_unions, *parts.var.shape)
    return merge_moments(Moments(count, mean, var), dim=1)

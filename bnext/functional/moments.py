"""Moments of channels: how many elements, their mean, their variance; and how to merge them.

Everything here merges by Chan's formula. E[x^2] - E[x]^2 is never formed: in float32 it has no
correct digit left once the mean is a thousand standard deviations (it even turns negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Moments",
    "batch_moments",
    "enlarge_parts",
    "group_moments",
    "has_safe_kernel",
    "merge_moments",
    "part_moments",
    "sample_moments",
]


_BLOCK = 64  # rows of channels_last that are averaged at once; the square of it is a piece


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


def has_safe_kernel(features: Tensor) -> bool:
    """Whether torch's statistics of a float32 or float64 tensor [N, C, ...] keep their digits on this device.

    On CPU its channels_last kernel, which it also takes for single positions, adds up row after row.
    """
    return features.is_cuda or (features.is_contiguous() and not features.movedim(1, -1).is_contiguous())


def batch_moments(features: Tensor) -> Moments:
    """Moments of each channel over samples and positions.

    Args:
        features: [N, C, ...], any memory format, may be empty.

    Returns:
        count [], mean [C], var [C], float32 or wider.

    Note:
        torch's own statistics are taken where they are right. On CPU its channels_last kernel adds up row after
        row in float32: at a mean/std ratio of 10,000 the variance of 100,000 rows is off by a factor of
        more than 10. And of half types its results are half types.
    """
    dtype = accumulation_dtype(features.dtype)
    num_channels = features.shape[1]
    num_elements = features.numel() // max(num_channels, 1)
    count = torch.full((), num_elements, dtype=dtype, device=features.device)
    if num_elements == 0:
        zeros = torch.zeros(num_channels, dtype=dtype, device=features.device)
        return Moments(count, zeros, zeros.clone())
    if torch.compiler.is_compiling():  # the kernels below are closed to a compiler; the formula it makes fast itself
        return _formula_moments(features, count)
    rows = features.movedim(1, -1)
    if features.is_cuda or (features.dtype == dtype and has_safe_kernel(features)):
        mean, var = torch.batch_norm_update_stats(features, None, None, 0.0)
        return Moments(count, mean.to(dtype), var.to(dtype))
    if features.dtype == dtype and rows.is_contiguous() and num_elements >= 4 * _BLOCK**2:
        return _row_moments(rows.view(num_elements, num_channels))
    return _formula_moments(features, count)


def _formula_moments(features: Tensor, count: Tensor) -> Moments:
    """Moments as they are defined, in two passes."""
    dims = [0, *range(2, features.dim())]
    mean = features.mean(dims, keepdim=True, dtype=count.dtype)
    var = (features - mean).square_().mean(dims)
    return Moments(count, mean.flatten(), var)


def _row_moments(rows: Tensor) -> Moments:
    """Moments over the rows of [M, C], three readings of a feature in channels_last instead of eight.

    torch's kernel gives the variance about a mean that is somewhat off, piece by piece; another mean, of blocks
    of blocks, is right to the last digits and corrects it.
    """
    num_channels, size = rows.shape[1], _BLOCK**2
    pieces = rows[: len(rows) // size * size].view(-1, _BLOCK, _BLOCK, num_channels)
    mean = pieces.mean(2).mean(1)
    features = pieces.view(-1, 1, size, 1, num_channels).movedim(-1, 2)  # each [1, C, size, 1], in channels_last
    rough = [torch.batch_norm_update_stats(feature, None, None, 0.0) for feature in features]
    rough_mean, rough_var = (torch.stack(field) for field in zip(*rough, strict=True))
    var = (rough_var - (mean - rough_mean).square()).clamp(min=0)
    moments = merge_moments(Moments(mean.new_full((len(pieces),), size), mean, var))
    rest = rows[len(pieces) * size :]
    if len(rest) == 0:
        return moments
    last = batch_moments(rest.t().contiguous().unsqueeze(0))
    return merge_moments(Moments(*(torch.stack(pair) for pair in zip(moments, last, strict=True))))


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


def group_moments(parts: Moments, groups: Tensor, num_groups: int) -> Moments:
    """Merge parts into several unions at once, each part into one of them; by Chan's formula.

    Args:
        parts: count [P], mean and var [P, C].
        groups: [P], the union of each part, 0 to G - 1.
        num_groups: G.

    Returns:
        count [G], mean and var [G, C]; a union without parts has count 0.
    """
    zeros = parts.mean.new_zeros(num_groups, parts.mean.shape[1])
    count = parts.count.new_zeros(num_groups).index_add(0, groups, parts.count)
    weight = (parts.count / count[groups].clamp(min=1)).unsqueeze(-1)
    mean = zeros.index_add(0, groups, weight * parts.mean)
    var = zeros.index_add(0, groups, weight * (parts.var + (parts.mean - mean[groups]).square()))
    return Moments(count, mean, var)


def enlarge_parts(parts: Moments, extra: Sequence[Moments | None]) -> Moments:
    """Merge into each part the moments of other elements; a part without elements of its own stays empty.

    Args:
        parts: count [P], mean and var [P, C].
        extra: P moments, count [], mean and var [C]; None: nothing.
    """
    nothing = Moments(*(torch.zeros_like(field[0]) for field in parts))
    rows = zip(*(own if own is not None else nothing for own in extra), strict=True)
    added = Moments(*(torch.stack(field) for field in rows))
    added = added._replace(count=added.count * (parts.count > 0))
    return merge_moments(Moments(*(torch.stack(pair) for pair in zip(parts, added, strict=True))))


def sample_moments(features: Tensor) -> Moments:
    """Moments of each sample and channel over positions.

    Args:
        features: [N, C, ...], any memory format, may be empty.

    Returns:
        count [N], mean and var [N, C], float32 or wider.
    """
    num_samples, num_channels = features.shape[:2]
    num_positions = features[0, 0].numel() if num_samples and num_channels else 0
    dtype = accumulation_dtype(features.dtype)
    count = torch.full((num_samples,), num_positions, dtype=dtype, device=features.device)
    if num_positions == 0:
        zeros = torch.zeros(num_samples, num_channels, dtype=dtype, device=features.device)
        return Moments(count, zeros, zeros.clone())
    is_plain = features.is_contiguous() and features.dtype == dtype and not torch.compiler.is_compiling()
    if is_plain:  # samples as channels: one pass of torch's kernel
        rows = features.view(1, num_samples * num_channels, *features.shape[2:])
        mean, var = torch.batch_norm_update_stats(rows, None, None, 0.0)
        return Moments(count, mean.view(num_samples, -1), var.view(num_samples, -1))
    dims = list(range(2, features.dim()))
    mean = features.mean(dims, keepdim=True, dtype=dtype)
    var = (features - mean).square_().mean(dims)
    return Moments(count, mean.flatten(1), var)


def part_moments(features: Sequence[Tensor], parts: Sequence[int | Tensor], num_parts: int) -> Moments:
    """Moments of the parts into which the samples of one or several features are sorted.

    Args:
        features: tensors [N_l, C, ...].
        parts: for each feature the part of all its samples, or a tensor [N_l] with that of each sample.
        num_parts: P.

    Returns:
        count [P], mean and var [P, C].
    """
    is_whole = all(isinstance(part, int) for part in parts)
    if is_whole and tuple(parts) == tuple(range(num_parts)):  # nothing to merge
        own = [batch_moments(feature) for feature in features]
        return Moments(*(torch.stack(field) for field in zip(*own, strict=True)))
    found, owners = [], []
    for feature, part in zip(features, parts, strict=True):
        if isinstance(part, Tensor):
            found.append(sample_moments(feature))
            owners.append(part)
        else:
            found.append(Moments(*(field.unsqueeze(0) for field in batch_moments(feature))))
            owners.append(torch.full((1,), part, device=feature.device))
    together = Moments(*(torch.cat(field) for field in zip(*found, strict=True)))
    return group_moments(together, torch.cat(owners), num_parts)

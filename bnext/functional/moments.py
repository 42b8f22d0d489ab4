"""Moments of channels: how many elements, their mean, their variance; how to merge them, and to average over steps.

Everything here merges by Chan's formula. E[x^2] - E[x]^2 is never formed: in float32 it has no
correct digit left once the mean is a thousand standard deviations (it even turns negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext import kernels
from bnext.dispatch import is_exported

__all__ = [
    "Moments",
    "batch_moments",
    "enlarge_parts",
    "find_finite",
    "group_moments",
    "merge_moments",
    "part_moments",
    "sample_moments",
    "stack_parts",
    "sum_groups",
    "update_running_statistics",
]


class Moments(NamedTuple):
    """Count, mean and variance of some elements, per channel.

    `var` divides by the count (correction 0). A count of zero goes with mean 0 and variance 0; an infinite one is that
    of a population, which is known and not measured.

    Args:
        count: elements per channel, shape [...], in the floating type of `mean`.
        mean: shape [..., C].
        var: shape [..., C].
    """

    count: Tensor  # type: ignore[assignment]  # tuple has a method of this name
    mean: Tensor
    var: Tensor

    def unbiased_var(self) -> Tensor:
        """The variance with correction 1, shape [..., C]; 0 where fewer than two elements were seen.

        Of measured elements: an infinite count gives NaN.
        """
        count = self.count.unsqueeze(-1)
        return self.var * (count / (count - 1).clamp(min=1))


def batch_moments(features: Tensor) -> Moments:
    """Moments of each channel over samples and positions.

    Args:
        features: [N, C, ...], any memory format, may be empty.

    Returns:
        count [], mean [C], var [C], float32 or wider.
    """
    mean, var = kernels.feature_statistics([features])
    return Moments(_count_elements(features, mean), mean[0], var[0])


def _count_elements(feature: Tensor, like: Tensor) -> Tensor:
    """Elements per channel of a feature [N, C, ...], [], in the type and on the device of another tensor."""
    num_elements = feature.numel() // max(feature.shape[1], 1)
    return torch.full((), num_elements, dtype=like.dtype, device=like.device)


def sample_moments(features: Tensor) -> Moments:
    """Moments of each sample and channel over positions.

    Args:
        features: [N, C, ...], any memory format, may be empty.

    Returns:
        count [N], mean and var [N, C], float32 or wider.
    """
    mean, var = kernels.sample_statistics([features])
    return Moments(_count_positions(features, mean), mean, var)


def _count_positions(feature: Tensor, like: Tensor) -> Tensor:
    """Positions of each sample of a feature [N, C, ...], [N]."""
    num_positions = feature.numel() // max(feature.shape[0] * feature.shape[1], 1)
    return torch.full(feature.shape[:1], num_positions, dtype=like.dtype, device=like.device)


def part_moments(features: Sequence[Tensor], parts: Sequence[int | Tensor], num_parts: int) -> Moments:
    """Moments of the parts into which the samples of one or several features are sorted.

    Args:
        features: tensors [N_l, C, ...].
        parts: for each feature the part of all its samples, or a tensor [N_l] with that of each sample.
        num_parts: P.

    Returns:
        count [P], mean and var [P, C].
    """
    if kernels.is_one_part_each(parts, num_parts):  # nothing to merge
        return _moments_of_features(features)

    moments: list[Moments] = []
    indices: list[Tensor] = []
    for feature, part in zip(features, parts, strict=True):
        if isinstance(part, int):
            moments.append(_moments_of_features([feature]))
            indices.append(torch.full((1,), part, device=feature.device))

    with_samples = [feature for feature, part in zip(features, parts, strict=True) if isinstance(part, Tensor)]
    if with_samples:
        mean, var = kernels.sample_statistics(with_samples)
        counts = [_count_positions(feature, mean) for feature in with_samples]
        moments.append(Moments(torch.cat(counts), mean, var))
        indices += [part for part in parts if isinstance(part, Tensor)]

    together = Moments(*(torch.cat(fields) for fields in zip(*moments, strict=True)))
    return group_moments(together, torch.cat(indices), num_parts)


def _moments_of_features(features: Sequence[Tensor]) -> Moments:
    """Moments of each feature by itself: count [L], mean and var [L, C]."""
    mean, var = kernels.feature_statistics(features)
    return Moments(torch.stack([_count_elements(feature, mean) for feature in features]), mean, var)


def stack_parts(parts: Sequence[Any]) -> Any:
    """Records of P parts, such as Moments, as one: count [P, ...], mean and var [P, ..., C]."""
    return type(parts[0])(*map(torch.stack, zip(*parts, strict=True)))


def merge_moments(parts: Moments) -> Moments:
    """The moments of the union of parts, by Chan's formula.

        n = sum n_p,  mean = sum (n_p/n) mean_p,  var = sum (n_p/n) (var_p + (mean_p - mean)^2)

    Args:
        parts: count [P, ...], mean and var [P, ..., C].

    Returns:
        Moments without the first dimension. Parts with count 0 have no influence.

    Source:
        Chan, Golub, LeVeque, *Updating formulae and a pairwise algorithm for computing sample
        variances*, 1979.
    """
    count = parts.count.sum(0)
    weight = (parts.count / count.clamp(min=1)).unsqueeze(-1)

    mean = (weight * parts.mean).sum(0)
    var = (weight * (parts.var + (parts.mean - mean).square())).sum(0)

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
    if kernels.joins_features(parts.mean):
        return Moments(*kernels.group_statistics(*parts, groups, num_groups))
    if num_groups == 1:
        return Moments(*(field.unsqueeze(0) for field in merge_moments(parts)))

    count = sum_groups(parts.count, groups, num_groups)
    weight = (parts.count / count[groups].clamp(min=1)).unsqueeze(-1)

    mean = sum_groups(weight * parts.mean, groups, num_groups)
    var = sum_groups(weight * (parts.var + (parts.mean - mean[groups]).square()), groups, num_groups)

    return Moments(count, mean, var)


def sum_groups(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Sums of the rows of each group; of a single one in a fixed order.

    Args:
        values: [P, ...], finite.
        groups: [P], the group of each row, 0 to G - 1.
        num_groups: G.

    Returns:
        [G, ...]; 0 for a group without rows.
    """
    if num_groups == 1:
        return values.sum(0, keepdim=True)
    if not is_exported():
        return values.new_zeros(num_groups, *values.shape[1:]).index_add_(0, groups, values)

    # Not index_add: of rows with the same index ONNX may keep one.
    members = (groups == torch.arange(num_groups, device=groups.device).unsqueeze(1)).to(values.dtype)
    return members @ values


def enlarge_parts(parts: Moments, extra: Sequence[Moments | None]) -> Moments:
    """Merge into each part the moments of other elements; a part without elements of its own stays empty.

    Args:
        parts: count [P], mean and var [P, C].
        extra: P moments, count [], mean and var [C]; None: nothing.
    """
    nothing = Moments(*(torch.zeros_like(field[0]) for field in parts))
    added = stack_parts([nothing if moments is None else moments for moments in extra])
    added = added._replace(count=added.count * (parts.count > 0))
    return merge_moments(stack_parts([parts, added]))


def update_running_statistics(
    running_mean: Tensor, running_var: Tensor, moments: Moments, momentum: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Move running statistics towards the moments of a mini-batch, as torch's BatchNorm does.

        running += momentum * (new - running),  with the variance of correction 1

    Args:
        running_mean, running_var: [C], or of several populations [S, C].
        moments: count [], mean and var [C] of the mini-batch; or of one for each population, [S] and [S, C].
        momentum: weight of the new value, 0 to 1; a number, or for each population one, [S].

    Returns:
        The new running mean and variance, in the types of the old ones. Both are the old values
        where the mini-batch has fewer than two elements per channel: one element has no variance.
    """
    # In the wider type: the variance of half features may not fit into half statistics before it is averaged.
    dtype = torch.promote_types(running_mean.dtype, moments.mean.dtype)
    # Not torch.where(..., momentum, 0.0): two Python numbers make a float32, too short for float64 statistics.
    weight = ((moments.count >= 2).to(dtype) * momentum).unsqueeze(-1)
    mean = torch.lerp(running_mean.to(dtype), moments.mean.to(dtype), weight)
    var = torch.lerp(running_var.to(dtype), moments.unbiased_var().to(dtype), weight)
    return mean.to(running_mean.dtype), var.to(running_var.dtype)


def find_finite(statistics: Sequence[Tensor]) -> Tensor:
    """Whether running statistics have neither inf nor NaN; the host does not wait for it.

    An overflow, whose step AMP's scaler skips, would stay in a moving average for ever.

    Args:
        statistics: mean and variance, [C] each; or those of several populations, [S, C].

    Returns:
        [] or [S] of bool.
    """
    largest = torch.linalg.vector_norm(torch.cat(list(statistics), -1), float("inf"), -1)  # NaN, where there is one
    return largest < float("inf")

"""How moments differ from batch to batch: the standard errors of a population estimate.

The batch is the sampling unit, not the element: the positions of an image resemble one another. Batches count alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnext.functional.moments import Moments

__all__ = ["Spread", "merge_spreads", "spread_of_batch", "standard_errors"]


class Spread(NamedTuple):
    """Two moments of what K batches gave: d_k = mean_k - center and u_k = var_k + d_k^2, over k.

    Args:
        num_batches: K, shape [...].
        center: [..., C]; near the means, so that squares keep their digits.
        first: means of d and u, [..., 2, C].
        second: sums of squares about them, of d d, d u and u u, [..., 3, C].
        unbiased: mean of the variances with correction 1, [..., C].
    """

    num_batches: Tensor
    center: Tensor
    first: Tensor
    second: Tensor
    unbiased: Tensor


def spread_of_batch(moments: Moments) -> Spread:
    """That of a single batch. One of fewer than two elements, which has no variance, counts for nothing.

    Args:
        moments: count [], mean and var [C].
    """
    first = torch.stack([torch.zeros_like(moments.var), moments.var])
    num_batches = (moments.count > 1).to(moments.mean.dtype)
    return Spread(num_batches, moments.mean, first, first.new_zeros(3, first.shape[1]), moments.unbiased_var())


def merge_spreads(parts: Spread) -> Spread:
    """The spread of all batches.

    Args:
        parts: stacked, num_batches [P], center [P, C], ...; those without batches have no influence.
    """
    used = (parts.num_batches > 0).nonzero()
    center = parts.center[used[0, 0]] if len(used) else parts.center[0]
    first, second = _move_center(parts, center)
    total = parts.num_batches.sum()
    share = (parts.num_batches / total.clamp(min=1)).view(-1, 1, 1)
    mean = (share * first).sum(0)
    off_d, off_u = (first - mean).unbind(1)
    apart = torch.stack([off_d * off_d, off_d * off_u, off_u * off_u], dim=1)
    merged = (second + parts.num_batches.view(-1, 1, 1) * apart).sum(0)
    return Spread(total, center, mean, merged, (share[:, :, 0] * parts.unbiased).sum(0))


def _move_center(parts: Spread, center: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments about another center: d' = d + s, u' = u + 2 s d + s^2, with s = own center - center."""
    shift = parts.center - center
    d, u = parts.first.unbind(1)
    dd, du, uu = parts.second.unbind(1)
    first = torch.stack([d + shift, u + 2 * shift * d + shift.square()], dim=1)
    second = torch.stack([dd, du + 2 * shift * dd, uu + 4 * shift * du + 4 * shift.square() * dd], dim=1)
    return first, second


def standard_errors(spread: Spread, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Standard errors of the pooled mean and variance, [C] each; infinite for fewer than two batches.

        s.e.(mean) = sd(mean_k) / sqrt(K),  s.e.(var) = sd(var_k + (mean_k - mean)^2) / sqrt(K)

    Args:
        spread: of the batches, without leading dimensions.
        mean: pooled, [C].
    """
    number = spread.num_batches
    dd, du, uu = spread.second
    delta = mean - spread.center
    scatter = torch.stack([dd, uu - 4 * delta * du + 4 * delta.square() * dd]).clamp(min=0)
    errors = (scatter / ((number - 1).clamp(min=1) * number.clamp(min=1))).sqrt()
    errors = torch.where(number > 1, errors, torch.full_like(errors, float("inf")))
    return errors[0], errors[1]

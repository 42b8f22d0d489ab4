"""Standard errors of a population estimate: moments as they differ from batch to batch.

The batch is the sampling unit, not the element: the positions of an image resemble one another. A batch counts by its
elements, as it does in the pooled moments.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnext.functional.moments import Moments

__all__ = ["Spread", "merge_spreads", "share_of_variance", "spread_of_batch", "standard_errors"]


class Spread(NamedTuple):
    """Two weighted moments of what K batches gave: d_k = mean_k - center and u_k = var_k + d_k^2, weight n_k^2.

    Args:
        num_batches: K, shape [...].
        weight: sum of n_k^2, n_k the elements per channel of a batch, [...].
        center: [..., C]; near the means, so that squares keep their digits.
        first: weighted means of d and u, [..., 2, C].
        second: weighted sums of squares about them, of d d, d u and u u, [..., 3, C].
    """

    num_batches: Tensor
    weight: Tensor
    center: Tensor
    first: Tensor
    second: Tensor


def spread_of_batch(moments: Moments) -> Spread:
    """The spread of a single batch; an empty one counts for nothing.

    Args:
        moments: count [], mean and var [C].
    """
    first = torch.stack([torch.zeros_like(moments.var), moments.var])
    num_batches = (moments.count > 0).to(moments.mean.dtype)
    return Spread(num_batches, moments.count.square(), moments.mean, first, first.new_zeros(3, first.shape[1]))


def merge_spreads(parts: Spread) -> Spread:
    """The spread of all batches.

    Args:
        parts: stacked, num_batches [P], center [P, C], ...; those without batches have no influence.
    """
    used = (parts.num_batches > 0).nonzero()
    center = parts.center[used[0, 0]] if len(used) else parts.center[0]
    first, second = _move_center(parts, center)

    total = parts.weight.sum()
    weight = parts.weight.view(-1, 1, 1)
    mean = (weight / total.clamp(min=1) * first).sum(0)

    off_d, off_u = (first - mean).unbind(1)
    apart = torch.stack([off_d * off_d, off_d * off_u, off_u * off_u], dim=1)
    return Spread(parts.num_batches.sum(), total, center, mean, (second + weight * apart).sum(0))


def _move_center(parts: Spread, center: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments about another center: d' = d + s, u' = u + 2 s d + s^2, with s = old center - center."""
    shift = parts.center - center
    d, u = parts.first.unbind(1)
    dd, du, uu = parts.second.unbind(1)

    first = torch.stack([d + shift, u + 2 * shift * d + shift.square()], dim=1)
    second = torch.stack([dd, du + 2 * shift * dd, uu + 4 * shift * du + 4 * shift.square() * dd], dim=1)
    return first, second


def standard_errors(spread: Spread, total: Moments) -> tuple[Tensor, Tensor]:
    """Standard errors of the pooled mean and variance, [C] each; infinite for fewer than two batches.

        s.e.(mean)^2 = K' / (K' - 1) * sum of (n_k / n)^2 (mean_k - mean)^2
        s.e.(var)^2  = K' / (K' - 1) * sum of (n_k / n)^2 (u_k - var)^2,  u_k = var_k + (mean_k - mean)^2
        K' = n^2 / sum of n_k^2

    With batches of one size K' is K, and these are sd(mean_k) / sqrt(K) and sd(u_k) / sqrt(K).

    Args:
        spread: of the batches, without leading dimensions.
        total: pooled moments of the same batches; count [], mean and var [C].

    Source:
        Cochran, *Sampling Techniques*, 1977, section 6.3 (the variance of a ratio of sums); Kish, *Survey Sampling*,
        1965 (K').
    """
    d, u = spread.first
    dd, du, uu = spread.second
    delta = total.mean - spread.center
    off_d, off_u = d - delta, u - 2 * delta * d + delta.square() - total.var
    of_mean = dd + spread.weight * off_d.square()
    of_var = uu - 4 * delta * du + 4 * delta.square() * dd + spread.weight * off_u.square()
    scatter = torch.stack([of_mean, of_var]).clamp(min=0)

    effective = total.count.square() / spread.weight.clamp(min=1)  # K', so many equal batches would be as good
    errors = (scatter * effective / (effective - 1)).sqrt() / total.count.clamp(min=1)
    errors = torch.where(spread.num_batches > 1, errors, torch.full_like(errors, float("inf")))
    return errors[0], errors[1]


def share_of_variance(num_images: int, population_size: int, batch_size: float = math.inf) -> float:
    """Share of the squared standard errors that is left where the population is a finite set of images.

        m/n (1 - m/N),  m = n mod N

    Of n images, drawn in shuffled passes over N, m belong to the pass that is not over: a whole pass leaves no error.

    Args:
        num_images: n.
        population_size: N.
        batch_size: images that are normalized together before they are measured, the fewest. How they fall into batches
            then is random in a whole pass, too; its share is taken to be min(1, 2 / batch_size). Infinite: none are.

    Note:
        The share of the division into batches is an allowance, not a bound: in the head of a RetinaNet it was 0.06 to
        0.22 with batches of 8, 0.11 to 0.31 with batches of 2, so twice that of a mean is allowed.

    Source:
        Cochran, *Sampling Techniques*, 1977, section 2.6 (the finite population correction); Hoeffding, *A class of
        statistics with asymptotically normal distribution*, 1948 (what is left of a function of several draws is
        smaller by their number).
    """
    if num_images == 0:
        return 1.0

    unfinished = num_images % population_size
    of_images = unfinished / num_images * (1 - unfinished / population_size)
    return of_images + (1 - of_images) * min(1.0, 2 / batch_size)

"""Normalize the features of several levels, each level alone or several as one mini-batch.

Nothing is concatenated: moments are taken per level, merged over levels and workers, and one pass
of scale and shift is made per level. A worker's level and another worker's level are the same kind
of part, so one collective forward and one backward serve all levels of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext.functional.moments import Moments, batch_moments, group_moments, merge_moments

__all__ = ["LevelMoments", "normalize_levels"]

Gather = Callable[[Tensor], Tensor]  # [...] of this worker -> [R, ...] of all workers
Reduce = Callable[[Tensor], Tensor]  # [...] of this worker -> [...] summed over all workers


class LevelMoments(NamedTuple):
    """What a mini-batch has told: moments of each level, and of each mini-batch that normalized.

    Args:
        levels: over all workers; count [L], mean and var [L, C].
        mini_batches: count [B], mean and var [B, C].
    """

    levels: Moments
    mini_batches: Moments


def normalize_levels(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mini_batches: Sequence[int],
    gather: Gather | None = None,
    reduce: Reduce | None = None,
) -> tuple[list[Tensor], LevelMoments]:
    """Normalize every level by the statistics of the mini-batch that it belongs to.

        y_l = weight_l * ((x_l - mean_b) / sqrt(var_b + eps)) + bias_l,  b = mini_batches[l]

    Args:
        features: L tensors [N_l, C, H_l, W_l]; samples and sizes may differ, a level may be empty.
        weight, bias: [L, C]; expand a shared affine to it, its gradients then sum over levels.
        eps: added to the variance, above 0.
        mini_batches: for each level the index of its mini-batch, 0 to B - 1. All zeros share one
            mini-batch, `range(L)` keeps every level apart.
        gather, reduce: collectives over the workers that share the mini-batches; None: this worker.

    Returns:
        L tensors of the shapes, types and memory formats of `features`; and the moments.

    Note:
        Accumulates in float32 or wider. One `gather` of [L, 2C+1] forward, one `reduce` of [2, B, C]
        backward; every worker must make the call, also with empty features. Gradients of `weight`
        and `bias` are those of this worker's loss terms: summing over workers is DDP's work.
        A second derivative is refused.
    """
    num_levels = len(features)
    outputs = _NormalizeLevels.apply(weight, bias, eps, tuple(mini_batches), gather, reduce, *features)
    levels, batches = Moments(*outputs[num_levels : num_levels + 3]), Moments(*outputs[num_levels + 3 :])
    return list(outputs[:num_levels]), LevelMoments(levels, batches)


def _gather_level_moments(features: Sequence[Tensor], gather: Gather | None) -> Moments:
    """Moments of each level over the workers: count [L], mean and var [L, C]."""
    own = [batch_moments(feature) for feature in features]
    levels = Moments(*(torch.stack(field) for field in zip(*own, strict=True)))
    if gather is None:
        return levels
    num_channels = levels.mean.shape[1]
    message = torch.cat([levels.count.unsqueeze(1), levels.mean, levels.var], dim=1)
    count, mean, var = gather(message).split([1, num_channels, num_channels], dim=-1)
    return merge_moments(Moments(count.squeeze(-1), mean, var))


class _NormalizeLevels(torch.autograd.Function):
    """See `normalize_levels`. Saves the features and [L, C] vectors, nothing of the features' size beside."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        mini_batches: tuple[int, ...],
        gather: Gather | None,
        reduce: Reduce | None,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:
        levels = _gather_level_moments(features, gather)
        owner = torch.tensor(mini_batches, device=levels.mean.device)
        membership = torch.arange(max(mini_batches) + 1, device=owner.device).unsqueeze(1) == owner
        batches = group_moments(levels, membership)
        mean = batches.mean[owner]
        rstd = (batches.var[owner] + eps).rsqrt()
        scale, shift = weight.to(rstd.dtype) * rstd, bias.to(rstd.dtype)
        outputs = [_affine(x, mean[i], scale[i], shift[i]) for i, x in enumerate(features)]
        ctx.save_for_backward(weight, mean, rstd, batches.count, owner, membership, *features)
        ctx.reduce = reduce
        ctx.mark_non_differentiable(*levels, *batches)
        return (*outputs, *levels, *batches)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _NormalizeLevels._gradients(ctx, *grads)
        if not torch.is_grad_enabled():  # as always, unless create_graph was asked for
            return gradients
        weight, features = ctx.saved_tensors[0], ctx.saved_tensors[6:]
        return _RefuseSecondDerivative.attach(gradients, [weight, *features, *grads[: len(features)]])

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, rstd, count, owner, membership, *features = ctx.saved_tensors
        grad_outputs = grads[: len(features)]
        sums = [_backward_sums(x, dy, mean[i]) for i, (x, dy) in enumerate(zip(features, grad_outputs, strict=True))]
        sum_dy, sum_dy_xmu = (torch.stack(field) for field in zip(*sums, strict=True))  # [L, C] each
        gamma = weight.to(rstd.dtype)
        totals = torch.stack([gamma * sum_dy, gamma * sum_dy_xmu])  # [2, L, C]
        totals = (membership.to(totals.dtype)[None, :, :, None] * totals.unsqueeze(1)).sum(2)  # [2, B, C]
        if ctx.reduce is not None:  # also where no feature needs a gradient: the others wait for this worker
            totals = ctx.reduce(totals)
        sum_g, sum_g_xmu = (totals / count.clamp(min=1).unsqueeze(1))[:, owner]
        slope, offset = -(rstd.pow(3)) * sum_g_xmu, -rstd * sum_g
        grad_features = [
            _grad_feature(x, dy, mean[i], gamma[i] * rstd[i], slope[i], offset[i])
            for i, (x, dy) in enumerate(zip(features, grad_outputs, strict=True))
        ]
        return (
            (rstd * sum_dy_xmu).to(weight.dtype),
            sum_dy.to(weight.dtype),
            None,
            None,
            None,
            None,
            *grad_features,
        )


class _RefuseSecondDerivative(torch.autograd.Function):
    """Gives gradients back as they are; whoever differentiates them gets an error instead of a wrong number.

    torch's `once_differentiable` does so only where the incoming gradient carries a graph: with a loss
    that is linear in the outputs it would take the gradients for constants, silently.
    """

    @staticmethod
    def attach(gradients: tuple[Tensor | None, ...], sources: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """`gradients`, as a function of `sources` that has no derivative."""
        present = [gradient for gradient in gradients if gradient is not None]
        refusing = iter(_RefuseSecondDerivative.apply(len(present), *present, *sources))
        return tuple(None if gradient is None else next(refusing) for gradient in gradients)

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:num_gradients]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "normalize_levels must be differentiated once; got a second derivative. "
            "Compute gradients of gradients with torch's BatchNorm2d, or on the population statistics (eval mode)."
        )


# The three passes over a feature. torch's own batch norm kernels do each in one go, in both memory formats
# and with float32 accumulation of half types; the plain formula takes two to four passes.


def _affine(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    if feature.numel() == 0:
        return feature.clone()
    return torch.native_batch_norm(feature, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


def _backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy (x - mean), [C] each."""
    if feature.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    ones = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        grad_output, feature, ones, None, None, mean, ones, True, 0.0, [False, True, True]
    )
    return sum_dy, sum_dy_xmu


def _grad_feature(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    grad = _affine(feature.to(mean.dtype), mean, slope, offset)
    return grad.addcmul_(grad_output.to(mean.dtype), scale.view(1, -1, *[1] * (grad.dim() - 2))).to(feature.dtype)

"""Normalize features by the statistics of mini-batches, each sample by those of its own.

Nothing is concatenated and nothing is sorted: moments are taken per part (a level, the samples of a
domain, a group of samples), merged over parts and workers, and one pass of scale and shift is made
per feature. One collective backward serves everything that a layer normalizes in a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnext.functional.moments import Moments

__all__ = ["normalize_parts"]

Reduce = Callable[[Tensor], Tensor]  # [...] of this worker -> [...] summed over all workers
Part = int | Tensor


def normalize_parts(
    features: Sequence[Tensor],
    parts: Sequence[Part],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    statistics: Moments,
    mini_batches: Tensor | None = None,
    reduce: Reduce | None = None,
) -> list[Tensor]:
    """Normalize every sample by the statistics of the mini-batch that its part belongs to.

        y_i = weight_p * ((x_i - mean_b) / sqrt(var_b + eps)) + bias_p,  p = parts[i], b = mini_batches[p]

    Args:
        features: tensors [N_l, C, ...]; samples and sizes may differ, one may be empty.
        parts: for each feature the part of all its samples, or a tensor [N_l] with that of each sample.
        weight, bias: [P, C]; expand a shared affine to it, its gradients then sum over parts.
        eps: added to the variance, above 0.
        statistics: of the mini-batches, count [B], mean and var [B, C], over all workers, as made from these very
            features: gradients flow through them as if they had been computed here. A count of infinity says
            that the statistics are constants, as population statistics are.
        mini_batches: [P], for each part its mini-batch; None: every part is one.
        reduce: sums over the workers that share the mini-batches; None: this worker alone.

    Returns:
        Tensors of the shapes, types and memory formats of `features`.

    Note:
        Accumulates in float32 or wider. One `reduce` of [2, B, C] backward: every worker must make the call,
        also with empty features. Gradients of `weight` and `bias` are those of this worker's loss terms:
        summing over workers is DDP's work. A second derivative is refused.
    """
    mean, rstd = statistics.mean, (statistics.var + eps).rsqrt()
    if mini_batches is not None:
        mean, rstd = mean[mini_batches], rstd[mini_batches]
    return list(
        _NormalizeParts.apply(weight, bias, mean, rstd, statistics.count, mini_batches, parts, reduce, *features)
    )


class _NormalizeParts(torch.autograd.Function):
    """See `normalize_parts`. Saves the features and [P, C] vectors, nothing of the features' size beside."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        count: Tensor,
        mini_batches: Tensor | None,
        parts: Sequence[Part],
        reduce: Reduce | None,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:
        scale, shift = weight.to(rstd.dtype) * rstd, bias.to(rstd.dtype)
        ctx.save_for_backward(weight, mean, rstd, count, mini_batches, *features)
        ctx.parts, ctx.reduce = parts, reduce
        return tuple(_affine(x, mean[p], scale[p], shift[p]) for x, p in zip(features, parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _NormalizeParts._gradients(ctx, grads)
        if not torch.is_grad_enabled():  # as always, unless create_graph was asked for
            return gradients
        weight, features = ctx.saved_tensors[0], ctx.saved_tensors[5:]
        return _RefuseSecondDerivative.attach(gradients, [weight, *features, *grads])

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        weight, mean, rstd, count, mini_batches, *features = ctx.saved_tensors
        triples = list(zip(features, grads, ctx.parts, strict=True))
        sums = _sum_parts([_backward_sums(x, dy, mean[p]) for x, dy, p in triples], ctx.parts, len(mean))  # [2, P, C]
        gamma = weight.to(rstd.dtype)
        totals = gamma * sums
        if mini_batches is not None:
            totals = totals.new_zeros(2, *count.shape, mean.shape[1]).index_add(1, mini_batches, totals)  # [2, B, C]
        if ctx.reduce is not None:  # also where no feature needs a gradient: the others wait for this worker
            totals = ctx.reduce(totals)
        sum_g, sum_g_xmu = totals / count.clamp(min=1).unsqueeze(1)
        if mini_batches is not None:
            sum_g, sum_g_xmu = sum_g[mini_batches], sum_g_xmu[mini_batches]
        scale, slope, offset = gamma * rstd, -(rstd.pow(3)) * sum_g_xmu, -rstd * sum_g
        grad_features = [
            _grad_feature(x, dy, mean[p], scale[p], slope[p], offset[p]) if needed else None
            for (x, dy, p), needed in zip(triples, ctx.needs_input_grad[8:], strict=True)
        ]
        grad_weight, grad_bias = (rstd * sums[1]).to(weight.dtype), sums[0].to(weight.dtype)
        return grad_weight, grad_bias, None, None, None, None, None, None, *grad_features


def _sum_parts(rows: Sequence[Tensor], parts: Sequence[Part], num_parts: int) -> Tensor:
    """Add up vectors of features, [2, C], or of their samples, [2, N, C], by the parts they belong to: [2, P, C]."""
    if all(isinstance(part, int) for part in parts) and tuple(parts) == tuple(range(num_parts)):
        return torch.stack(list(rows), dim=1)
    total = rows[0].new_zeros(2, num_parts, rows[0].shape[-1])
    for row, part in zip(rows, parts, strict=True):
        index = part if isinstance(part, Tensor) else torch.full((1,), part, device=row.device)
        total = total.index_add(1, index, row if isinstance(part, Tensor) else row.unsqueeze(1))
    return total


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
            "normalize_parts must be differentiated once; got a second derivative. "
            "Compute gradients of gradients with a plain batch norm, or on population statistics, one domain at a time."
        )


# The three passes over a feature. torch's own batch norm kernels do each in one go, in both memory formats
# and with float32 accumulation of half types; the plain formula takes two to four passes. Vectors are [C], or
# [N, C] where each sample has its own: the samples of a contiguous feature are then channels to torch's kernels,
# and in channels_last the formula is written out.


def _has_samples_as_channels(feature: Tensor, vector: Tensor) -> bool:
    return vector.dim() == 2 and feature.is_contiguous()


def _merge_samples(feature: Tensor) -> Tensor:
    """[N, C, ...] -> [1, N C, ...]."""
    return feature.reshape(1, -1, *feature.shape[2:])


def _spread(vector: Tensor, feature: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...]."""
    return vector.reshape(*vector.shape, *[1] * (feature.dim() - 2))


def _affine(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    if feature.numel() == 0:
        return feature.clone()
    if _has_samples_as_channels(feature, mean):
        rows = _affine(_merge_samples(feature), mean.flatten(), scale.flatten(), shift.flatten())
        # Not view: what a Function returns as a view must not be changed in place, by a ReLU for example.
        return torch.ops.aten._unsafe_view(rows, feature.shape)
    if mean.dim() == 2:
        normalized = (feature - _spread(mean, feature)).mul_(_spread(scale, feature)).add_(_spread(shift, feature))
        return normalized.to(feature.dtype)
    return torch.native_batch_norm(feature, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


def _backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    if feature.numel() == 0:
        return mean.new_zeros(2, *mean.shape)
    if _has_samples_as_channels(feature, mean):
        rows = _backward_sums(_merge_samples(feature), _merge_samples(grad_output), mean.flatten())
        return rows.view(2, *mean.shape)
    if mean.dim() == 2:
        dims, dy = list(range(2, feature.dim())), grad_output.to(mean.dtype)
        return torch.stack([dy.sum(dims), (dy * (feature - _spread(mean, feature))).sum(dims)])
    ones = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        grad_output, feature, ones, None, None, mean, ones, True, 0.0, [False, True, True]
    )
    return torch.stack([sum_dy, sum_dy_xmu])


def _grad_feature(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    grad = _affine(feature.to(mean.dtype), mean, slope, offset)
    factor = _spread(scale if scale.dim() == 2 else scale.unsqueeze(0), grad)
    return grad.addcmul_(grad_output.to(mean.dtype), factor).to(feature.dtype)

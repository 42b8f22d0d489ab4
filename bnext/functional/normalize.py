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

from bnext import kernels
from bnext.dispatch import is_exported, is_transformed
from bnext.functional.moments import Moments, sum_groups
from bnext.kernels import Part

__all__ = ["normalize_mini_batch", "normalize_parts"]

Reduce = Callable[[Tensor], Tensor]  # [...] of this worker -> [...] summed over all workers


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
            that the statistics are constants, as population statistics are. In a transform of `torch.func`, in
            forward-mode differentiation and in an export they carry their own derivatives.
        mini_batches: [P], for each part its mini-batch; None: every part is one.
        reduce: sums over the workers that share the mini-batches; None: this worker alone.

    Returns:
        Tensors of the shapes, types and memory formats of `features`.

    Note:
        Accumulates in float32 or wider. One `reduce` of [2, B, C] backward: every worker must make the call,
        also with empty features. Gradients of `weight` and `bias` are those of this worker's loss terms:
        summing over workers is DDP's work. A second derivative is refused outside of transforms, as `reduce` is in
        them.
    """
    dtype = torch.promote_types(statistics.mean.dtype, torch.float32)  # a population may be of a half type
    mean, rstd = statistics.mean.to(dtype), (statistics.var.to(dtype) + eps).rsqrt()
    if mini_batches is not None:
        mean, rstd = _take_rows(mean, mini_batches), _take_rows(rstd, mini_batches)

    if is_transformed() or is_exported():  # the operators that are left differentiate themselves
        return _scale_and_shift(weight, bias, mean, rstd, parts, features)

    vectors = weight, bias, mean, rstd, statistics.count
    return list(_NormalizeParts.apply(*vectors, mini_batches, parts, reduce, *features))


def _take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, C], a view where there is one row to take."""
    return values.expand(len(index), -1) if len(values) == 1 else values[index]


def _scale_and_shift(
    weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, parts: Sequence[Part], features: Sequence[Tensor]
) -> list[Tensor]:
    scale, shift = weight.to(rstd.dtype) * rstd, bias.to(rstd.dtype)
    return kernels.scale_and_shift(features, parts, mean, scale, shift)


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
        ctx.save_for_backward(weight, mean, rstd, count, mini_batches, *features)
        ctx.parts, ctx.reduce = parts, reduce

        return tuple(_scale_and_shift(weight, bias, mean, rstd, parts, features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _compute_gradients(ctx, grads)
        if not torch.is_grad_enabled():  # as always, unless create_graph was asked for
            return gradients

        weight, features = ctx.saved_tensors[0], ctx.saved_tensors[5:]
        return _RefuseSecondDerivative.attach(gradients, [weight, *features, *grads])


def _compute_gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradient of every argument of `_NormalizeParts`.

    sum_g_b = sum weight dy,  sum_gx_b = sum weight dy (x - mean)  over all elements of a mini-batch
    dx = weight rstd dy - rstd sum_g / n - rstd^3 (x - mean) sum_gx / n
    """
    weight, mean, rstd, count, mini_batches, *features = ctx.saved_tensors

    part_sums = kernels.backward_sums(features, grads, ctx.parts, mean)
    grad_bias, grad_weight = part_sums[0], rstd * part_sums[1]

    gamma = weight.to(rstd.dtype)
    totals = gamma * part_sums
    if mini_batches is not None and kernels.joins_features(totals):
        totals = kernels.group_sums(totals, mini_batches, len(count))  # [2, B, C]
    elif mini_batches is not None:
        totals = sum_groups(totals.movedim(1, 0), mini_batches, len(count)).movedim(0, 1)
    if ctx.reduce is not None:  # also where no feature needs a gradient: the others wait for this worker
        totals = ctx.reduce(totals)
    averages = totals / count.clamp(min=1).unsqueeze(1)
    if mini_batches is not None and len(count) > 1:
        averages = averages[:, mini_batches]

    scale, slope, offset = gamma * rstd, -(rstd.pow(3)) * averages[1], -rstd * averages[0]
    gradients: list[Tensor | None] = [None] * len(features)
    needed = [index for index, is_needed in enumerate(ctx.needs_input_grad[8:]) if is_needed]
    if needed:
        x, dy, parts = ([things[index] for index in needed] for things in (features, grads, ctx.parts))
        new = kernels.feature_gradients(x, dy, parts, mean, scale, slope, offset)
        for index, gradient in zip(needed, new, strict=True):
            gradients[index] = gradient

    nothing = [None] * 6
    return grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *nothing, *gradients


def normalize_mini_batch(
    feature: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Moments]:
    """Normalize a feature that is a mini-batch by itself, as torch's `batch_norm` does in training.

    Args:
        feature: [N, C, ...], not empty.
        weight, bias: [C]; None: 1 and 0.
        eps: added to the variance, above 0.

    Returns:
        The normalized feature; and the moments of the mini-batch, count [1], mean and var [1, C], constants to the
        gradient.

    Note:
        On a CPU; it can be differentiated twice.
    """
    output, mean, var = _NormalizeMiniBatch.apply(feature, weight, bias, eps)
    count = torch.full((1,), feature.numel() // mean.numel(), dtype=mean.dtype, device=mean.device)
    return output, Moments(count, mean, var)


class _NormalizeMiniBatch(torch.autograd.Function):
    """See `normalize_mini_batch`. The backward pass is torch's kernel, whose derivative torch knows."""

    @staticmethod
    def forward(
        ctx: Any, feature: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = kernels.feature_statistics([feature])
        rstd = (var + eps).rsqrt()
        scale = rstd if weight is None else weight.to(rstd.dtype) * rstd
        shift = torch.zeros_like(mean) if bias is None else bias.to(rstd.dtype).unsqueeze(0)
        (output,) = kernels.scale_and_shift([feature], [0], mean, scale, shift)

        ctx.save_for_backward(feature, weight, mean[0], rstd[0])
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        feature, weight, mean, rstd = ctx.saved_tensors
        grad_output = kernels.in_format_of(feature, grad_output)
        vectors = None if weight is None else weight.to(mean.dtype), None, None, mean, rstd
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(grad_output, feature, *vectors, True, ctx.eps, needed)

        grad_feature, grad_weight, grad_bias = (g if n else None for g, n in zip(gradients, needed, strict=True))
        if weight is not None and weight.dtype != mean.dtype:
            grad_weight, grad_bias = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return grad_feature, grad_weight, grad_bias, None


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
            "Compute gradients of gradients with torch.func (grad of grad, hessian, jvp of grad), with a plain "
            "batch norm, or on population statistics, one domain at a time."
        )

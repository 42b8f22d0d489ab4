"""The passes on CUDA: the kernels of torch's own synchronized batch norm, each of which reads a feature once.

They keep their digits in every type and memory format, wait for nothing, and take vectors in float32 or wider. A norm
that is a mini-batch of its own does not come here, but goes to torch's batch norm as one kernel; groups, shared levels,
domains, several workers and renorm do, and a compiler gets the formula.

Where each sample has its own vector, the samples of a contiguous feature are channels to the kernels. In channels_last
they cannot be: statistics and sums are taken of contiguous copies (2 and 3 launches), and the other passes are written
out (2 to scale and shift, 3 for a gradient), with one intermediate tensor in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnext.kernels.formula import along_channels, as_channels, in_format_of
from bnext.kernels.one_by_one import OneByOne, Part, is_one_part_each

__all__ = [
    "CudaOneByOne",
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "replaces_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]

# Stands in for a scale of 0, by which the gradient's kernel multiplies in the end: what it adds is below all rounding.
_TINY = 2.0**-100


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Always."""
    return True


def replaces_batch_norm(feature: Tensor) -> bool:
    """Never: it keeps its digits, in one kernel each way."""
    return False


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    # Not batch_norm_stats, which gives 1 / sqrt(var + eps): nothing is left of a variance far below eps.
    return torch.batch_norm_update_stats(feature, None, None, 0.0)


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C]."""
    mean, var = feature_statistics(as_channels(feature))
    return mean.view(feature.shape[:2]), var.view(feature.shape[:2])


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    if mean.dim() == 1:  # weight (x - mean) invstd + bias, without the weight
        return torch.batch_norm_elemt(feature, None, shift, mean, scale, 0.0)

    if feature.is_contiguous():
        rows = scale_and_shift(as_channels(feature), mean.flatten(), scale.flatten(), shift.flatten())
        # Not view: what a Function returns as a view must not be changed in place, by a ReLU for example.
        return torch.ops.aten._unsafe_view(rows, feature.shape)

    mean, scale, shift = (along_channels(vector, feature) for vector in (mean, scale, shift))
    return torch.addcmul(shift, feature - mean, scale, out=torch.empty_like(feature))


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    if mean.dim() == 2:
        sums = backward_sums(as_channels(feature), as_channels(grad_output), mean.flatten())
        return sums.view(2, *mean.shape)

    return torch.stack(_launch_sums(feature, grad_output, mean))


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    if mean.dim() == 1 or feature.is_contiguous():
        return _launch_gradient(feature, grad_output, *_prepare_gradient(mean, scale, slope, offset))

    mean, scale, slope, offset = (along_channels(vector, feature) for vector in (mean, scale, slope, offset))
    gradient = feature - mean
    torch.addcmul(offset, gradient, slope, out=gradient)
    return torch.addcmul(gradient, grad_output, scale, out=torch.empty_like(feature))


class CudaOneByOne(OneByOne):
    """The passes over several features; what they have in common is done once."""

    def backward_sums(
        self, features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor
    ) -> Tensor:
        has_empty = any(x.numel() == 0 for x in features)
        if has_empty or not is_one_part_each(parts, len(mean)):
            return super().backward_sums(features, grads, parts, mean)

        pairs = [_launch_sums(*arguments) for arguments in zip(features, grads, mean, strict=True)]
        of_dy, of_dy_xmu = zip(*pairs, strict=True)
        return torch.stack([*of_dy, *of_dy_xmu]).view(2, *mean.shape)

    def feature_gradients(
        self,
        features: Sequence[Tensor],
        grads: Sequence[Tensor],
        parts: Sequence[Part],
        mean: Tensor,
        scale: Tensor,
        slope: Tensor,
        offset: Tensor,
    ) -> list[Tensor]:
        has_own = [isinstance(part, Tensor) and not x.is_contiguous() for x, part in zip(features, parts, strict=True)]
        if any(has_own):
            return super().feature_gradients(features, grads, parts, mean, scale, slope, offset)

        vectors, count = _prepare_gradient(mean, scale, slope, offset)
        gradients = []
        for x, dy, part in zip(features, grads, parts, strict=True):
            gradients.append(_launch_gradient(x, dy, vectors[:, part], count) if x.numel() else x.clone())
        return gradients


def _launch_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """sum dy and sum dy (x - mean), [C] each."""
    # The inverse standard deviation, for which the mean stands here, scales the gradient of a weight; there is none.
    vectors, asked = (mean, mean, None), (True, False, False)
    sums = torch.batch_norm_backward_reduce(in_format_of(feature, grad_output), feature, *vectors, *asked)
    return sums[0], sums[1]


def _prepare_gradient(mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient as torch's kernel has it: weight (dy - sum_dy / count - (x - mean) sum_dy_xmu / count).

    Returns:
        mean, 1, weight, sum_dy and sum_dy_xmu, [5, *mean.shape]; and count, [1].
    """
    weight = scale.abs().clamp(min=_TINY).copysign(scale)
    vectors = torch.stack([mean, torch.ones_like(mean), weight, offset / weight, slope / weight])
    return vectors, torch.full((1,), -1, dtype=torch.int32, device=mean.device)  # -1: both terms are added


def _launch_gradient(feature: Tensor, grad_output: Tensor, vectors: Tensor, count: Tensor) -> Tensor:
    """`vectors`: [5, C], or [5, N, C] beside a contiguous feature."""
    if vectors.dim() == 2:
        grad_output = in_format_of(feature, grad_output)
        mean, ones, weight, sum_dy, sum_dy_xmu = vectors
        return torch.batch_norm_backward_elemt(grad_output, feature, mean, ones, weight, sum_dy, sum_dy_xmu, count)

    rows = _launch_gradient(as_channels(feature), as_channels(grad_output), vectors.flatten(1), count)
    return rows.view(feature.shape)

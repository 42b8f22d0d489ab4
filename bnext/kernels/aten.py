"""The passes by torch's own batch norm kernels, on any device.

They do each in one reading, in both memory formats and with float32 accumulation of half types. Where each sample has
its own vector, the samples of a contiguous feature are channels to them; in channels_last the formula is written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.kernels import formula

__all__ = ["backward_sums", "feature_gradient", "feature_statistics", "sample_statistics", "scale_and_shift"]


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]. On a CPU they are right for some features only, see cpu.py."""
    mean, var = torch.batch_norm_update_stats(feature, None, None, 0.0)
    dtype = formula.accumulation_dtype(feature.dtype)
    return mean.to(dtype), var.to(dtype)


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C]."""
    is_wide = feature.dtype == formula.accumulation_dtype(feature.dtype)
    if not feature.is_contiguous() or not is_wide:
        return formula.sample_statistics(feature)

    mean, var = torch.batch_norm_update_stats(_as_channels(feature), None, None, 0.0)
    return mean.view(feature.shape[:2]), var.view(feature.shape[:2])


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    if mean.dim() == 1:
        return torch.native_batch_norm(feature, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
    if not feature.is_contiguous():
        return formula.scale_and_shift(feature, mean, scale, shift)

    rows = scale_and_shift(_as_channels(feature), mean.flatten(), scale.flatten(), shift.flatten())
    # Not view: what a Function returns as a view must not be changed in place, by a ReLU for example.
    return torch.ops.aten._unsafe_view(rows, feature.shape)


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    if mean.dim() == 2 and not feature.is_contiguous():
        return formula.backward_sums(feature, grad_output, mean)
    if mean.dim() == 2:
        rows = backward_sums(_as_channels(feature), _as_channels(grad_output), mean.flatten())
        return rows.view(2, *mean.shape)

    ones = torch.ones_like(mean)
    _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
        grad_output, feature, ones, None, None, mean, ones, True, 0.0, [False, True, True]
    )
    return torch.stack([sum_dy, sum_dy_xmu])


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    grad = scale_and_shift(feature.to(mean.dtype), mean, slope, offset)
    return formula.add_scaled(grad, grad_output, scale).to(feature.dtype)


def _as_channels(feature: Tensor) -> Tensor:
    """[N, C, ...] -> [1, N C, ...]."""
    return feature.reshape(1, -1, *feature.shape[2:])

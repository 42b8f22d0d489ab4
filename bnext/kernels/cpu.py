"""The passes by torch's own batch norm kernels; they run on any device, and other files take from here what they need.

The kernels do each pass in one reading, in both memory formats and with float32 accumulation of half types. Where each
sample has its own vector, the samples of a contiguous feature are channels to them; in channels_last the formula is
written out.

On a CPU their statistics are wrong for some features. The channels_last kernel, which torch also takes for single
positions, adds up row after row in float32: at a mean/std ratio of 10,000 the variance of 100,000 rows is off by a
factor of more than 10. And of half types its results are half types.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.kernels import formula

__all__ = [
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]

_BLOCK = 64  # rows of channels_last that are averaged at once
_PIECE = _BLOCK**2  # rows whose statistics torch's kernel takes at once


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Whether the feature is float32 or float64 and contiguous, and has several positions."""
    is_wide = feature.dtype in (torch.float32, torch.float64)
    return is_wide and feature.is_contiguous() and not feature.movedim(1, -1).is_contiguous()


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    if has_exact_batch_norm(feature):
        return torch.batch_norm_update_stats(feature, None, None, 0.0)

    rows = feature.movedim(1, -1)
    is_wide = feature.dtype in (torch.float32, torch.float64)
    if is_wide and rows.is_contiguous() and feature.numel() >= 4 * _PIECE * feature.shape[1]:
        return _row_statistics(rows.reshape(-1, feature.shape[1]))

    return formula.feature_statistics(feature)


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


def _row_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the rows of [M, C], three readings of a feature in channels_last instead of eight.

    torch's kernel gives the variance about a mean that is somewhat off, piece by piece; another mean, of blocks of
    blocks, is right to the last digits and corrects it.
    """
    num_channels, num_pieces = rows.shape[1], len(rows) // _PIECE
    pieces, rest = rows.split([num_pieces * _PIECE, len(rows) % _PIECE])

    mean = pieces.view(num_pieces, _BLOCK, _BLOCK, num_channels).mean(2).mean(1)
    features = pieces.view(num_pieces, 1, _PIECE, 1, num_channels).movedim(-1, 2)  # each [1, C, _PIECE, 1]
    rough = [torch.batch_norm_update_stats(feature, None, None, 0.0) for feature in features]
    rough_mean, rough_var = (torch.stack(vectors) for vectors in zip(*rough, strict=True))
    var = (rough_var - (mean - rough_mean).square()).clamp(min=0)

    mean, var = _merge(mean.new_full((num_pieces,), _PIECE), mean, var)
    if len(rest) == 0:
        return mean, var

    rest_mean, rest_var = feature_statistics(rest.t().contiguous().unsqueeze(0))
    counts = mean.new_tensor([len(rows) - len(rest), len(rest)])
    return _merge(counts, torch.stack([mean, rest_mean]), torch.stack([var, rest_var]))


def _merge(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Chan's formula, as in `functional.merge_moments`: counts [P], means and variances [P, C] -> [C] each."""
    weights = (counts / counts.sum()).unsqueeze(-1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return mean, var

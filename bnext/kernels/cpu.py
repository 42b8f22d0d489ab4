"""The passes on a CPU: torch's own kernels but for the statistics of what they get wrong.

torch's channels_last kernel, which it also takes for single positions, adds up row after row in float32: at a mean/std
ratio of 10,000 the variance of 100,000 rows is off by a factor of more than 10. And of half types its results are half
types.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.kernels import aten, formula
from bnext.kernels.aten import backward_sums, feature_gradient, sample_statistics, scale_and_shift  # noqa: F401

_BLOCK = 64  # rows of channels_last that are averaged at once
_PIECE = _BLOCK**2  # rows whose statistics torch's kernel takes at once


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Whether the feature is float32 or float64 and contiguous, and has several positions."""
    is_wide = feature.dtype in (torch.float32, torch.float64)
    return is_wide and feature.is_contiguous() and not feature.movedim(1, -1).is_contiguous()


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    if has_exact_batch_norm(feature):
        return aten.feature_statistics(feature)

    rows = feature.movedim(1, -1)
    is_wide = feature.dtype in (torch.float32, torch.float64)
    if is_wide and rows.is_contiguous() and feature.numel() >= 4 * _PIECE * feature.shape[1]:
        return _row_statistics(rows.reshape(-1, feature.shape[1]))

    return formula.feature_statistics(feature)


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

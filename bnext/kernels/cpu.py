"""The passes over one feature on a CPU, by torch's operators; they run on any device, and other files take from here
what they need.

torch's batch norm kernels do each pass in one reading, in both memory formats. Where each sample has its own vector,
the samples of a contiguous feature are channels to them; in channels_last they get large samples one by one, and of
small ones the formula, in pieces that stay in the caches. Half types, and other formats, get the formula.

Their statistics we take only where they are fast and keep their digits. In NCHW they are right, and three times slower
than ours. In channels_last, a format that single positions have too, the kernel adds up row after row in float32: at a
mean/std ratio of 10,000 the variance of 100,000 rows is off by a factor of more than 10. The sums of the backward pass
are added up likewise, and taken as they are: gradients have no such means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnext.kernels import formula
from bnext.kernels.formula import along_channels, as_channels

__all__ = [
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "replaces_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]

_PIECE = 2**19  # elements of a thread that stay in its caches while several operators go over them
_SHORT = 2**15  # elements of a feature that is not worth several operators
_SMALL_PLANE = 16  # positions; the planes of smaller ones are too short for an operator along them
_WIDTH = 1024  # columns that torch's kernel takes at once: fewer leave it waiting, more leave the first cache
_LINE = 512  # positions of a plane whose squares are added up at once
_SUMMANDS = 512  # rows that a thread adds up one after another


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Whether the feature is float32 or float64 and contiguous, and has several positions."""
    return _is_wide(feature) and feature.is_contiguous() and not _has_rows(feature)


def replaces_batch_norm(feature: Tensor) -> bool:
    """Whether the statistics here are faster than torch's, or right where those are wrong."""
    return _is_wide(feature) and (_has_rows(feature) or (feature.is_contiguous() and not _has_short_planes(feature)))


def _is_wide(feature: Tensor) -> bool:
    return feature.dtype in (torch.float32, torch.float64)


def _has_rows(feature: Tensor) -> bool:
    """Whether the channels of a position lie side by side."""
    return feature.movedim(1, -1).is_contiguous()


# ---- statistics


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    if not _is_wide(feature):
        return formula.feature_statistics(feature)
    if _has_rows(feature):
        return _row_statistics(feature.movedim(1, -1).reshape(-1, feature.shape[1]))
    if not feature.is_contiguous():
        return formula.feature_statistics(feature)
    if _has_short_planes(feature) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return torch.batch_norm_update_stats(feature, None, None, 0.0)

    means, variances = _plane_statistics(feature)
    return _merge([1] * len(feature), means, variances)


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C]."""
    if not _is_wide(feature):
        return formula.sample_statistics(feature)

    if has_exact_batch_norm(feature):
        if not _has_short_planes(feature):
            return _plane_statistics(feature)
        mean, var = torch.batch_norm_update_stats(as_channels(feature), None, None, 0.0)
        return mean.view(feature.shape[:2]), var.view(feature.shape[:2])

    (pieces,) = _split_samples(feature)
    measure = formula.sample_statistics if len(pieces) < len(feature) else feature_statistics
    means, variances = (torch.cat(vectors) for vectors in zip(*map(measure, pieces), strict=True))
    return means.view(feature.shape[:2]), variances.view(feature.shape[:2])


def _has_short_planes(feature: Tensor) -> bool:
    """Whether several operators along the planes of a feature take longer than torch's kernel."""
    return feature.numel() < _SHORT or feature.shape[2:].numel() < _SMALL_PLANE


def _plane_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C] of contiguous planes, each about its own mean."""
    planes = feature.detach().view(-1, feature.shape[2:].numel())
    num_lines = _count_lines(planes.shape[1])
    size = max(1, _PIECE * torch.get_num_threads() // planes.shape[1])
    buffer = planes.new_empty(min(size, len(planes)), planes.shape[1])

    means, squares = [], []
    for piece in planes.split(size):
        mean = piece.mean(1, keepdim=True)
        centered = torch.sub(piece, mean, out=buffer[: len(piece)])
        means.append(mean)
        if num_lines == 0:
            squares.append(centered.square_().sum(1))
        else:
            lengths = torch.linalg.vector_norm(centered.view(-1, planes.shape[1] // num_lines), dim=1)
            squares.append(lengths.square_().view(-1, num_lines).sum(1))

    var = torch.cat(squares).div_(planes.shape[1])
    return torch.cat(means).view(feature.shape[:2]), var.view(feature.shape[:2])


def _count_lines(num_positions: int) -> int:
    """Into how many equal lines a plane is cut, so that the squares of one are added up without losing digits.

    0: into none, as its divisors are too few; torch's sum, which takes longer, keeps the digits of any number.
    """
    num_lines = max(1, num_positions // _LINE)
    while num_positions % num_lines:
        num_lines -= 1
    return num_lines if num_positions <= 8 * _LINE * num_lines else 0


def _row_statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the rows of [M, C], by torch's kernel, from so few of them at once that digits stay."""
    size = _SUMMANDS * torch.get_num_threads()
    if len(rows) <= size:
        return _measure_rows(rows)

    # Several consecutive rows are one of more columns to the kernel, which takes no longer.
    num_channels = rows.shape[1]
    width = max(1, min(len(rows), _WIDTH // num_channels))
    num_rest = len(rows) % width
    long_rows = rows[: len(rows) - num_rest].view(-1, width * num_channels)
    pieces = list(long_rows.chunk(max(1, round(len(long_rows) / size))))
    counts = [len(piece) for piece in pieces for _ in range(width)]
    if num_rest:
        pieces.append(rows[-num_rest:])
        counts.append(num_rest)

    means, variances = zip(*map(_measure_rows, pieces), strict=True)
    return _merge(counts, torch.cat(means).view(-1, num_channels), torch.cat(variances).view(-1, num_channels))


def _measure_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.batch_norm_update_stats(rows.view(1, 1, *rows.shape).movedim(-1, 1), None, None, 0.0)


def _merge(counts: Sequence[int], means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Chan's formula in float64, as in `functional.merge_moments`: P counts, means and variances [P, C] -> [C] each."""
    wide = torch.float64 if means.is_cpu else means.dtype  # which not every device has
    weights = (torch.tensor(counts, dtype=wide, device=means.device) / sum(counts)).unsqueeze(-1)
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return mean.to(means.dtype), var.to(means.dtype)


# ---- the other passes


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    if mean.dim() == 1:
        return torch.native_batch_norm(feature, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
    if feature.is_contiguous():
        rows = scale_and_shift(as_channels(feature), mean.flatten(), scale.flatten(), shift.flatten())
        # Not view: what a Function returns as a view must not be changed in place, by a ReLU for example.
        return torch.ops.aten._unsafe_view(rows, feature.shape)
    if not _is_wide(feature):
        return formula.scale_and_shift(feature, mean, scale, shift)

    output = torch.empty_like(feature)
    for x, y, *vectors in zip(*_split_samples(feature, output, mean, scale, shift), strict=True):
        _scale_into(y, x, *vectors)
    return output


def _scale_into(output: Tensor, feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> None:
    if len(feature) == 1:
        vectors, unused = (scale[0], shift[0], mean[0], torch.ones_like(mean[0])), mean.new_empty(0)
        batch_norm = torch.ops.aten.native_batch_norm.out
        batch_norm(feature, *vectors, False, 0.0, 0.0, out=output, save_mean=unused, save_invstd=unused)
        return

    torch.sub(feature, along_channels(mean, feature), out=output)
    torch.addcmul(along_channels(shift, feature), output, along_channels(scale, feature), out=output)


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    grad_output = formula.in_format_of(feature, grad_output)
    if mean.dim() == 1:
        ones = torch.ones_like(mean)
        _, sum_dy_xmu, sum_dy = torch.ops.aten.native_batch_norm_backward(
            grad_output, feature, ones, None, None, mean, ones, True, 0.0, [False, True, True]
        )
        return torch.stack([sum_dy, sum_dy_xmu])

    if feature.is_contiguous():
        rows = backward_sums(as_channels(feature), as_channels(grad_output), mean.flatten())
        return rows.view(2, *mean.shape)

    triples = list(zip(*_split_samples(feature, grad_output, mean), strict=True))
    if len(triples) < len(feature):
        return torch.cat([formula.backward_sums(*triple) for triple in triples], dim=1)
    return torch.stack([backward_sums(x, dy, vector[0]) for x, dy, vector in triples], dim=1)


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    if mean.dim() == 1 or feature.is_contiguous() or not _is_wide(feature):
        grad = scale_and_shift(feature.to(mean.dtype), mean, slope, offset)
        return formula.add_scaled(grad, grad_output, scale).to(feature.dtype)

    grad = torch.empty_like(feature)
    pieces = _split_samples(feature, grad_output, grad, scale, mean, slope, offset)
    for x, dy, dx, scales, *vectors in zip(*pieces, strict=True):
        _scale_into(dx, x, *vectors)
        formula.add_scaled(dx, dy, scales)
    return grad


def _split_samples(feature: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Pieces of a feature, of one sample or several, that stay in the caches; and those samples of other tensors."""
    size = max(1, _PIECE * torch.get_num_threads() // feature[0].numel())
    return [tensor.split(size) for tensor in (feature, *others)]

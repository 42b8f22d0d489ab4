"""The passes as they are defined, in two to four readings: for a compiler, for a transform of `torch.func`, for shapes
without numbers, and where torch has no kernel.

The first two passes can be differentiated, forward, backward and again, and batched by `torch.func.vmap`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.dispatch import is_transformed

__all__ = [
    "accumulation_dtype",
    "as_channels",
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "in_format_of",
    "sample_statistics",
    "scale_and_shift",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics of half types are kept in float32, of float32 and float64 in their own type."""
    return torch.promote_types(dtype, torch.float32)


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Always: it is asked where no number is computed."""
    return True


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C], in two passes."""
    mean, var = _statistics(feature, [0, *range(2, feature.dim())])
    return mean.flatten(), var


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C], in two passes."""
    mean, var = _statistics(feature.unsqueeze(-1), list(range(2, feature.dim() + 1)))  # [N, C] has a position, too
    return mean.flatten(1), var


def _statistics(feature: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    mean = feature.mean(dims, keepdim=True, dtype=accumulation_dtype(feature.dtype))
    centered = feature - mean
    squares = centered.square() if is_transformed() else centered.square_()
    return mean, squares.mean(dims)


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    centered = feature - along_channels(mean, feature)
    if is_transformed():
        normalized = centered * along_channels(scale, feature) + along_channels(shift, feature)
        return normalized.to(feature.dtype)

    normalized = centered.mul_(along_channels(scale, feature)).add_(along_channels(shift, feature))
    return normalized.to(feature.dtype)


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    dy = grad_output.to(mean.dtype).unsqueeze(-1)
    centered = (feature - along_channels(mean, feature)).unsqueeze(-1)

    dims = list(range(2, dy.dim()))
    if mean.dim() == 1:
        dims.insert(0, 0)

    return torch.stack([dy.sum(dims), (dy * centered).sum(dims)])


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    grad = scale_and_shift(feature.to(mean.dtype), mean, slope, offset)
    return add_scaled(grad, grad_output, scale).to(feature.dtype)


def add_scaled(grad: Tensor, grad_output: Tensor, scale: Tensor) -> Tensor:
    """`grad`, to which scale * dy was added in place."""
    return grad.addcmul_(grad_output.to(grad.dtype), along_channels(scale, grad))


def along_channels(vector: Tensor, feature: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], [N, C] -> [N, C, 1, ...], with the dimensions of the feature."""
    return vector.reshape(-1, *feature.shape[1:2], *[1] * (feature.dim() - 2))


def in_format_of(feature: Tensor, grad_output: Tensor) -> Tensor:
    """A gradient laid out as its feature is, which torch's kernels take for granted.

    They look at formats, where a dimension of size 1 may have any stride, and then go by strides.
    """
    if grad_output.stride() == feature.stride():
        return grad_output
    return torch.empty_like(feature, dtype=grad_output.dtype).copy_(grad_output)


def as_channels(feature: Tensor) -> Tensor:
    """[N, C, ...] -> [1, N C, ...], of channels_last a copy."""
    return feature.reshape(1, -1, *feature.shape[2:])

"""The passes over a feature, by device: tensors in, tensors out; nothing here knows of layers, parts or workers.

A device's file has the functions below, for features that are not empty; a new device is a file like cuda.py and its
row in `_BY_DEVICE`. It may take what it does not do better from cpu.py (torch's own kernels) or formula.py.

Shape letters in this folder: N samples, C channels. A vector of a pass is [C], or [N, C] where each sample has its own.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bnext.dispatch import has_numbers, is_exported_to_onnx, is_traced, is_transformed
from bnext.kernels import cpu, cuda, formula
from bnext.kernels.formula import accumulation_dtype

__all__ = [
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]

_BY_DEVICE = {"cpu": cpu, "cuda": cuda, "meta": formula}  # a device without a row gets the CPU's: right everywhere


def _choose(feature: Tensor, *, fits_any_size: bool = False) -> ModuleType:
    """The passes for a feature.

    What is traced gets the formula, which a compiler makes fast itself and other runtimes have; a transform, as it is
    to differentiate or to batch it; and a feature without numbers, since torch's kernels have no form for shapes alone.

    Args:
        feature: whose device counts.
        fits_any_size: whether the CPU's pass, noted for one size, is right for others.
    """
    is_kept = fits_any_size and _is_traced_for_inference(feature)
    if is_kept or not (is_traced() or is_transformed() or not has_numbers(feature)):
        return _BY_DEVICE.get(feature.device.type, cpu)
    return formula


def _is_traced_for_inference(feature: Tensor) -> bool:
    """Whether torch.jit.trace notes kernels that a CPU runs again."""
    if not torch.jit.is_tracing() or is_exported_to_onnx() or torch.is_grad_enabled():  # type: ignore[attr-defined]
        return False
    return feature.device.type == "cpu" and cpu.has_exact_batch_norm(feature)


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (correction 0) of each channel over samples and positions.

    Args:
        feature: [N, C, ...], any memory format; may be empty.

    Returns:
        Mean and variance [C], float32 or wider; 0 where there is no element.
    """
    if feature.numel() == 0:
        return _zeros(feature, feature.shape[1]), _zeros(feature, feature.shape[1])
    return _choose(feature, fits_any_size=True).feature_statistics(feature)


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (correction 0) of each sample and channel over positions.

    Args:
        feature: [N, C, ...], any memory format; may be empty.

    Returns:
        Mean and variance [N, C], float32 or wider; 0 where there is no position.
    """
    if feature.numel() == 0:
        return _zeros(feature, *feature.shape[:2]), _zeros(feature, *feature.shape[:2])
    return _choose(feature).sample_statistics(feature)


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift.

    Args:
        feature: x, [N, C, ...], any memory format; may be empty.
        mean, scale, shift: [C] or [N, C], float32 or wider.

    Returns:
        A new tensor of the shape, type and memory format of the feature, and no view of another: a ReLU may change it
        in place.
    """
    if feature.numel() == 0:
        return feature.clone()
    return _choose(feature, fits_any_size=mean.dim() == 1).scale_and_shift(feature, mean, scale, shift)


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean), over the elements that share an element of `mean`.

    Args:
        feature: x, [N, C, ...], any memory format; may be empty.
        grad_output: dy, of the same shape.
        mean: [C] or [N, C], float32 or wider.

    Returns:
        [2, C] or [2, N, C], in the type of `mean`.
    """
    if feature.numel() == 0:
        return mean.new_zeros(2, *mean.shape)
    return _choose(feature).backward_sums(feature, grad_output, mean)


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset: the gradient of the feature.

    Args:
        feature: x, [N, C, ...], any memory format; may be empty.
        grad_output: dy, of the same shape.
        mean, scale, slope, offset: [C] or [N, C], float32 or wider.

    Returns:
        A tensor of the shape, type and memory format of the feature.
    """
    if feature.numel() == 0:
        return feature.clone()
    return _choose(feature).feature_gradient(feature, grad_output, mean, scale, slope, offset)


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Whether torch's own `batch_norm` normalizes a feature by its mini-batch without losing digits on this device.

    Args:
        feature: [N, C, ...].
    """
    return _BY_DEVICE.get(feature.device.type, cpu).has_exact_batch_norm(feature)


def _zeros(feature: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=accumulation_dtype(feature.dtype), device=feature.device)

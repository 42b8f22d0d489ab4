"""The passes over one feature, where torch's compiler makes one loop of several operators; the others are the device's.

A CPU needs a C++ compiler for it, a GPU Triton. A pass is compiled when it is first needed, for all sizes: some seconds
for each type, memory format and kind of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bnext.kernels import cpu, cuda, formula

__all__ = [
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "replaces_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]

_LARGE = 2**16  # elements of a sample; its sums are better in the device's kernels, which share the work among threads


def has_exact_batch_norm(feature: Tensor) -> bool:
    return bool(_get_file(feature).has_exact_batch_norm(feature))


def replaces_batch_norm(feature: Tensor) -> bool:
    return bool(_get_file(feature).replaces_batch_norm(feature))


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    return _get_file(feature).feature_statistics(feature)


def sample_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C]."""
    passes = _get_file(feature).sample_statistics if _is_large(feature) else _compile("sample_statistics")
    return passes(feature)


def scale_and_shift(feature: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * (x - mean) + shift, in the type of the feature."""
    return _compile("scale_and_shift")(feature, mean, scale, shift)


def backward_sums(feature: Tensor, grad_output: Tensor, mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean): [2, C], or [2, N, C]."""
    is_device = mean.dim() == 1 or _is_large(feature)
    passes = _get_file(feature).backward_sums if is_device else _compile("backward_sums")
    return passes(feature, grad_output, mean)


def feature_gradient(
    feature: Tensor, grad_output: Tensor, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """scale * dy + slope * (x - mean) + offset, in the type of the feature."""
    return _compile("feature_gradient")(feature, grad_output, mean, scale, slope, offset)


def _get_file(feature: Tensor) -> Any:
    return cuda if feature.is_cuda else cpu


def _is_large(feature: Tensor) -> bool:
    return feature.numel() >= _LARGE * len(feature)


@lru_cache(None)
def _compile(name: str) -> Callable[..., Any]:
    return torch.compile(getattr(formula, name), dynamic=True)

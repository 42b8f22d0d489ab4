"""The passes on CUDA: torch's own kernels, which keep their digits there in every type and memory format.

A norm that is a mini-batch of its own does not come here, but goes to torch's batch norm as one kernel; groups, shared
levels, domains, several workers and renorm do, and a compiler gets the formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext.kernels.cpu import backward_sums, feature_gradient, sample_statistics, scale_and_shift
from bnext.kernels.formula import accumulation_dtype

__all__ = [
    "backward_sums",
    "feature_gradient",
    "feature_statistics",
    "has_exact_batch_norm",
    "replaces_batch_norm",
    "sample_statistics",
    "scale_and_shift",
]


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Always."""
    return True


def replaces_batch_norm(feature: Tensor) -> bool:
    """Never: it keeps its digits, in one kernel each way."""
    return False


def feature_statistics(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C]."""
    mean, var = torch.batch_norm_update_stats(feature, None, None, 0.0)
    dtype = accumulation_dtype(feature.dtype)
    return mean.to(dtype), var.to(dtype)

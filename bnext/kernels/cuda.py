"""The passes on CUDA: torch's own kernels, which keep their digits in every type and memory format.

A norm that is a mini-batch of its own does not come here, but goes to torch's batch norm as one kernel; groups, shared
levels, domains, several workers and renorm do, and a compiler gets the formula.
"""

from __future__ import annotations

from torch import Tensor

from bnext.kernels.aten import (  # noqa: F401  passes of this device
    backward_sums,
    feature_gradient,
    feature_statistics,
    sample_statistics,
    scale_and_shift,
)


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Always."""
    return True

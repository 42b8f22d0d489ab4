"""Every norm that bnext can describe, as a table. A new layer or answer is a new row here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnext.layers import TABLE5_ROWS, LevelBatchNorm2d, NormSpec

__all__ = ["LEVELS", "NUM_CHANNELS", "ROWS", "SPECS", "make_features", "make_norm", "randomize"]

LEVELS = ("p3", "p4", "p5")
NUM_CHANNELS = 4
SIZES = ((2, 6, 5), (2, 3, 3), (2, 2, 1))  # N, H, W of each level
ROWS = tuple(TABLE5_ROWS)
# The six rows, and the two combinations that the paper leaves out; by one worker and by all.
ANSWERS = {**{f"row{row}": cells for row, cells in TABLE5_ROWS.items()}}
ANSWERS["shared_batch_own_affine"] = ("shared", "shared", "per_level")
ANSWERS["shared_batch_own_rest"] = ("shared", "per_level", "per_level")
SPECS = [
    pytest.param(
        NormSpec(statistics=statistics, population=population, affine=affine, workers=workers), id=f"{name}-{workers}"
    )
    for name, (statistics, population, affine) in ANSWERS.items()
    for workers in ("one", "all")
]


def make_features(
    seed: int = 0,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> dict[str, Tensor]:
    """Features per level; every level and channel has a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for index, (level, (n, h, w)) in enumerate(zip(LEVELS, sizes, strict=True)):
        feature = torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64)
        scale = torch.rand(NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) + 0.5 * (index + 1)
        shift = torch.randn(NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) * 2 + index
        features[level] = (feature * scale + shift).to(dtype).requires_grad_(requires_grad)
    return features


def randomize(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Give affine and running statistics values that no default could stand in for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
            else:
                random = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(random + 0.5 if name.endswith(("weight", "running_var")) else random - 0.5)
    return module


def make_norm(spec: NormSpec, dtype: torch.dtype = torch.float64, seed: int = 1) -> LevelBatchNorm2d:
    """A norm of `spec` over LEVELS with random state."""
    norm = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).to(dtype)
    randomize(norm, seed)
    return norm

"""The norms that are checked: every answer of a spec at least once, and the six rows of the paper's Table 5."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain

__all__ = ["CASES", "DTYPES", "LAYOUTS", "Case", "draw_features", "randomize"]

NUM_CHANNELS = 6
LEVELS = ("p3", "p4", "p5", "p6", "p7")
DOMAINS = ("day", "night", "fog")
MIXED = ("night", "day", "night", "fog", "day", "night", "day")
SINGLE = {"x": (7, 9, 5)}  # N, H, W
PYRAMID = {level: (7, side, side + 1) for level, side in zip(LEVELS, (12, 7, 4, 2, 1), strict=True)}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A norm, and what it is called with.

    Args:
        spec: of the norm.
        has_levels: whether it sees the levels of a pyramid, else one feature map.
        active: the domain of all samples or of each.
    """

    spec: NormSpec
    has_levels: bool = False
    active: str | tuple[str, ...] | None = None

    def build(self, num_channels: int = NUM_CHANNELS) -> BatchNorm2d:
        """The norm with random state, the same every time."""
        if self.has_levels:
            norm: BatchNorm2d = LevelBatchNorm2d(num_channels, LEVELS, self.spec)
        else:
            norm = BatchNorm2d(num_channels, self.spec)
        return randomize(norm)

    def draw(self, dtype: torch.dtype, layout: torch.memory_format, ratio: float = 0.5) -> dict[str, Tensor]:
        """Features on a CPU; see `draw_features`."""
        return draw_features(PYRAMID if self.has_levels else SINGLE, dtype, layout, ratio)

    def call(self, norm: nn.Module, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by the names of the features."""
        with use_domain(self.active) if self.active else contextlib.nullcontext():
            return norm(features) if self.has_levels else {"x": norm(features["x"])}


def randomize(norm: Any) -> Any:
    """Give affine and running statistics values that no default could stand in for."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
                continue
            random = torch.rand(value.shape, generator=generator)
            value.copy_(random + 0.5 if name.endswith(("weight", "running_var")) else random - 0.5)
    return norm


def draw_features(
    sizes: dict[str, tuple[int, int, int]], dtype: torch.dtype, layout: torch.memory_format, ratio: float
) -> dict[str, Tensor]:
    """Normal random numbers of standard deviation 2, the same every time.

    Args:
        sizes: N, H, W by name.
        dtype, layout: of the features.
        ratio: of mean and standard deviation.
    """
    generator = torch.Generator().manual_seed(0)
    features = {}
    for name, (n, h, w) in sizes.items():
        feature = 2 * (torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64) + ratio)
        features[name] = feature.to(dtype).contiguous(memory_format=layout)
    return features


_OWN: dict[str, Any] = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
_OF_DOMAINS = {**_OWN, "domains": DOMAINS}
_PAIRS: dict[str, Any] = dict.fromkeys(_OWN, "per_level_and_domain")

CASES = {
    "plain": Case(NormSpec()),
    "ghost": Case(NormSpec(normalization_batch_size=3)),
    "renorm": Case(NormSpec(training="renorm")),
    "population in training": Case(NormSpec(training="population")),
    "cumulative": Case(NormSpec(average="cumulative")),
    "no population": Case(NormSpec(population="none", inference="mini_batch")),
    "mini-batch inference": Case(NormSpec(inference="mini_batch")),
    "no affine": Case(NormSpec(affine="none")),
    "frozen": Case(NormSpec(frozen="both")),
    "one domain": Case(NormSpec(**_OF_DOMAINS), active="night"),
    "domains": Case(NormSpec(**_OF_DOMAINS), active=MIXED),
    "domains, shared affine": Case(NormSpec(**{**_OF_DOMAINS, "affine": "shared"}), active=MIXED),
    "domains, shared statistics": Case(NormSpec(**{**_OF_DOMAINS, "statistics": "shared"}), active=MIXED),
    "domains, renorm": Case(NormSpec(**_OF_DOMAINS, training="renorm"), active=MIXED),
    "domains, ghost": Case(NormSpec(**_OF_DOMAINS, normalization_batch_size=2), active=MIXED),
    **{f"row {row}": Case(NormSpec.from_table5_row(row), has_levels=True) for row in range(1, 7)},
    "shared statistics, own affine": Case(NormSpec(affine="per_level"), has_levels=True),
    "levels, ghost": Case(NormSpec(normalization_batch_size=3), has_levels=True),
    "levels, renorm": Case(NormSpec(training="renorm"), has_levels=True),
    "levels and domains": Case(NormSpec(**_PAIRS, domains=DOMAINS), has_levels=True, active=MIXED),
    "levels of one domain": Case(NormSpec(**_PAIRS, domains=DOMAINS), has_levels=True, active="fog"),
}

"""Domains in one batch need no gathering: every sample is scaled by the statistics of its own, where it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, IMAGES, Comparison
from bnext import BatchNorm2d, NormSpec, use_domain

__all__ = ["COMPARISONS"]

MIXED = ("day", "night", "night", "rain", "day", "snow", "rain", "snow") * 2  # domains of a batch
DOMAINS = ("day", "night", "rain", "snow")


class InMixedBatch(nn.Module):
    """Our norm, told the domain of every sample."""

    def __init__(self) -> None:
        super().__init__()
        spec = NormSpec(domains=DOMAINS, statistics="per_domain", population="per_domain", affine="per_domain")
        self.norm = BatchNorm2d(CHANNELS, spec)

    def forward(self, input: Tensor) -> Tensor:
        with use_domain(MIXED):
            return self.norm(input)


class BatchNormPerDomain(nn.ModuleDict):
    """Statistics of a mixed batch as they are usually written: gather, normalize, scatter, domain by domain."""

    def __init__(self) -> None:
        super().__init__({domain: nn.BatchNorm2d(CHANNELS) for domain in DOMAINS})

    def forward(self, input: Tensor) -> Tensor:
        output = torch.empty_like(input)
        for domain, norm in self.items():
            index = torch.tensor([i for i, name in enumerate(MIXED) if name == domain])
            output = output.index_copy(0, index, norm(input[index]))
        return output


COMPARISONS = [Comparison("4 domains mixed, against gather and scatter", IMAGES, InMixedBatch, BatchNormPerDomain)]

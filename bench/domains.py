"""Domains in one batch need no gathering: every sample is scaled by the statistics of its own, where it is.

What it costs does not grow with the number of domains, at one level or at several.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import CHANNELS, IMAGES, Comparison, Features
from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, use_domain

__all__ = ["ROWS"]

NUM_IMAGES = 16
LEVELS = {
    "p3": (NUM_IMAGES, CHANNELS, 50, 84),
    "p4": (NUM_IMAGES, CHANNELS, 25, 42),
    "p5": (NUM_IMAGES, CHANNELS, 13, 21),
}

GOALS = {2: 3.0, 4: 4.0, 8: 6.0}  # number of domains -> least ratio
SCATTER, CONCATENATE = "gather, BN, scatter in place", "gather, BN, concatenate"


def name_domains(number: int) -> tuple[str, ...]:
    return tuple(f"domain{index}" for index in range(number))


def mix(number: int) -> tuple[str, ...]:
    """The domain of each image of a batch, in no order; of each about as many."""
    names = name_domains(number)
    return tuple(names[(7 * index + index // 3) % number] for index in range(NUM_IMAGES))


class InMixedBatch(nn.Module):
    """Our norm, told the domain of every image."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.names = mix(number)
        spec = NormSpec(
            domains=name_domains(number), statistics="per_domain", population="per_domain", affine="per_domain"
        )
        self.norm = BatchNorm2d(CHANNELS, spec)

    def forward(self, input: Tensor) -> Tensor:
        with use_domain(self.names):
            return self.norm(input)


class BatchNormPerDomain(nn.ModuleDict):
    """Statistics of a mixed batch as they are usually written: gather, normalize, write in place, domain by domain."""

    def __init__(self, number: int) -> None:
        super().__init__({domain: nn.BatchNorm2d(CHANNELS) for domain in name_domains(number)})
        mixed = mix(number)
        for domain in self:
            images = [index for index, name in enumerate(mixed) if name == domain]
            self.register_buffer(f"images_of_{domain}", torch.tensor(images), persistent=False)

    def list_images(self) -> list[Tensor]:
        """Indices of the images of each domain."""
        return [self.get_buffer(f"images_of_{domain}") for domain in self]

    def forward(self, input: Tensor) -> Tensor:
        output = torch.empty_like(input)
        for norm, index in zip(self.values(), self.list_images(), strict=True):
            output[index] = norm(input[index])
        return output


class ConcatenatedPerDomain(BatchNormPerDomain):
    """The same with one concatenation of all outputs, which are then put in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.register_buffer("back", torch.cat(self.list_images()).argsort(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        norms = zip(self.values(), self.list_images(), strict=True)
        outputs = [norm(input[index]) for norm, index in norms]
        return torch.cat(outputs)[self.get_buffer("back")]


class InMixedBatchOfLevels(nn.Module):
    """Our norm over levels, told the domain of every image."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.names, own = mix(number), "per_level_and_domain"
        spec = NormSpec(domains=name_domains(number), statistics=own, population=own, affine=own)  # type: ignore[arg-type]
        self.norm = LevelBatchNorm2d(CHANNELS, tuple(LEVELS), spec)

    def forward(self, features: Features) -> Features:
        with use_domain(self.names):
            return self.norm(features)


class BatchNormPerPair(nn.Module):
    """The usual way at every level, with norms of its own; the one that is faster in NCHW."""

    def __init__(self, number: int) -> None:
        super().__init__()
        by_level = {level: ConcatenatedPerDomain(number) for level in LEVELS}
        for domain in name_domains(number):  # norms in the order of ours
            for level, norms in by_level.items():
                self.add_module(f"{domain}_{level}", norms[domain])
        self.by_level = nn.ModuleDict(by_level)

    def forward(self, features: Features) -> Features:
        return {level: self.by_level[level](feature) for level, feature in features.items()}


def _compare(number: int) -> list[Comparison]:
    name, goal = f"{number} domains mixed", GOALS[number]

    in_one_map = partial(
        Comparison,
        name,
        shapes=IMAGES,
        make_ours=partial(InMixedBatch, number),
        goals={"NCHW": goal, "channels_last": goal},
        goal_on_gpu=4.0,
    )

    at_levels = Comparison(
        f"{name} at 3 levels",
        CONCATENATE,
        LEVELS,
        partial(InMixedBatchOfLevels, number),
        partial(BatchNormPerPair, number),
        sees_all=True,
        layouts=("NCHW",),
    )

    return [
        in_one_map(SCATTER, make_other=partial(BatchNormPerDomain, number)),
        in_one_map(CONCATENATE, make_other=partial(ConcatenatedPerDomain, number)),
        at_levels,
    ]


ROWS = [
    *_compare(2),
    *_compare(4),
    *_compare(8),
    Comparison(
        "8 domains mixed",
        "2 domains mixed",
        IMAGES,
        partial(InMixedBatch, 8),
        partial(InMixedBatch, 2),
        differs="as the domains are others; the ratio is the price of more domains",
        averages_differ="as each domain has its own",
        goals={"NCHW": 0.95, "channels_last": 0.95},
    ),
]

#!/usr/bin/env python
"""Time the level norm against the ways to write it with torch alone: forward and backward, in one process.

    make bench

The variants alternate, so that a change of the machine's speed meets both; the figures are medians of the
ratios of paired runs. `make bench` sets malloc's thresholds: by default glibc returns every large tensor to the
system after each operation, which times the kernel and not the norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from bnext import LevelBatchNorm2d, NormSpec

LEVELS = ("p3", "p4", "p5", "p6", "p7")
Norm = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class ConcatenatedBatchNorm(nn.BatchNorm2d):
    """Row 1 as it is usually written: flatten, concatenate, normalize, split."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        flat = [feature.flatten(2) for feature in features.values()]
        normalized = super().forward(torch.cat(flat, dim=2).unsqueeze(-1)).squeeze(-1)
        parts = normalized.split([part.shape[2] for part in flat], dim=2)
        return {level: part.view_as(features[level]) for level, part in zip(features, parts, strict=True)}


class BatchNormPerLevel(nn.ModuleDict):
    """Row 6 as it is usually written: a BatchNorm2d for each level."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {level: self[level](feature) for level, feature in features.items()}


def make_features(channels_last: bool, batch_size: int, channels: int) -> dict[str, Tensor]:
    """FPN features p3 ... p7 of images of 800 x 1344 pixels."""
    sides = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensors = [torch.randn(batch_size, channels, *side).to(memory_format=layout) for side in sides]
    return {level: tensor.requires_grad_() for level, tensor in zip(LEVELS, tensors, strict=True)}


def time_step(norm: Norm, features: dict[str, Tensor], grads: list[Tensor]) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    torch.autograd.backward(list(norm(features).values()), grads)
    seconds = time.perf_counter() - start
    for feature in features.values():
        feature.grad = None
    return seconds


def compare(ours: Norm, theirs: Norm, features: dict[str, Tensor], runs: int) -> list[str]:
    """Our median milliseconds, theirs, and the median (minimum to maximum) of theirs / ours."""
    grads = [torch.randn_like(feature) for feature in features.values()]
    for norm in (ours, theirs):
        time_step(norm, features, grads)
    pairs = [(time_step(ours, features, grads), time_step(theirs, features, grads)) for _ in range(runs)]
    ratios = sorted(other / own for own, other in pairs)
    own, other = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    return [
        f"{own:.1f}",
        f"{other:.1f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--channels", type=int, default=256)
    args = parser.parse_args(argv)
    cases = {
        (1, "concatenate, BN, split"): ConcatenatedBatchNorm(args.channels),
        (6, "one BatchNorm2d per level"): BatchNormPerLevel({level: nn.BatchNorm2d(args.channels) for level in LEVELS}),
    }
    table = []
    for channels_last in (False, True):
        features = make_features(channels_last, args.batch_size, args.channels)
        for (row, name), theirs in tqdm(cases.items(), desc="channels_last" if channels_last else "NCHW", disable=None):
            ours = LevelBatchNorm2d(args.channels, LEVELS, NormSpec.from_table5_row(row))
            layout = "channels_last" if channels_last else "NCHW"
            table.append([row, layout, name, *compare(ours, theirs, features, args.runs)])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.runs} pairs of runs, float32")
    print(tabulate(table, headers=["row", "layout", "torch alone", "ours, ms", "torch, ms", "torch / ours"]))


if __name__ == "__main__":
    main()

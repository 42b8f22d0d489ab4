#!/usr/bin/env python
"""Time the norms against the ways to write them with torch alone: forward and backward.

    make bench

In one process; shuffle BN also over two workers of this machine.

The variants alternate, so that a change of the machine's speed meets both; the figures are medians of the
ratios of paired runs. `make bench` sets malloc's thresholds: by default glibc returns every large tensor to the
system after each operation, which times the kernel and not the norm.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, Shuffled, deal_statistics, use_domain

LEVELS = ("p3", "p4", "p5", "p6", "p7")
CHANNELS = 256
ROIS = 512  # of a worker
WORKERS = 2
MIXED = ("day", "night", "night", "rain", "day", "snow", "rain", "snow") * 2  # domains of a batch
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


class OnEveryFeature(nn.Module):
    """A norm of one feature map, applied to each."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {level: self.norm(feature) for level, feature in features.items()}


class ChunkedBatchNorm(nn.BatchNorm2d):
    """Ghost BN as it is usually written: chunk, normalize each, concatenate."""

    size = 4

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(ChunkedBatchNorm, self).forward(chunk) for chunk in input.split(self.size)])


class BatchNormPerDomain(nn.ModuleDict):
    """Statistics of a mixed batch as they are usually written: gather, normalize, scatter, domain by domain."""

    def forward(self, input: Tensor) -> Tensor:
        output = torch.empty_like(input)
        for domain, norm in self.items():
            index = torch.tensor([i for i, name in enumerate(MIXED[: len(input)]) if name == domain])
            output = output.index_copy(0, index, norm(input[index]))
        return output


class InMixedBatch(OnEveryFeature):
    """Our norm, told the domain of every sample."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        with use_domain(MIXED[: len(next(iter(features.values())))]):
            return super().forward(features)


class GatherAll(torch.autograd.Function):
    """Rows of all workers, as many on each; the gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(WORKERS)]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        dist.all_reduce(grad)
        return grad.chunk(WORKERS)[dist.get_rank()]


class GatheringShuffle(nn.Module):
    """Shuffle BN as it is usually written: gather all, take a random share, gather the outputs, take back one's own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Tensor) -> Tensor:
        order = torch.randperm(WORKERS * len(rows))
        dist.broadcast(order, src=0)
        share, own = (index.chunk(WORKERS)[dist.get_rank()] for index in (order, order.argsort()))
        return GatherAll.apply(self.module(GatherAll.apply(rows)[share]))[own]


def make_head(workers: str, num_groups: int | None = None) -> nn.Sequential:
    """Four norms, dealt to where statistics are shared or there are groups."""
    head = nn.Sequential(*(BatchNorm2d(CHANNELS, NormSpec(workers=workers)) for _ in range(4)))
    if workers == "all" or num_groups is not None:
        deal_statistics(head, num_groups)
    return head


def make_rois(channels_last: bool) -> dict[str, Tensor]:
    """Pooled features of the RoIs of a worker."""
    return make_features(channels_last, ROIS, {"rois": (7, 7)})


def make_pyramid(channels_last: bool) -> dict[str, Tensor]:
    """FPN features p3 ... p7 of two images of 800 x 1344 pixels."""
    sides = {"p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21), "p7": (7, 11)}
    return make_features(channels_last, 2, sides)


def make_map(channels_last: bool) -> dict[str, Tensor]:
    """One feature map of 16 images."""
    return make_features(channels_last, 16, {"p4": (50, 84)})


def make_features(channels_last: bool, batch_size: int, sides: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Random features [N, 256, H, W]."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shapes = {level: (batch_size, CHANNELS, *side) for level, side in sides.items()}
    return {level: torch.randn(shape).to(memory_format=layout).requires_grad_() for level, shape in shapes.items()}


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


def make_cases() -> list[tuple[str, Callable[[bool], dict[str, Tensor]], Norm, Norm]]:
    """What is compared: name, inputs, ours, torch's."""
    rows = {row: LevelBatchNorm2d(CHANNELS, LEVELS, NormSpec.from_table5_row(row)) for row in (1, 6)}
    per_level = BatchNormPerLevel({level: nn.BatchNorm2d(CHANNELS) for level in LEVELS})
    ghost = BatchNorm2d(CHANNELS, NormSpec(normalization_batch_size=ChunkedBatchNorm.size))
    own = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    domains = tuple(dict.fromkeys(MIXED))
    mixed = InMixedBatch(BatchNorm2d(CHANNELS, NormSpec(domains=domains, **own)))
    per_domain = OnEveryFeature(BatchNormPerDomain({domain: nn.BatchNorm2d(CHANNELS) for domain in domains}))
    dealt = OnEveryFeature(make_head("one", 4))
    four = OnEveryFeature(nn.Sequential(*(nn.BatchNorm2d(CHANNELS) for _ in range(4))))
    plain = (OnEveryFeature(norm) for norm in (BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)))
    return [
        ("BN, against BatchNorm2d", make_map, *plain),
        ("Ghost BN of 4, against chunks", make_map, OnEveryFeature(ghost), OnEveryFeature(ChunkedBatchNorm(CHANNELS))),
        ("4 domains mixed, against gather and scatter", make_map, mixed, per_domain),
        ("4 norms dealt to 4 groups, against 4 BatchNorm2d", make_rois, dealt, four),
        ("row 1, against concatenate, BN, split", make_pyramid, rows[1], ConcatenatedBatchNorm(CHANNELS)),
        ("row 6, against one BatchNorm2d per level", make_pyramid, rows[6], per_level),
    ]


def compare_shuffles(rank: int, store: str, runs: int, rows: list[list[str]]) -> None:
    """What one of the workers does; the first one reports."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORKERS)
    dealt = OnEveryFeature(make_head("all"))
    others = {
        "gathered features": GatheringShuffle(make_head("one")),
        "moved features (Shuffled)": Shuffled(make_head("one")),
        "no shuffle": make_head("one"),
    }
    for name, other in others.items():
        result = compare(dealt, OnEveryFeature(other), make_rois(channels_last=False), runs)
        if rank == 0:
            rows.append([f"4 dealt norms, against {name}", "NCHW", *result])
    dist.barrier()
    dist.destroy_process_group()


def run_workers(runs: int) -> list[list[str]]:
    """Rows of the table for shuffle BN over several workers."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        rows: Any = manager.list()
        mp.spawn(compare_shuffles, (f"file://{folder}/store", runs, rows), nprocs=WORKERS)
        return list(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    args = parser.parse_args(argv)
    table = []
    for name, make_inputs, ours, theirs in tqdm(make_cases(), disable=None):
        for channels_last in (False, True):
            layout = "channels_last" if channels_last else "NCHW"
            table.append([name, layout, *compare(ours, theirs, make_inputs(channels_last), args.runs)])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.runs} pairs of runs, float32")
    print(tabulate(table, headers=["norm", "layout", "ours, ms", "torch, ms", "torch / ours"]))
    print(f"{WORKERS} workers (gloo) with {ROIS} RoIs of {CHANNELS} x 7 x 7 each")
    print(tabulate(run_workers(args.runs), headers=["head", "layout", "ours, ms", "other, ms", "other / ours"]))


if __name__ == "__main__":
    main()

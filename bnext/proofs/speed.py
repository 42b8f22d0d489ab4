"""Speed of norms against the ways to write them with torch alone: forward and backward, in pairs that alternate."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from bnext.distributed import all_reduce_sum, merge_moments_over_workers
from bnext.functional import normalize_parts, part_moments, update_running_statistics
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.proofs.cases import LAYOUTS
from bnext.proofs.check import Check
from bnext.proofs.uses import in_world_of_one
from bnext.scope import use_domain

__all__ = ["list_checks_of_speed"]

C = 256
# p3 to p7 of images of 800 x 1344 pixels.
SIDES = {"p3": (100, 168), "p4": (50, 84), "p5": (25, 42), "p6": (13, 21), "p7": (7, 11)}
NUM_PAIRS = 21  # of runs, after a warm-up
DOMAINS = ("day", "night", "fog", "rain")
Features = dict[str, Tensor]
Arms = tuple[Callable[[Features], Any], Callable[[Features], Any]]  # ours, and the other


def list_checks_of_speed(device: torch.device) -> list[Check]:
    """In both memory formats, on a GPU in two types; the limits are what is wanted there."""
    checks = []
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        for layout in LAYOUTS:
            for name, (make, goal) in _COMPARISONS.items():
                if make is _make_synchronized and device.type != "cuda":
                    continue  # torch's needs one
                measure = partial(_measure, make, dtype, layout)
                checks.append(Check("speed", f"{name}, {str(dtype)[6:]}, {layout}", measure, goal, is_goal=True))
    return checks


def _measure(
    make: Callable[[torch.device], tuple[Features, Arms]], dtype: torch.dtype, layout: str, device: torch.device
) -> float:
    """The median of the ratios of pairs, other by ours."""
    features, arms = make(device)
    features = {name: x.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for name, x in features.items()}
    inputs = {name: feature.requires_grad_() for name, feature in features.items()}
    grads = [torch.randn_like(feature) for feature in inputs.values()]

    def run(arm: Callable[[Features], Any]) -> None:
        torch.autograd.backward(list(arm(inputs).values()), grads)
        for feature in inputs.values():
            feature.grad = None

    ratios = []
    with in_world_of_one(device) if make is _make_synchronized else contextlib.nullcontext():
        for index in range(NUM_PAIRS + 3):
            ours, other = (_time(partial(run, arm), device) for arm in arms)
            if index >= 3:
                ratios.append(other / ours)
    return statistics.median(ratios)


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds, of the device where it has a clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# ---- row 1 of Table 5


class _Concatenated(nn.BatchNorm2d):
    """Several levels as one mini-batch, as it is usually written."""

    def forward(self, features: Features) -> Features:  # type: ignore[override]
        flat = [feature.flatten(2) for feature in features.values()]
        normalized = super().forward(torch.cat(flat, dim=2).unsqueeze(-1)).squeeze(-1)
        parts = normalized.split([part.shape[2] for part in flat], dim=2)
        return {level: part.view_as(features[level]) for level, part in zip(features, parts, strict=True)}


def _make_pyramid(device: torch.device) -> tuple[Features, Arms]:
    number = 8 if device.type == "cuda" else 1
    features = {level: torch.randn(number, C, *side, device=device) for level, side in SIDES.items()}
    ours = LevelBatchNorm2d(C, tuple(SIDES), NormSpec.from_table5_row(1)).to(device)
    return features, (ours, _Concatenated(C).to(device))


# ---- one mini-batch of all workers


class _Synchronized(nn.BatchNorm2d):
    """Ours over all workers also where there is one: what `BatchNorm2d` does, with both collectives."""

    def forward(self, input: Tensor) -> Tensor:
        group = dist.group.WORLD
        with torch.no_grad():
            moments = merge_moments_over_workers(part_moments([input], [0], 1), group)
        weight, bias = self.weight.unsqueeze(0), self.bias.unsqueeze(0)
        reduce = partial(all_reduce_sum, group=group)
        (output,) = normalize_parts([input], [0], weight, bias, self.eps, moments, None, reduce)

        old = self.running_mean.unsqueeze(0), self.running_var.unsqueeze(0)  # type: ignore[union-attr]
        new = update_running_statistics(*old, moments, self.momentum or 0.0)
        for buffer, value in zip((self.running_mean, self.running_var), new, strict=True):
            buffer.copy_(value[0])  # type: ignore[union-attr]
        return output


class _SynchronizedByTorch(nn.BatchNorm2d):
    """`nn.SyncBatchNorm`, which for one worker alone would do without collectives."""

    def forward(self, input: Tensor) -> Tensor:
        state = self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum
        return TorchSyncBatchNorm.apply(input, *state, dist.group.WORLD, 1)


def _make_synchronized(device: torch.device) -> tuple[Features, Arms]:
    features = {"x": torch.randn(16, C, 50, 84, device=device)}
    ours, other = _Synchronized(C).to(device), _SynchronizedByTorch(C).to(device)
    return features, (_apply(ours), _apply(other))


def _apply(norm: nn.Module) -> Callable[[Features], Features]:
    return lambda features: {"x": norm(features["x"])}


# ---- domains in one batch


class _Loop(nn.ModuleDict):
    """Statistics of a mixed batch as they are usually written: gather, normalize, scatter, domain by domain."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        super().__init__({domain: nn.BatchNorm2d(C) for domain in DOMAINS})
        self.images = {}
        for domain in DOMAINS:
            images = [index for index, name in enumerate(names) if name == domain]
            self.images[domain] = torch.tensor(images, device=device)

    def forward(self, features: Features) -> Features:
        input, output = features["x"], torch.empty_like(features["x"])
        for domain, norm in self.items():
            index = self.images[domain]
            output = output.index_copy(0, index, norm(input[index]))
        return {"x": output}


def _make_domains(device: torch.device) -> tuple[Features, Arms]:
    number = 16 if device.type == "cuda" else 8
    names = tuple(DOMAINS[(7 * index + index // 3) % len(DOMAINS)] for index in range(number))
    owned: dict[str, Any] = dict.fromkeys(("statistics", "population", "affine"), "per_domain")
    norm = BatchNorm2d(C, NormSpec(domains=DOMAINS, **owned)).to(device)

    def ours(features: Features) -> Features:
        with use_domain(names):
            return {"x": norm(features["x"])}

    return {"x": torch.randn(number, C, 50, 84, device=device)}, (ours, _Loop(names, device).to(device))


# What is compared -> how both arms are made, and how many times as fast is wanted.
_COMPARISONS: dict[str, tuple[Callable[[torch.device], tuple[Features, Arms]], float]] = {
    "row 1 by concatenate, BN, split": (_make_pyramid, 1.6),
    "SyncBN by torch's SyncBatchNorm": (_make_synchronized, 1.3),
    "4 domains mixed by a loop": (_make_domains, 4.0),
}

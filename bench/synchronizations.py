"""Waits of the host in a step on a GPU, counted: torch tells each time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bench.domains import SCATTER, BatchNormPerDomain, InMixedBatch
from bench.harness import IMAGES, Arm, Setting, Shapes, draw_features
from bench.levels import PYRAMID, make_concatenated, make_row_1
from bench.record import LeftOut, Quantity, Result

__all__ = ["ROWS", "Synchronizations"]


@dataclass(frozen=True)
class Synchronizations:
    """Times that the host waits for the GPU in one forward and backward.

    Args:
        name, peer: of ours and of the other.
        shapes, make_ours, make_other, sees_all: see `Comparison`.
    """

    name: str
    peer: str
    shapes: Shapes
    make_ours: Callable[[], nn.Module]
    make_other: Callable[[], nn.Module]
    sees_all: bool = False

    def run(self, setting: Setting) -> list[Result]:
        """One quantity, of which ours is to be 0; a first step, which may prepare things, is not counted."""
        if setting.device != "cuda":
            return [LeftOut(self.name, self.peer, "it needs --device cuda")]

        features, grads = (draw_features(self.shapes, "NCHW", setting.device) for _ in range(2))
        arms = [Arm(make(), features, grads, self.sees_all) for make in (self.make_ours, self.make_other)]
        ours, other = (_count(arm.step) for arm in arms)
        return [Quantity(self.name, self.peer, "NCHW", "waits", ours, other, goal=0)]


def _count(step: Callable[[], None]) -> int:
    step()
    torch.cuda.synchronize()

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in said)


ROWS = [
    Synchronizations(
        "waits for the GPU in row 1", "concatenate, BN, split", PYRAMID, make_row_1, make_concatenated, True
    ),
    Synchronizations(
        "waits for the GPU with 4 domains mixed",
        SCATTER,
        IMAGES,
        partial(InMixedBatch, 4),
        partial(BatchNormPerDomain, 4),
    ),
]

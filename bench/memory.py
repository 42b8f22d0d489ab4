"""Peak memory of a step, as torch's allocator tells it: every allocation, also within an operator."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.harness import LAYOUTS, Arm, Setting, Shapes, count_bytes, draw_features
from bench.record import Quantity, Result

__all__ = ["PeakMemory", "measure_peak"]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library tells every machine that it has no GPU


def measure_peak(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that were held at once while a function ran, beyond those held before.

    Args:
        function: makes all tensors that are to count.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return _measure_on_gpu(function)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]

    allocations = [event for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda event: event["ts"])
    held, most = 0, 0
    for event in allocations:
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def _measure_on_gpu(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of both arms, forward and backward, with features, gradients and outputs.

    Args:
        name, peer: of ours and of the other.
        shapes, make_ours, make_other, sees_all: see `Comparison`.
        goal: most that is aimed at, in units of S, the bytes of the features.
        layouts: memory formats, keys of `LAYOUTS`.
    """

    name: str
    peer: str
    shapes: Shapes
    make_ours: Callable[[], nn.Module]
    make_other: Callable[[], nn.Module]
    sees_all: bool = False
    goal: float | None = None
    layouts: tuple[str, ...] = tuple(LAYOUTS)

    def run(self, setting: Setting) -> list[Result]:
        """A quantity for each layout, in units of S to two digits: vectors of channels are less."""
        results: list[Result] = []
        for layout in self.layouts:
            size = count_bytes(draw_features(self.shapes, layout))
            peaks = []
            for make in (self.make_ours, self.make_other):
                peak = measure_peak(partial(self._step, make, layout, setting.device), setting.device)
                peaks.append(round(peak / size, 2))
            ours, other = peaks
            results.append(Quantity(self.name, self.peer, layout, "peak memory, S", ours, other, self.goal))
        return results

    def _step(self, make: Callable[[], nn.Module], layout: str, device: str) -> None:
        features, grads = (draw_features(self.shapes, layout, device) for _ in range(2))
        Arm(make(), features, grads, self.sees_all).step()

"""Collectives of a step, as torch dispatches them, and the bytes that a worker sends for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import Arm, Setting, Shapes, draw_features, run_on_workers
from bench.record import LeftOut, Quantity, Result

__all__ = ["CountingCollectives", "Traffic"]


class CountingCollectives(TorchDispatchMode):
    """Within the block collectives of this worker are counted, forward and backward.

    Attributes:
        calls: number of collectives.
        num_bytes: sent by this worker, if each goes round a ring of R workers: R-1 shares of an all-gather,
            2 (R-1) / R of what is reduced, (R-1) / R of what is dealt out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.num_bytes = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func._schema.name != "c10d::barrier":
            self.calls += 1
            self.num_bytes += _count_sent(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))


def _count_sent(name: str, args: tuple[Any, ...]) -> float:
    others = dist.get_world_size() - 1
    share = others / (others + 1)
    if name.startswith(("allgather", "_allgather")):
        return others * _count_bytes(args[1])
    if name.startswith("allreduce"):
        return 2 * share * _count_bytes(args[0])
    if name.startswith("alltoall"):
        return share * _count_bytes(args[1])
    return _count_bytes(args[0])  # a broadcast


def _count_bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_count_bytes, tensors))


@dataclass(frozen=True)
class Traffic:
    """Collectives and bytes of both arms, forward and backward; no time.

    Args:
        name, peer: of ours and of the other.
        shapes: of the features of each worker.
        make_ours, make_other: module-level functions or partials of them, which workers import.
        num_workers: gloo workers on this machine.
        sees_all: see `Comparison`.
        share: of the other's bytes, at most, that is aimed at; None: no goal.
        most_calls: collectives, at most, that are aimed at; None: no goal.
    """

    name: str
    peer: str
    shapes: Shapes
    make_ours: Callable[[], nn.Module]
    make_other: Callable[[], nn.Module]
    num_workers: int
    sees_all: bool = False
    share: float | None = None
    most_calls: int | None = None

    def run(self, setting: Setting) -> list[Result]:
        """Two quantities, of the worker that sends most."""
        if setting.device != "cpu":
            return [LeftOut(self.name, self.peer, "it is counted with --device cpu")]

        by_worker = run_on_workers(self.count, self.num_workers, setting)
        (calls, megabytes), (other_calls, other_megabytes) = map(max, zip(*by_worker, strict=True))
        names = f"{self.name} on {self.num_workers} workers", self.peer, ""
        most = None if self.share is None else self.share * other_megabytes
        return [
            Quantity(*names, "collectives", calls, other_calls, self.most_calls),
            Quantity(*names, "MB sent by a worker", megabytes, other_megabytes, most),
        ]

    def count(self, setting: Setting) -> tuple[tuple[int, float], tuple[int, float]]:
        """Calls and megabytes of ours and of the other, on this worker. A collective."""
        features, grads = (draw_features(self.shapes, "NCHW") for _ in range(2))

        counts = []
        for make in (self.make_ours, self.make_other):
            arm = Arm(make(), features, grads, self.sees_all)
            with CountingCollectives() as counter:
                arm.step()
            counts.append((counter.calls, counter.num_bytes / 1e6))
        return counts[0], counts[1]

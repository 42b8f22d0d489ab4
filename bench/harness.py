"""Two arms that do the same: proved equal in float64, then timed in pairs.

The arms alternate, so that a change of the machine's speed meets both, and so does their order within a pair; the
figure is the median of the ratios of pairs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from bnext.errors import BNextError
from bnext.files import write_json
from bnext.tables import format_rows

__all__ = ["CHANNELS", "IMAGES", "NUM_PAIRS", "Comparison", "Result", "format_results", "run", "write_figures"]

CHANNELS = 256
IMAGES = {"p4": (16, CHANNELS, 50, 84)}  # one feature map of a batch
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
NUM_PAIRS = 11  # of runs
TOLERANCE = 1e-9  # of float64, relative to the largest number of a tensor; sums of a million numbers differ by 1e-12

Features: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Ours against another way to do the same.

    Args:
        name: of the comparison, in the table.
        shapes: of the features, by name; float32, [N, C, H, W].
        make_ours, make_other: build an arm in training mode; module-level functions or partials of them where there
            are workers, which import them.
        differs: why the arms cannot give the same numbers, for the reader of the table; "": they must.
        averages_differ: why running statistics are not the same although outputs are; "": they must be.
        sees_all: whether an arm maps all features, by name, in one call; else each alone.
        layouts: memory formats to time, keys of `LAYOUTS`.
        num_workers: 1: this process; else so many gloo workers on this machine, each with features of its own.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    make_ours: Callable[[], nn.Module]
    make_other: Callable[[], nn.Module]
    differs: str = ""
    averages_differ: str = ""
    sees_all: bool = False
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    num_workers: int = 1


@dataclass(frozen=True)
class Result:
    """Times of one comparison in one layout.

    Args:
        name, layout, num_workers, differs: see `Comparison`.
        difference: largest relative difference of outputs, gradients and averages in float64.
        ours_ms, other_ms: medians of forward and backward, in milliseconds.
        median, lowest, highest: of other / ours, over pairs; above 1 ours is faster.
    """

    name: str
    layout: str
    num_workers: int
    differs: str
    difference: float
    ours_ms: float
    other_ms: float
    median: float
    lowest: float
    highest: float


def run(comparison: Comparison) -> list[Result]:
    """Prove the arms equal, then time them; a result for each layout.

    Raises:
        BNextError: the arms differ, and `comparison` does not say why.
    """
    if comparison.num_workers == 1:
        return _run_here(comparison)

    with tempfile.TemporaryDirectory() as folder:
        results = get_context("spawn").SimpleQueue()
        arguments = comparison, f"file://{folder}/store", results
        spawn(_run_worker, arguments, nprocs=comparison.num_workers)
        return results.get()


def _run_worker(rank: int, comparison: Comparison, store: str, results: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // comparison.num_workers))
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=comparison.num_workers)

    torch.manual_seed(rank)
    own_results = _run_here(comparison)
    if rank == 0:
        results.put(own_results)

    dist.barrier()
    dist.destroy_process_group()


def _run_here(comparison: Comparison) -> list[Result]:
    results = []

    for layout in comparison.layouts:
        features, grads = (draw_features(comparison.shapes, layout) for _ in range(2))

        difference = measure_difference(comparison, features, grads)
        ours, other = _time_pairs(comparison, features, grads)
        ratios = [slow / fast for fast, slow in zip(ours, other, strict=True)]

        results.append(
            Result(
                name=comparison.name,
                layout=layout,
                num_workers=comparison.num_workers,
                differs=comparison.differs,
                difference=difference,
                ours_ms=1e3 * statistics.median(ours),
                other_ms=1e3 * statistics.median(other),
                median=statistics.median(ratios),
                lowest=min(ratios),
                highest=max(ratios),
            )
        )
    return results


def draw_features(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Features:
    """Normal random numbers, in a memory format."""
    features = {}
    for name, shape in shapes.items():
        features[name] = torch.randn(shape).to(memory_format=LAYOUTS[layout])
    return features


def measure_difference(comparison: Comparison, features: Features, grads: Features) -> float:
    """The largest relative difference of the arms in float64; refused where it is no rounding and nobody says why."""
    ours = _compute(comparison.make_ours(), features, grads, comparison.sees_all)
    other = _compute(comparison.make_other(), features, grads, comparison.sees_all)

    if comparison.averages_differ:
        ours = {name: value for name, value in ours.items() if not name.startswith("the average")}

    differences = torch.empty(len(ours), dtype=torch.float64)
    for index, (name, value) in enumerate(ours.items()):
        largest = other[name].abs().max().clamp(min=1)
        differences[index] = (value - other[name]).abs().max() / largest

    worst, name = float(differences.max()), list(ours)[int(differences.argmax())]
    if not comparison.differs and not worst <= TOLERANCE:  # nor NaN
        raise BNextError.of(
            "both arms",
            f"give the same outputs, gradients and averages in float64, to {TOLERANCE:g}",
            got=f"a difference of {worst:.2g} in {name}",
            where=comparison.name,
            remedy="Mend an arm; where they cannot be equal say why in `differs` or `averages_differ`.",
        )
    return worst


def _forward(arm: nn.Module, features: Features, sees_all: bool) -> Features:
    return arm(features) if sees_all else {name: arm(feature) for name, feature in features.items()}


def _compute(arm: nn.Module, features: Features, grads: Features, sees_all: bool) -> dict[str, Tensor]:
    """Outputs, gradients and averages in float64; of the affines summed over norms and workers, whose names differ."""
    arm = arm.double()
    features = {name: feature.double().requires_grad_() for name, feature in features.items()}
    affines: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for name, parameter in arm.named_parameters():
        affines[name.rpartition(".")[2]].append(parameter)
        parameter.data = torch.linspace(0.5, 1.5, parameter.numel()).to(parameter)

    torch.manual_seed(0)  # arms that draw draw the same
    with torch.no_grad():  # a first step, of other features: averages know how they go on
        _forward(arm, {name: 2 * feature + 1 for name, feature in features.items()}, sees_all)
    outputs = _forward(arm, features, sees_all)
    torch.autograd.backward(list(outputs.values()), [grads[name].double() for name in outputs])

    numbers: dict[str, Any] = {f"the output {name}": output.detach() for name, output in outputs.items()}
    for name, feature in features.items():
        numbers[f"the gradient of {name}"] = feature.grad
    for name, parameters in affines.items():
        total = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None]).sum(0)
        if dist.is_initialized():
            dist.all_reduce(total)
        numbers[f"the gradient of {name}"] = total
    for name in ("running_mean", "running_var"):
        buffers = [buffer for path, buffer in arm.named_buffers() if path.rpartition(".")[2] == name]
        if buffers:
            numbers[f"the average {name}"] = torch.stack(buffers)
    return numbers


def _time_pairs(comparison: Comparison, features: Features, grads: Features) -> tuple[list[float], list[float]]:
    """Seconds of ours and of the other, pair by pair."""
    arms = comparison.make_ours(), comparison.make_other()
    for feature in features.values():
        feature.requires_grad_()
    for arm in arms:  # the first run allocates
        _time_step(arm, features, grads, comparison.sees_all)

    seconds: tuple[list[float], list[float]] = [], []
    for index in range(NUM_PAIRS):
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            seconds[side].append(_time_step(arms[side], features, grads, comparison.sees_all))
    return seconds


def _time_step(arm: nn.Module, features: Features, grads: Features, sees_all: bool) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    torch.autograd.backward(list(_forward(arm, features, sees_all).values()), list(grads.values()))
    seconds = time.perf_counter() - start

    for feature in features.values():
        feature.grad = None
    return seconds


def format_results(results: Sequence[Result]) -> str:
    """The table, and below it why some arms are no equals."""
    rows, remarks = [], []
    for result in results:
        ratio = f"{result.median:.2f} ({result.lowest:.2f} to {result.highest:.2f})"
        equality = f"{result.difference:.0e}"
        if result.differs:
            equality = "other"
            remark = f"other: {result.name}: {result.differs}"
            remarks += [] if remark in remarks else [remark]
        times = f"{result.ours_ms:.1f}", f"{result.other_ms:.1f}"
        rows.append([result.name, result.layout, str(result.num_workers), *times, ratio, equality])

    headers = ["norm", "layout", "workers", "ours, ms", "other, ms", "other / ours", "difference"]
    return "\n\n".join([format_rows(rows, headers, num_texts=2), *remarks])


def write_figures(path: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """A JSON file of figures and of what they were measured with."""
    write_json(path, {"torch": torch.__version__, "num_threads": torch.get_num_threads(), "figures": figures})

"""Two norms that do the same: proved equal in float64, then timed in pairs beside a copy, which is their limit."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from bench.pairs import Limits, Timer, time_pairs
from bench.record import LAYOUTS, Failure, LeftOut, Quantity, Result, Speed
from bnext.errors import BNextError, ConfigError, Refusal
from bnext.kernels import Kind, use_kernels

__all__ = [
    "CHANNELS",
    "IMAGES",
    "LAYOUTS",
    "NOT_EQUAL",
    "Arm",
    "Comparison",
    "Features",
    "Peer",
    "Row",
    "Setting",
    "Shapes",
    "compiling_afresh",
    "count_bytes",
    "draw_features",
    "measure_difference",
    "measure_errors",
    "run_on_workers",
]

CHANNELS = 256
IMAGES = {"p4": (16, CHANNELS, 50, 84)}  # one feature map of a batch
TOLERANCE = 1e-9  # of float64, relative to the largest number of a tensor; sums of a million numbers differ by 1e-12
ONE_PASS, TWO_PASSES = 5, 8  # readings and writings of the features, forward and backward
MEAN_OF_ERRORS = 100.0  # of features whose standard deviation is 1

Features: TypeAlias = dict[str, Tensor]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

NOT_EQUAL = Refusal(
    BNextError,
    "both arms",
    "give the same outputs, gradients and averages in float64, to {tolerance:g}",
    "Mend an arm; where they cannot be equal say why in `differs` or `averages_differ`.",
)


class Peer(NamedTuple):
    """A package that is a peer where it is installed.

    Args:
        module: that is imported.
        distribution: that pip installs.
    """

    module: str
    distribution: str


@dataclass(frozen=True)
class Setting:
    """Where and how long a claim is measured.

    Args:
        device: "cpu" or "cuda".
        limits: of the pairs.
    """

    device: str = "cpu"
    limits: Limits = field(default_factory=Limits)


class Row(Protocol):
    """A row of a claim: what it compares, and how."""

    @property
    def name(self) -> str:
        """Ours."""

    @property
    def peer(self) -> str:
        """The other; "": there is none."""

    def run(self, setting: Setting) -> list[Result]:
        """Measure it."""


@dataclass(frozen=True)
class Comparison:
    """Ours against another way to do the same.

    Args:
        name: of our norm, in the table.
        peer: name of the other.
        shapes: of the features, by name; float32, [N, C, H, W]. With workers a function of the rank, if they differ.
        make_ours, make_other: build an arm in training mode; module-level functions or partials of them where there
            are workers, which import them.
        differs: why the arms cannot give the same numbers, for the reader of the table ("as ..."); "": they must.
        averages_differ: why running statistics are not the same although outputs are ("as ..."); "": they must be.
        other_shapes: of the other arm's features, where they are others, which `differs` explains.
        sees_all: whether an arm maps all features, by name, in one call; else each alone.
        layouts: memory formats to time, keys of `LAYOUTS`.
        num_norms: that a feature passes, for the limit.
        num_workers: 1: this process; else so many gloo workers on this machine, each with features of its own.
        goals: least ratio that is aimed at on a CPU, by layout.
        goal_on_gpu: the same on a GPU, in any layout.
        compiles: whether an arm is compiled: each layout begins with an empty cache, and too many compilations fail.
        kernels: how our passes run, see `bnext.use_kernels`.
        shows_errors: whether the errors of both arms in float32 are shown.
        make_reference: builds the arm in float64 whose outputs are exact; None: ours.
        error_goal: most of ours that is aimed at, for features about 0, in standard deviations.
        needs: peer, without which the comparison is left out.
        device: "cuda": it is left out on CPUs.
    """

    name: str
    peer: str
    shapes: Shapes | Callable[[int], Shapes]
    make_ours: Callable[[], nn.Module]
    make_other: Callable[[], nn.Module]
    differs: str = ""
    averages_differ: str = ""
    other_shapes: Shapes | None = None
    sees_all: bool = False
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    num_norms: int = 1
    num_workers: int = 1
    goals: Mapping[str, float] = field(default_factory=dict)
    goal_on_gpu: float | None = None
    compiles: bool = False
    kernels: Kind = "torch"
    shows_errors: bool = False
    make_reference: Callable[[], nn.Module] | None = None
    error_goal: float | None = None
    needs: Peer | None = None
    device: str = ""

    def run(self, setting: Setting) -> list[Result]:
        """Prove the arms equal, then time them: results of each layout, or why there are none."""
        reason = self._find_obstacle(setting.device)
        if reason:
            return [LeftOut(self.name, self.peer, reason)]
        if self.num_workers == 1:
            return self.run_here(setting)

        of_workers = run_on_workers(self.run_here, self.num_workers, setting)
        return of_workers[0]

    def run_here(self, setting: Setting) -> list[Result]:
        """`run` in this process, which may be a worker. A collective."""
        results: list[Result] = []
        for layout in self.layouts:
            try:
                with use_kernels(self.kernels), compiling_afresh(self.compiles):
                    results += self._run_layout(layout, setting)
            except BNextError as error:
                results.append(Failure(self.name, self.peer, layout, str(error)))
        return results

    def _find_obstacle(self, device: str) -> str:
        if self.needs is not None and importlib.util.find_spec(self.needs.module) is None:
            return f"it needs {self.needs.module}: pip install {self.needs.distribution}"
        if self.device and self.device != device:
            return f"it needs --device {self.device}"
        if device == "cuda" and torch.cuda.device_count() < self.num_workers:
            return f"it needs {self.num_workers} GPUs; this machine has {torch.cuda.device_count()}"
        if self.compiles:
            try:
                with use_kernels("compiled"):
                    pass
            except ConfigError as error:
                return str(error)
        return ""

    def list_shapes(self) -> Shapes:
        """Shapes of this worker's features."""
        if not callable(self.shapes):
            return self.shapes
        return self.shapes(dist.get_rank() if dist.is_initialized() else 0)

    def _run_layout(self, layout: str, setting: Setting) -> list[Result]:
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        features, grads = (draw_features(self.list_shapes(), layout, setting.device) for _ in range(2))

        difference = None
        if self.other_shapes is None:
            difference = measure_difference(self, features, grads)
        results: list[Result] = [self._time(layout, features, grads, difference, setting)]
        if self.shows_errors:
            results += measure_errors(self, features, layout)
        return results

    def _time(
        self, layout: str, features: Features, grads: Features, difference: float | None, setting: Setting
    ) -> Speed:
        timer = Timer(setting.device)
        ours = Arm(self.make_ours(), features, grads, self.sees_all)
        if self.other_shapes is None:
            other = Arm(self.make_other(), features, grads, self.sees_all)
        else:
            inputs, output_grads = (draw_features(self.other_shapes, layout, setting.device) for _ in range(2))
            other = Arm(self.make_other(), inputs, output_grads, self.sees_all)

        copy = Copy(features, timer)
        steps = (ours.step, other.step)
        pairs = time_pairs(*steps, timer, setting.limits, between=copy.run)

        size, bandwidth = count_bytes(features), copy.measure_bandwidth()
        pass_ms = 1e3 * self.num_norms * size / bandwidth
        return Speed.of(
            pairs,
            self.name,
            self.peer,
            layout,
            num_workers=self.num_workers,
            differs=self.differs,
            averages_differ=self.averages_differ,
            difference=difference,
            goal=self.goals.get(layout) if setting.device == "cpu" else self.goal_on_gpu,
            megabytes=size / 1e6,
            copy_gbs=bandwidth / 1e9,
            one_pass_ms=ONE_PASS * pass_ms,
            two_passes_ms=TWO_PASSES * pass_ms,
        )


@contextlib.contextmanager
def compiling_afresh(compiles: bool = True) -> Iterator[None]:
    """Within the block nothing is compiled yet, and code that is compiled too often is an error.

    Args:
        compiles: whether anything is compiled; else the block is any other.
    """
    if not compiles:
        yield
        return

    import torch._dynamo  # takes seconds

    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


class Arm:
    """A norm with the features and gradients of a step.

    Args:
        module: maps a feature, or all features by name.
        features: inputs, which get gradients.
        grads: gradients of the outputs, by the same names.
        sees_all: see `Comparison`.
    """

    def __init__(self, module: nn.Module, features: Features, grads: Features, sees_all: bool) -> None:
        self.module, self.features, self.grads, self.sees_all = module, features, grads, sees_all
        module.to(next(iter(features.values())).device)

    def forward(self) -> Features:
        """Outputs by name."""
        if self.sees_all:
            return self.module(self.features)
        return {name: self.module(feature) for name, feature in self.features.items()}

    def step(self) -> None:
        """Forward and backward; gradients of an earlier step go before."""
        for feature in self.features.values():
            feature.requires_grad_().grad = None

        outputs = self.forward()
        torch.autograd.backward(list(outputs.values()), [self.grads[name] for name in outputs])


class Copy:
    """A copy of features, by the side of the pairs.

    Args:
        features: that are copied.
        timer: of the pairs.
    """

    def __init__(self, features: Features, timer: Timer) -> None:
        self.sources = [feature.detach() for feature in features.values()]
        self.targets = [torch.empty_like(source) for source in self.sources]
        self.timer, self.num_bytes = timer, 2 * count_bytes(features)
        self.seconds: list[float] = []

    def run(self) -> None:
        """Copy once more."""
        self.seconds.append(self.timer.time(self._copy))

    def _copy(self) -> None:
        for target, source in zip(self.targets, self.sources, strict=True):
            target.copy_(source)

    def measure_bandwidth(self) -> float:
        """Bytes that are read and written in a second, median of the copies."""
        return self.num_bytes / statistics.median(self.seconds)


def run_on_workers(function: Callable[..., Any], num_workers: int, setting: Setting) -> list[Any]:
    """Call `function(setting)` on workers of this machine: gloo, or NCCL with a GPU each; what they return, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        results = get_context("spawn").SimpleQueue()
        arguments = function, num_workers, setting, f"file://{folder}/store", results
        spawn(_run_worker, arguments, nprocs=num_workers)
        by_rank = dict(results.get() for _ in range(num_workers))
    return [by_rank[rank] for rank in range(num_workers)]


def _run_worker(
    rank: int, function: Callable[..., Any], num_workers: int, setting: Setting, store: str, results: Any
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    if setting.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if setting.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=num_workers)

    results.put((rank, function(setting)))

    dist.barrier()
    dist.destroy_process_group()


def draw_features(shapes: Shapes, layout: str, device: str = "cpu") -> Features:
    """Normal random numbers, in a memory format."""
    features = {}
    for name, shape in shapes.items():
        features[name] = torch.randn(shape, device=device).to(memory_format=LAYOUTS[layout])
    return features


def count_bytes(features: Features) -> int:
    """Bytes of all features: S."""
    return sum(feature.nbytes for feature in features.values())


def measure_difference(comparison: Comparison, features: Features, grads: Features) -> float:
    """The largest relative difference of the arms in float64, on any worker.

    Raises:
        BNextError: it is no rounding, and nobody says why.
    """
    modules = comparison.make_ours(), comparison.make_other()
    numbers_of_affines = {len(_list_affines(module)["weight"]) for module in modules}
    ours, other = (
        _compute(module, features, grads, comparison.sees_all, by_norm=len(numbers_of_affines) == 1)
        for module in modules
    )
    if comparison.averages_differ:
        ours, other = _drop_averages(ours), _drop_averages(other)

    differences = []
    for name in {**ours, **other}:
        if name not in ours or name not in other:
            differences.append((float("inf"), f"{name}, as one arm has none"))
        elif ours[name].shape != other[name].shape:
            differences.append((float("inf"), f"the shape of {name}"))
        else:
            largest = other[name].abs().max().clamp(min=1)
            differences.append((float((ours[name] - other[name]).abs().max() / largest), name))

    worst, name = _find_worst(differences)
    if not comparison.differs and not worst <= TOLERANCE:  # nor NaN
        raise NOT_EQUAL.of(
            f"a difference of {worst:.2g} in {name}",
            f"{comparison.name}, against {comparison.peer}",
            tolerance=TOLERANCE,
        )
    return worst


def _find_worst(differences: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """The largest difference and its name, or one that is NaN; the same on all workers."""
    every = list(differences)
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, every)
        every = sum(gathered, [])
    return max(every, key=lambda pair: float("inf") if pair[0] != pair[0] else pair[0])


def _drop_averages(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in numbers.items() if not name.startswith("the average")}


def _list_affines(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Weights and biases, each in the order of the norms."""
    affines: dict[str, list[nn.Parameter]] = {"weight": [], "bias": []}
    for name, parameter in module.named_parameters():
        affines[name.rpartition(".")[2]].append(parameter)
    return affines


def _compute(
    module: nn.Module, features: Features, grads: Features, sees_all: bool, by_norm: bool
) -> dict[str, Tensor]:
    """Outputs, gradients and averages in float64.

    Args:
        by_norm: whether the arms have as many affines, whose names differ: each norm has another one, in order; else
            all are the same, and their gradients are summed.
    """
    module = module.double()
    affines = _list_affines(module)
    for parameters in affines.values():
        for place, parameter in enumerate(parameters):
            shift = 0.1 * place if by_norm else 0.0
            parameter.data = shift + torch.linspace(0.5, 1.5, parameter.numel()).to(parameter)

    torch.manual_seed(0)  # arms that draw draw the same
    wide = {name: feature.detach().double() for name, feature in features.items()}
    wide_grads = {name: grad.double() for name, grad in grads.items()}
    before = {name: (2 * feature + 1).requires_grad_() for name, feature in wide.items()}
    Arm(module, before, {}, sees_all).forward()  # a first step, of other features: averages know how they go on
    del before

    for feature in wide.values():
        feature.requires_grad_()
    outputs = Arm(module, wide, {}, sees_all).forward()
    torch.autograd.backward(list(outputs.values()), [wide_grads[name] for name in outputs])

    numbers: dict[str, Any] = {f"the output {name}": output.detach() for name, output in outputs.items()}
    for name, feature in wide.items():
        numbers[f"the gradient of {name}"] = feature.grad
    for name, parameters in affines.items():
        if not parameters:
            continue
        of_norms = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        gradients = torch.stack(of_norms) if by_norm else torch.stack(of_norms).sum(0)
        if dist.is_initialized():
            dist.all_reduce(gradients)
        numbers[f"the gradient of {name}"] = gradients
    for name in ("running_mean", "running_var"):
        buffers = [buffer for path, buffer in module.named_buffers() if path.rpartition(".")[2] == name]
        if buffers:
            numbers[f"the average {name}"] = torch.stack(buffers)
    return numbers


@torch.no_grad()
def measure_errors(comparison: Comparison, features: Features, layout: str) -> list[Quantity]:
    """Largest errors of outputs in float32 against a reference in float64, for features about 0 and far from it.

    The outputs have a standard deviation of 1. A collective.
    """
    quantities = []
    for mean in (0.0, MEAN_OF_ERRORS):
        shifted = {name: feature.detach() + mean for name, feature in features.items()}
        wide = {name: feature.double() for name, feature in shifted.items()}
        reference = (comparison.make_reference or comparison.make_ours)().double()
        exact = Arm(reference, wide, {}, comparison.sees_all).forward()

        errors = []
        for make in (comparison.make_ours, comparison.make_other):
            outputs = Arm(make(), shifted, {}, comparison.sees_all).forward()
            differences = [(float((outputs[name] - exact[name]).abs().max()), name) for name in exact]
            errors.append(_find_worst(differences)[0])
        ours, other = errors

        counted = f"error in float32 at a mean/std of {mean:g}, std"
        goal = comparison.error_goal if mean == 0 else None
        quantities.append(Quantity(comparison.name, comparison.peer, layout, counted, ours, other, goal))
    return quantities

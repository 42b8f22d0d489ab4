"""Re-estimate population statistics of a trained model on data: no training, no labels.

Moments of every batch are merged in float64, over batches, calls and workers. A layer may be called
any number of times; one that is not reached keeps what it has, and is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import all_gather_stacked, merge_moments_over_workers, resolve_group
from bnext.errors import StatisticsError
from bnext.functional import Moments, batch_moments, merge_moments
from bnext.layers.batch_norm import BatchNorm2d, DomainState

__all__ = ["PopulationEstimate", "RecomputeReport", "recompute_population_statistics"]

Selection = Callable[[str, nn.Module], bool]


@dataclasses.dataclass(frozen=True)
class PopulationEstimate:
    """What became of one set of population statistics.

    Args:
        path: of the layer in the model.
        levels: the levels that the set normalizes; empty for a norm without levels.
        count: elements per channel that were seen, over all workers; 0: not reached, left as it was.
        mean_shift: largest |new - old| of the mean over channels, in new standard deviations.
        var_ratio: largest of new/old and old/new of the variance over channels.
    """

    path: str
    levels: tuple[str, ...]
    count: int
    mean_shift: float
    var_ratio: float

    @property
    def is_reached(self) -> bool:
        return self.count > 0


@dataclasses.dataclass(frozen=True)
class RecomputeReport:
    """All estimates of one run, and the number of batches over all workers."""

    estimates: tuple[PopulationEstimate, ...]
    num_batches: int

    @property
    def not_reached(self) -> tuple[PopulationEstimate, ...]:
        return tuple(estimate for estimate in self.estimates if not estimate.is_reached)

    def __str__(self) -> str:
        reached = [estimate for estimate in self.estimates if estimate.is_reached]
        lines = [f"Population statistics re-estimated: {len(reached)} sets from {self.num_batches} batches."]
        if reached:
            farthest = max(reached, key=lambda estimate: estimate.mean_shift)
            name = ".".join([farthest.path, *farthest.levels[:1]])
            lines.append(f"  farthest from before: {name}, mean by {farthest.mean_shift:.2f} standard deviations")
        for estimate in self.not_reached:
            lines.append(f"  not reached, left as it was: {estimate.path} {' '.join(estimate.levels)}".rstrip())
        return "\n".join(lines)


def recompute_population_statistics(
    model: nn.Module,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    layers: Selection | None = None,
) -> RecomputeReport:
    """Replace the running statistics of batch norms by the moments of their inputs on `data`.

        mean, var = Chan's merge of the moments of all batches;  running_var has correction 1, as torch's

    Selected norms normalize by mini-batch statistics meanwhile, as in training; everything else of
    the model is in evaluation mode. A norm with statistics per level gets each level's own, one with
    shared statistics those of all levels together.

    Args:
        model: any torch model.
        data: batches; every worker brings its own share. Norms over all workers need the same number of
            batches on every worker, as in training.
        num_batches: how many to use at most, per worker; None: all.
        forward: called as forward(model, batch); default model(batch).
        layers: called as layers(path, module) for every batch norm with running statistics; those
            for which it is true are re-estimated. Default: all.

    Returns:
        The report, equal on every worker.

    Raises:
        StatisticsError: no norm is selected, there is no batch, activations are not finite, or another
            worker failed.

    Note:
        After an exception the model is bitwise as it was; otherwise only the running statistics
        of the reached norms differ. Collectives at the end: one per set of statistics, and one more.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
        >>> report = recompute_population_statistics(model, [torch.randn(4, 3, 6, 6) for _ in range(5)])
        >>> report.estimates[0].count
        720

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 3 (PreciseBN).
    """
    if num_batches is not None and num_batches < 1:
        raise StatisticsError(
            f"num_batches must be 1 or more; got {num_batches} (recompute_population_statistics; "
            f"TEST.PRECISE_BN.NUM_ITER in a config). Use some 4,000 images."
        )
    norms = _select_norms(model, layers)
    failure, done = None, 0
    with _estimating(model, norms) as collectors:
        try:
            done = _run(model, data, num_batches, forward)
        except Exception as error:  # the other workers are told before it is raised: they wait for this one
            failure = error
    done = _count_batches(done, failure, norms[0][1])
    everyone = resolve_group("all")
    totals = [merge_moments_over_workers(collector.total, everyone) for collector in collectors]
    if all(total.count == 0 for total in totals):
        raise StatisticsError(
            f"data must give at least one batch that reaches a norm; got {done} batches and no activation "
            f"(recompute_population_statistics). Pass a longer loader, or select norms that forward reaches."
        )
    estimates = [_write(collector, total, done) for collector, total in zip(collectors, totals, strict=True)]
    return RecomputeReport(tuple(estimates), done)


def _select_norms(model: nn.Module, layers: Selection | None) -> list[tuple[str, _BatchNorm]]:
    norms = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, DomainState):
            continue
        tracks = module.running_mean is not None
        if isinstance(module, BatchNorm2d):
            tracks = any(module.populations()) and not module.spec.has_frozen_statistics
        if tracks and (layers is None or layers(path, module)):
            norms.append((path, module))
    if not norms:
        raise StatisticsError(
            f"model must have a batch norm with running statistics that is selected; got none "
            f"({type(model).__name__}). Frozen norms and GroupNorm have nothing to re-estimate."
        )
    return norms


class _Collector:
    """Merges, in float64, the moments of everything that one set of statistics is to describe."""

    def __init__(self, path: str, levels: tuple[str, ...], state: Any) -> None:
        self.path, self.levels, self.state = path, levels, state
        zeros = torch.zeros(state.num_features, dtype=torch.float64, device=state.running_mean.device)
        self.total = Moments(zeros.new_zeros(()), zeros, zeros.clone())

    def add(self, feature: Tensor) -> None:
        new = batch_moments(feature.double())  # float32 would round the mean of a batch far from zero
        if not torch.isfinite(new.var).all() or not torch.isfinite(new.mean).all():
            raise StatisticsError(
                f"activations must be finite; got NaN or Inf ({'.'.join([self.path, *self.levels[:1]])}). "
                f"The statistics are as they were; look for the batch and the layer that make them."
            )
        self.total = merge_moments(Moments(*(torch.stack(pair) for pair in zip(self.total, new, strict=True))))


@contextlib.contextmanager
def _estimating(model: nn.Module, norms: list[tuple[str, _BatchNorm]]) -> Iterator[list[_Collector]]:
    """Collect moments at the inputs of the selected norms; leave modes, buffers and hooks as they were."""
    was_training = {module: module.training for module in model.modules()}
    buffers = [buffer for _, norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    collectors: list[_Collector] = []
    hooks = []
    try:
        model.eval()
        for path, norm in norms:
            by_level = _make_collectors(path, norm)
            collectors += dict.fromkeys(by_level.values())
            hooks.append(norm.register_forward_pre_hook(_make_hook(by_level)))
            norm.train()
        yield collectors
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _make_collectors(path: str, norm: _BatchNorm) -> dict[str, _Collector]:
    """Level or domain -> collector; those with one population share it. A norm without them: ""."""
    if not isinstance(norm, BatchNorm2d):
        return {"": _Collector(path, (), norm)}
    by_name = {}
    for names, state in norm.populations():
        by_name.update(dict.fromkeys(names or ("",), _Collector(path, names, state)))
    return by_name


def _make_hook(by_name: dict[str, _Collector]) -> Callable[[nn.Module, Any], None]:
    def collect(module: nn.Module, args: Any) -> None:
        for name, feature in _name_features(module, args[0]):
            if name in by_name:  # the norm itself refuses an unknown level
                by_name[name].add(feature)

    return collect


def _name_features(norm: nn.Module, given: Any) -> Iterator[tuple[str, Tensor]]:
    """What a norm is called with, by level or domain; a mixed batch is taken apart."""
    if isinstance(given, Mapping):
        yield from given.items()
        return
    domains = norm.find_domains(len(given)) if isinstance(norm, BatchNorm2d) else 0
    names = norm.domains if isinstance(norm, BatchNorm2d) and norm.domains else ("",)
    if isinstance(domains, int):
        yield names[domains], given
        return
    for domain in sorted(set(domains)):
        yield names[domain], given[[own == domain for own in domains]]


@torch.no_grad()
def _run(
    model: nn.Module,
    data: Iterable[Any],
    num_batches: int | None,
    forward: Callable[[nn.Module, Any], object] | None,
) -> int:
    done = 0
    for batch in itertools.islice(data, num_batches):
        model(batch) if forward is None else forward(model, batch)
        done += 1
    return done


def _count_batches(done: int, failure: Exception | None, norm: _BatchNorm) -> int:
    """Batches over all workers; raises on every worker if one of them has failed."""
    device = next(norm.buffers()).device
    message = torch.tensor([done, failure is not None], dtype=torch.float64, device=device)
    answers = all_gather_stacked(message, resolve_group("all"))
    if failure is not None:
        raise failure
    if answers[:, 1].any():
        raise StatisticsError(
            f"every worker must reach the end of its data; got a failure on worker {int(answers[:, 1].argmax())} "
            f"(recompute_population_statistics). Its own message says why; the statistics are as they were."
        )
    return int(answers[:, 0].sum())


@torch.no_grad()
def _write(collector: _Collector, total: Moments, num_batches: int) -> PopulationEstimate:
    """Put the estimate in the place of the running statistics; one element has no variance and is no estimate."""
    state = collector.state
    count = int(total.count)
    if count < 2:
        return PopulationEstimate(collector.path, collector.levels, 0, 0.0, 1.0)
    mean, var = total.mean, total.unbiased_var()
    # eps keeps a dead channel (variance 0) from looking infinitely far away.
    old_var, new_var = state.running_var.double() + state.eps, var + state.eps
    shift = ((mean - state.running_mean.double()).abs() / new_var.sqrt()).max()
    ratio = torch.maximum(new_var / old_var, old_var / new_var).max()
    state.running_mean.copy_(mean)
    state.running_var.copy_(var)
    state.num_batches_tracked.fill_(num_batches)
    return PopulationEstimate(collector.path, collector.levels, count, float(shift), float(ratio))

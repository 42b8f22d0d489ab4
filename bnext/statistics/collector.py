"""One set of population statistics: collected over calls, batches and workers, estimated, and written.

Shape letters: C channels, R workers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnext.distributed import all_gather_stacked, resolve_group
from bnext.errors import StatisticsError
from bnext.functional import (
    Moments,
    Spread,
    batch_moments,
    merge_moments,
    merge_spreads,
    spread_of_batch,
    stack_parts,
    standard_errors,
)
from bnext.layers.kept import note_statistics
from bnext.statistics.observe import list_populations
from bnext.statistics.report import PopulationEstimate

__all__ = ["Collector", "Estimator", "make_collectors", "measure"]

Estimator = Literal["pooled", "mean_of_batches", "layer_by_layer", "moving_average"]


class Collector:
    """The elements that one set of population statistics is to describe, as far as this worker has seen it.

    Args:
        path: of the norm in its model.
        names: the levels or domains that the set normalizes; empty for a norm without.
        state: the module that holds the running statistics.
        momentum: of a moving average that begins with them; None: all mini-batches count alike.

    Attributes:
        total: moments of all elements, [C].
        spread: how the batches differ.
        average: mean and variance (correction 1), averaged over mini-batches, [2, C].
        former: running mean and variance before, [2, C].
        num_samples: images or RoIs that were seen; those of several levels once.
        num_images: of the set's domain, where that is known; at most `num_samples`.
        num_updates: mini-batches in `average`.
        num_batches: ends of batches, whether the set was reached in them or not.
        is_dependent: whether features of an image depend on its batch, as mini-batches have normalized them before.
        is_random: whether features of an image are others each time, as random numbers are in them.
        share: of the squared standard errors that is left, see `share_of_variance`.
    """

    def __init__(self, path: str, names: tuple[str, ...], state: Any, momentum: float | None = None) -> None:
        self.path, self.names, self.state = path, names, state
        _check_buffer(state.running_mean, self.where)

        self.former = torch.stack([state.running_mean, state.running_var]).double()
        zeros = torch.zeros_like(self.former)
        self.total = Moments(zeros.new_zeros(()), *zeros)
        self.spread = spread_of_batch(self.total)
        self.average = zeros if momentum is None else self.former
        self.num_samples = self.num_images = self.num_updates = self.num_batches = 0
        self.is_dependent, self.is_random, self.share = False, False, 1.0

        self._momentum = momentum
        self._parts: list[Moments] = []  # of the batch that has not ended
        self._samples = 0

    @property
    def where(self) -> str:
        """Path and, where there is one, level or domain, in messages."""
        return ".".join([self.path, *self.names[:1]])

    @property
    def is_reached(self) -> bool:
        """Whether something was added since the last end of a batch."""
        return bool(self._parts)

    # ---- on this worker

    def add(self, features: Sequence[Tensor]) -> None:
        """Take in what is one mini-batch to the norm, each [N, C, ...]: one update of a moving average."""
        self._parts.append(measure(features, f"{self.where}, batch {self.num_batches + 1}"))
        self._samples = max([self._samples, *map(len, features)])

    def end_batch(self, images: Mapping[str, int]) -> None:
        """Take what was added since the last end for one batch.

        Args:
            images: domain -> images of the batch; "": of no domain, or of one that the caller has named.
        """
        self.num_batches += 1
        if not self._parts:
            return

        batch = merge_moments(stack_parts(self._parts))
        self.total = merge_moments(stack_parts([self.total, batch]))
        self.spread = merge_spreads(stack_parts([self.spread, spread_of_batch(batch)]))
        for part in self._parts:
            self._update_average(part)

        of_domain = sum(images.get(name, 0) for name in self.names)
        self.num_samples += self._samples
        self.num_images += min(self._samples, of_domain or sum(images.values()))  # a fallback domain gets all
        self._parts, self._samples = [], 0

    def _update_average(self, part: Moments) -> None:
        if part.count <= 1:
            return  # an empty mini-batch moves nothing; one element has no variance

        values = torch.stack([part.mean, part.unbiased_var()])
        self.num_updates += 1
        if self._momentum is None:
            self.average = self.average + (values - self.average) / self.num_updates
        else:
            self.average = torch.lerp(self.average, values, self._momentum)

    # ---- over all workers

    def merge_over_workers(self) -> Collector:
        """One collector of what all workers have seen, equal on all. A collective.

        Moments and means of mini-batches are as if one worker had seen everything; moving averages, whose order is each
        worker's, are averaged.
        """
        everyone = resolve_group("all")
        if everyone is None:
            return self

        numbers = [self.num_samples, self.num_images, self.num_updates, self.is_dependent, self.is_random]
        counts = self.former.new_tensor(numbers)
        fields = [*self.total, *self.spread, self.average, self.former, counts]
        message = torch.cat([field.reshape(-1) for field in fields])
        parts = all_gather_stacked(message, everyone, self.where).split([field.numel() for field in fields], dim=1)
        every = [part.reshape(-1, *field.shape) for part, field in zip(parts, fields, strict=True)]
        *of_both, average, former, counts = every
        of_total, of_spread = of_both[: len(self.total)], of_both[len(self.total) :]

        merged = copy.copy(self)
        merged.total = merge_moments(Moments(*of_total))
        merged.spread = merge_spreads(Spread(*of_spread))
        merged.former = _merge_populations(former)
        merged.num_samples, merged.num_images, merged.num_updates, num_dependent, num_random = map(int, counts.sum(0))
        merged.is_dependent, merged.is_random = num_dependent > 0, num_random > 0

        updates = counts[:, 2]
        if self._momentum is None:
            share = updates / updates.sum().clamp(min=1)
            merged.average = (share.view(-1, 1, 1) * average).sum(0)
        else:
            merged.average = average[updates > 0].mean(0)  # of the workers that have moved theirs
        return merged

    # ---- the estimate

    def measure_errors(self) -> tuple[float, float]:
        """Relative standard errors of mean and variance, 95th percentile over channels.

        eps keeps a dead channel (variance 0) from an infinite error.
        """
        if self.share == 0:
            return 0.0, 0.0  # also of a single batch, whose error would be unknown

        mean_error, var_error = standard_errors(self.spread, self.total)
        var = self.total.var + self.state.eps
        root = math.sqrt(self.share)
        return root * _percentile(mean_error / var.sqrt()), root * _percentile(var_error / var)

    def estimate(self, estimator: Estimator, source_samples: float) -> tuple[PopulationEstimate, Tensor | None]:
        """The report's row, and new mean and variance, [2, C]; one element has no variance and is no estimate.

        Raises:
            StatisticsError: the former statistics count and are not finite, or the new ones overflow their buffers.
        """
        is_pooled = estimator in ("pooled", "layer_by_layer")
        if self.total.count < 2 or (not is_pooled and self.num_updates == 0):
            return PopulationEstimate(self.path, self.names, 0), None

        is_replaced = source_samples == 0 and estimator != "moving_average"
        if not is_replaced and not torch.isfinite(self.former).all():
            rule = f"be finite, as they count for {source_samples:g} images (source_samples)"
            rule = rule if source_samples else "be finite, as estimator='moving_average' begins with them"
            remedy = "Replace them: source_samples=0 and another estimator."
            raise StatisticsError.of("running statistics", rule, got="NaN or Inf", where=self.where, remedy=remedy)

        new = torch.stack([self.total.mean, self.total.unbiased_var()]) if is_pooled else self.average
        if source_samples != 0:
            new = torch.lerp(self.former, new, self.num_images / (self.num_images + source_samples))

        dtype = self.state.running_var.dtype
        if not torch.isfinite(new.to(dtype)).all():
            rule, remedy = "be finite in the type of their buffers", "Convert the norm to float32."
            raise StatisticsError.of("statistics", rule, got=f"an overflow in {dtype}", where=self.where, remedy=remedy)
        return self._describe(new), new

    def _describe(self, new: Tensor) -> PopulationEstimate:
        (mean, var), (old_mean, old_var), eps = new, self.former, self.state.eps
        mean_error, var_error = self.measure_errors()

        return PopulationEstimate(
            self.path,
            self.names,
            count=int(self.total.count),
            num_samples=self.num_samples,
            num_batches=int(self.spread.num_batches),
            mean_shift=float(((mean - old_mean).abs() / (var + eps).sqrt()).max()),
            var_ratio=float(torch.maximum((var + eps) / (old_var + eps), (old_var + eps) / (var + eps)).max()),
            mean_error=mean_error,
            var_error=var_error,
        )

    def write(self, new: Tensor | None, num_batches: int) -> None:
        """Make an estimate, [2, C], the running statistics; None leaves them as they are."""
        if new is None:
            return

        self.state.running_mean.copy_(new[0])
        self.state.running_var.copy_(new[1])
        if self.state.num_batches_tracked is not None:
            self.state.num_batches_tracked.fill_(num_batches)
        note_statistics(self.state)


def make_collectors(norms: Mapping[str, _BatchNorm], momentum: float | None = None) -> dict[Any, Collector]:
    """The module that holds a set of running statistics -> what collects for it, in the order of the model."""
    collectors = {}
    for path, norm in norms.items():
        for names, state in list_populations(norm):
            collectors[state] = Collector(path, names, state, momentum)
    return collectors


def measure(features: Sequence[Tensor], where: str) -> Moments:
    """Moments of features, each [N, C, ...], as one mini-batch.

    Raises:
        StatisticsError: they are not finite.

    Note:
        In float64: float32 would round the mean of a batch far from zero.
    """
    moments = merge_moments(stack_parts([batch_moments(feature.double()) for feature in features]))

    if not torch.isfinite(moments.var).all() or not torch.isfinite(moments.mean).all():
        remedy = "They are not taken in; look for what in that batch or before that layer makes them."
        raise StatisticsError.of("activations", "be finite", got="NaN or Inf", where=where, remedy=remedy)
    return moments


def _merge_populations(every: Tensor) -> Tensor:
    """Running statistics of all workers, [R, 2, C], as parts of one population; those that agree stay bit by bit."""
    if torch.equal(every, every[:1].expand_as(every)):
        return every[0]
    merged = merge_moments(Moments(every.new_ones(len(every)), *every.unbind(1)))
    return torch.stack([merged.mean, merged.var])


def _percentile(errors: Tensor) -> float:
    """The 95th over channels, [C]."""
    return float("inf") if torch.isinf(errors).any() else float(torch.quantile(errors, 0.95))


def _check_buffer(buffer: Tensor, where: str) -> None:
    rules: list[tuple[Callable[[Tensor], bool], str, str, str]] = [
        (is_lazy, "have been initialized", "a lazy norm", "Run a batch through the model first."),
        (lambda tensor: tensor.is_meta, "hold values", "the meta device", "Load weights first."),
        (torch.is_inference, "be ordinary tensors", "tensors of torch.inference_mode", "Build the model outside."),
    ]
    for is_broken, rule, got, remedy in rules:
        if is_broken(buffer):
            raise StatisticsError.of("running statistics", rule, got=got, where=where, remedy=remedy)

"""From what was collected of a set to its new statistics, and to its row of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bnext.errors import StatisticsError
from bnext.functional import standard_errors
from bnext.statistics.collector import Collected, Collector
from bnext.statistics.report import PopulationEstimate, percentile_error

__all__ = ["Estimator", "estimate_set", "measure_errors", "put_estimates"]

Estimator = Literal["pooled", "mean_of_batches", "layer_by_layer", "moving_average"]


def measure_errors(own: Collector, found: Collected) -> tuple[float, float]:
    """Relative standard errors of mean and variance; eps keeps a dead channel (variance 0) from an infinite error."""
    mean_error, var_error = standard_errors(found.spread, found.total)
    var = found.total.var + own.state.eps
    return percentile_error(mean_error / var.sqrt()), percentile_error(var_error / var)


def estimate_set(
    own: Collector, found: Collected, estimator: Estimator, source_samples: float
) -> tuple[PopulationEstimate, Tensor | None]:
    """The report's row, and new mean and variance, [2, C]; one element has no variance and is no estimate."""
    is_pooled = estimator in ("pooled", "layer_by_layer")
    if found.total.count < 2 or (not is_pooled and found.num_updates == 0):
        return PopulationEstimate(own.path, own.names, 0), None
    new = torch.stack([found.total.mean, found.total.unbiased_var()])
    if estimator == "mean_of_batches":
        new = found.average
    elif estimator == "moving_average":
        _check_former(own, found, "estimator='moving_average' begins with them", "Use another estimator")
        new = own.moving_over_workers()
    new = _blend(own, found, new, source_samples)
    if not torch.isfinite(new.to(own.state.running_var.dtype)).all():
        raise StatisticsError(
            f"statistics must be finite in the type of their buffers; got an overflow in {own.state.running_var.dtype} "
            f"({own.where}). The statistics are as they were; convert the norm to float32."
        )
    return _describe(own, found, new), new


def _describe(own: Collector, found: Collected, new: Tensor) -> PopulationEstimate:
    (mean, var), (old_mean, old_var), eps = new, found.former, own.state.eps
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).max()
    ratio = torch.maximum((var + eps) / (old_var + eps), (old_var + eps) / (var + eps)).max()
    counts = int(found.total.count), found.num_samples, int(found.spread.num_batches)
    errors = measure_errors(own, found)
    return PopulationEstimate(own.path, own.names, *counts, float(shift), float(ratio), *errors)


def _check_former(own: Collector, found: Collected, why: str, remedy: str) -> None:
    if not torch.isfinite(found.former).all():
        raise StatisticsError(
            f"running statistics must be finite, as {why}; got NaN or Inf ({own.where}). {remedy}, which replaces them."
        )


def _blend(own: Collector, found: Collected, new: Tensor, source_samples: float) -> Tensor:
    """An estimate, [2, C], and the running statistics, which count for `source_samples` images."""
    if source_samples == 0:
        return new  # also where the former statistics are not finite
    _check_former(own, found, f"they count for {source_samples:g} images (source_samples)", "Use source_samples=0")
    return torch.lerp(found.former, new, found.num_images / (found.num_images + source_samples))


def put_estimates(sets: Sequence[Collector], found: Sequence[Tensor | None], num_batches: int) -> None:
    """Make estimates, each [2, C], the running statistics; None leaves them as they are."""
    for own, new in zip(sets, found, strict=True):
        if new is not None:
            own.state.running_mean.copy_(new[0])
            own.state.running_var.copy_(new[1])
            if own.state.num_batches_tracked is not None:
                own.state.num_batches_tracked.fill_(num_batches)

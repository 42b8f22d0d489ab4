"""The report of a re-estimation: what became of every set of population statistics."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from bnext.errors import list_few
from bnext.files import drop_nan

__all__ = ["PopulationEstimate", "RecomputeReport"]

_SHOWN = 5  # of those that have not converged; the tables name all


@dataclasses.dataclass(frozen=True)
class PopulationEstimate:
    """One set of population statistics.

    Args:
        path: of the layer in the model.
        levels: the levels or domains that the set normalizes; empty for a norm without.
        count: elements per channel that were seen, over all workers; 0: not reached, left as it was.
        num_samples: images or RoIs that were seen, over all workers; those of several levels once.
        num_batches: batches in which it was reached, over all workers.
        mean_shift: largest |new - old| of the mean over channels, in new standard deviations.
        var_ratio: largest of new/old and old/new of the variance over channels.
        mean_error: standard error of the mean in standard deviations, 95th percentile over channels; infinite for
            fewer than two batches.
        var_error: standard error of the variance relative to it, likewise.
    """

    path: str
    levels: tuple[str, ...]
    count: int
    num_samples: int = 0
    num_batches: int = 0
    mean_shift: float = 0.0
    var_ratio: float = 1.0
    mean_error: float = math.inf
    var_error: float = math.inf

    @property
    def is_reached(self) -> bool:
        return self.count > 0

    @property
    def error(self) -> float:
        """The larger of both standard errors."""
        return max(self.mean_error, self.var_error)

    @property
    def name(self) -> str:
        """Path, and the level or domain where it is of one."""
        return ".".join([self.path, *self.levels]) if len(self.levels) == 1 else self.path


@dataclasses.dataclass(frozen=True)
class RecomputeReport:
    """All estimates of one run.

    Args:
        estimates: one for each set, in the order of the model.
        num_batches: that were used, over all workers.
        num_samples: images in them, over all workers.
        tolerance: that was asked for, or None.
        population_size: images whose statistics the standard errors are of; None: of what the images are drawn from.
    """

    estimates: tuple[PopulationEstimate, ...]
    num_batches: int
    num_samples: int = 0
    tolerance: float | None = None
    population_size: int | None = None

    @property
    def reached(self) -> tuple[PopulationEstimate, ...]:
        return tuple(estimate for estimate in self.estimates if estimate.is_reached)

    @property
    def not_reached(self) -> tuple[PopulationEstimate, ...]:
        return tuple(estimate for estimate in self.estimates if not estimate.is_reached)

    @property
    def not_converged(self) -> tuple[PopulationEstimate, ...]:
        """Reached sets whose standard error is above the tolerance; none without a tolerance."""
        if self.tolerance is None:
            return ()
        return tuple(estimate for estimate in self.reached if estimate.error > self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite, such as an unknown error, is null."""
        return dict(drop_nan(dataclasses.asdict(self)))

    def __str__(self) -> str:
        samples = f", {self.num_samples} samples" if self.num_samples else ""
        lines = [
            f"Population statistics re-estimated: {len(self.reached)} sets from {self.num_batches} batches{samples}."
        ]

        if self.reached:
            farthest = max(self.reached, key=lambda estimate: estimate.mean_shift)
            coarsest = max(self.reached, key=lambda estimate: estimate.error)
            shift, error = f"{farthest.mean_shift:.2f} standard deviations", _percent(coarsest.error)
            size = self.population_size
            of_images = "" if size is None else f", for the statistics of all {size:,} images"
            lines.append(f"  farthest from before: {farthest.name}, mean by {shift}")
            lines.append(f"  largest standard error: {coarsest.name}, {error} (p95 over channels{of_images})")

        coarse = sorted(self.not_converged, key=lambda estimate: -estimate.error)
        limit = _percent(self.tolerance or 0)
        for estimate in coarse[:_SHOWN]:
            error = f"standard error {_percent(estimate.error)} of a tolerance of {limit}"
            lines.append(f"  not converged: {estimate.name}, {error} after {estimate.num_batches} batches")
        if len(coarse) > _SHOWN:
            lines.append(f"  not converged: {len(coarse) - _SHOWN} more, up to {_percent(coarse[_SHOWN].error)}")

        if self.not_reached:
            names = [f"{estimate.path} {' '.join(estimate.levels)}".rstrip() for estimate in self.not_reached]
            lines.append(f"  not reached, left as it was: {list_few(names, _SHOWN)}")
        return "\n".join(lines)


def _percent(value: float) -> str:
    return "unknown" if math.isinf(value) else f"{100 * value:.2g} %"

"""When a re-estimation knows enough: how sure each set of statistics is, and which ones still need images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import LockStep
from bnext.functional import share_of_variance
from bnext.layers.batch_norm import BatchNorm2d
from bnext.statistics.collector import Collector

__all__ = ["StopRule"]

_FIRST_CHECK, _CHECK_PERIOD = 8, 4  # rounds before and between looks at the standard errors


class StopRule:
    """Ends a pass as soon as the standard errors of all reached sets are small enough.

    Args:
        norms: path -> norm.
        collectors: by state, of these norms.
        tolerance, population_size: see `recompute_population_statistics`.

    Attributes:
        wanted: norms that were not sure enough at the last look; empty before the first. A forward may leave out what
            the others alone need: they keep what they know.
    """

    def __init__(
        self,
        norms: Mapping[str, _BatchNorm],
        collectors: Mapping[Any, Collector],
        tolerance: float | None,
        population_size: int | None,
    ) -> None:
        self._norms, self._sets = norms, list(collectors.values())
        self._tolerance, self._population_size = tolerance, population_size
        self._num_samples: dict[Collector, int] = {}  # of each set at the last merge
        self.wanted: frozenset[nn.Module] = frozenset()

    def is_enough(self, rounds: LockStep, bar: Any) -> bool:
        """Whether the pass may end after these rounds. A collective, every few rounds."""
        bar.update()
        is_look = rounds.num_rounds >= _FIRST_CHECK and rounds.num_rounds % _CHECK_PERIOD == 0
        if self._tolerance is None or not is_look:
            return False

        rounds.check_failures()  # whoever has failed does not come to the look
        errors: list[float] = []
        wanted = set()
        for collector in self.merge_over_workers(rounds):
            is_reached = bool(collector.total.count > 0)
            error = max(collector.measure_errors()) if is_reached else math.inf
            errors += [error] if is_reached else []  # one that is not reached has no error to wait for
            if not error <= self._tolerance:
                wanted.add(self._norms[collector.path])

        self.wanted = frozenset(wanted)
        largest = max(errors, default=math.inf)
        bar.set_postfix_str(f"standard error {100 * largest:.2g} %", refresh=False)
        return largest <= self._tolerance

    def merge_over_workers(self, rounds: LockStep) -> list[Collector]:
        """The sets as all workers have seen them, in these rounds. A collective."""
        every = [collector.merge_over_workers() for collector in self._sets]
        if self._population_size is None:
            return every

        smallest = self._count_together(rounds.num_images / max(rounds.num_batches, 1))
        for collector, merged in zip(self._sets, every, strict=True):
            if merged.num_samples != self._num_samples.get(collector):  # else it was left out
                size = smallest if merged.is_dependent else math.inf
                size = 1 if merged.is_random else size
                collector.share = share_of_variance(rounds.num_images, self._population_size, size)
            self._num_samples[collector] = merged.num_samples
            merged.share = collector.share
        return every

    def _count_together(self, batch_size: float) -> float:
        """Images of the smallest mini-batch in which a norm takes a batch of that size; it cuts it evenly."""
        specs = [norm.spec for norm in self._norms.values() if isinstance(norm, BatchNorm2d)]
        sizes = [spec.normalization_batch_size for spec in specs if spec.normalization_batch_size is not None]
        return min([batch_size, *(batch_size / math.ceil(batch_size / size) for size in sizes)])

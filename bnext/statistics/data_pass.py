"""One pass over the data: batch by batch through the model, in lock-step with the other workers."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from bnext.distributed.lock_step import LockStep, count_images
from bnext.errors import StatisticsError
from bnext.layers.shuffled import shares_work
from bnext.scope import use_domain
from bnext.statistics.collector import Collector

__all__ = ["DataPass", "Domain", "Forward"]

Forward = Callable[[nn.Module, Any], object]
Domain = str | Callable[[Any], str | Sequence[str]]
_WHERE = "recompute_population_statistics"


class DataPass:
    """Runs a model on data, as often as is asked.

    Args:
        model: its modes are as they are to be.
        data, forward, domain, num_batches, num_samples: see `recompute_population_statistics`.
        collectors: all that a forward may fill.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        collectors: Sequence[Collector],
        *,
        forward: Forward | None = None,
        domain: Domain | None = None,
        num_batches: int | None = None,
        num_samples: int | None = None,
    ) -> None:
        self.model = model
        self._data, self._forward, self._domain = data, forward, domain
        self._collectors = collectors
        self._max_rounds, self._enough_images = num_batches, num_samples
        self._images: dict[str, int] = {}  # domain -> images of the last batch; "": not known here

    def go(
        self,
        collectors: Iterable[Collector],
        *,
        call: Callable[[Any], object] | None = None,
        is_enough: Callable[[LockStep], bool] = lambda rounds: False,
    ) -> LockStep:
        """Go through the data once.

        Args:
            collectors: whose batches end with those of the data.
            call: runs a batch; None: `run`.
            is_enough: called after each round; if it is true, the pass ends.

        Returns:
            The rounds that were gone through.

        Raises:
            StatisticsError: a worker has failed; on itself, its own error.
        """
        rounds = LockStep(
            self._data,
            self._collectors[0].device,
            _WHERE,
            shares_work=shares_work(self.model),
            max_rounds=self._max_rounds,
            enough_images=self._enough_images,
        )

        for batch, is_new in rounds:
            if is_new:
                rounds.run(partial(call or self.run, batch))
                for collector in collectors:
                    collector.end_batch(self._images)
            if is_enough(rounds):
                break
        return rounds

    def run(self, batch: Any) -> None:
        """Run a batch through the model, in its domain."""
        domain = self._domain(batch) if callable(self._domain) else self._domain
        is_one = domain is None or isinstance(domain, str)
        self._images = {str(domain or ""): count_images(batch)} if is_one else dict(collections.Counter(domain))

        with contextlib.nullcontext() if domain is None else use_domain(domain):
            if self._forward is not None:
                self._forward(self.model, batch)
                return
            try:
                self.model(batch)
            except (TypeError, AttributeError) as error:
                if any(collector.is_reached for collector in self._collectors):
                    raise  # the model has taken the batch
                kinds = f"a batch of type {type(batch).__name__} and {type(error).__name__}"
                raise StatisticsError.of(
                    "forward",
                    "say how the model takes a batch, as model(batch) fails",
                    got=f"{kinds}: {str(error).splitlines()[0]}",
                    where=_WHERE,
                    remedy="For (inputs, labels) use forward=lambda model, batch: model(batch[0]).",
                ) from error

"""Batches that know their number, so that what a batch draws does not depend on what was run before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from bnext.evaluation.without_trace import drawing_from
from bnext.seeding import derive_seed

__all__ = ["NumberedBatches"]

Forward = Callable[[nn.Module, Any], object]


class NumberedBatches:
    """Goes through batches, as often as they can be gone through, and counts them.

    Args:
        batches: of this worker.

    Attributes:
        number: of batches taken since the beginning of this pass, those included that a resumed run passes over.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self.number = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.number = 0
        for batch in self._batches:
            self.number += 1
            yield batch

    def drawing(self, forward: Forward | None, seed: int, on_first: Callable[[], None] | None = None) -> Forward:
        """The same forward, which draws from a seed of the batch's own, such as the RoIs of an R-CNN.

        Args:
            forward: called as forward(model, batch); None: model(batch).
            seed: 0 or more.
            on_first: called before the first batch.
        """
        calls = [] if on_first is None else [on_first]

        def drawn(model: nn.Module, batch: Any) -> object:
            if calls:
                calls.pop()()
            with drawing_from(model, derive_seed(seed, self.number)):
                return model(batch) if forward is None else forward(model, batch)

        return drawn

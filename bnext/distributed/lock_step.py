"""Batches of all workers in lock-step: one of each worker per round, until none has one left, or one has failed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnext.distributed.collectives import all_gather_numbers
from bnext.distributed.groups import resolve_group
from bnext.errors import StatisticsError

__all__ = ["LockStep", "count_images"]

T = TypeVar("T")


class LockStep:
    """Gives (batch, is_new), round by round, on all workers as often.

    A worker that has none left while others have gets its last batch again, or None if it never had one: `is_new` is
    False, and nothing may count it. A failure of a worker ends the rounds of all: it is told in the next round, and
    then raised, its own error on the worker itself.

    Args:
        batches: this worker's.
        device: for the numbers that workers exchange.
        where: the function that goes through them, in messages.
        shares_work: whether the forward of a batch needs the other workers. The rounds end with the shortest data then,
            and a failure in a forward is raised at once: who waits in a layer cannot be told.
        repeats_last: a worker runs its last batch again where it has none left, so that all data are used. Each must
            have a batch.
        max_rounds: at most; None: all.
        enough_images: over all workers; the round that reaches it is the last one. None: all.

    Attributes:
        num_rounds: so far.
        num_batches: in them, over all workers.
        num_images: in those.

    Raises:
        StatisticsError: another worker has failed, a batch is None, or there is none on some worker.

    Note:
        A collective in every round. Whoever leaves the loop himself calls `check_failures` first.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        device: torch.device,
        where: str,
        *,
        shares_work: bool = False,
        repeats_last: bool = False,
        max_rounds: int | None = None,
        enough_images: int | None = None,
    ) -> None:
        self._batches, self._device, self._where = batches, device, where
        self._shares_work, self._repeats_last = shares_work, repeats_last
        self._max_rounds, self._enough_images = max_rounds, enough_images
        self._failure: Exception | None = None
        self._num_own_images = 0
        self.num_rounds = self.num_batches = self.num_images = 0

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        everyone, batch = resolve_group("all"), None
        iterator = itertools.chain(self._batches)  # begins to iterate in the first round, where a failure is told

        while not self._is_enough():
            new = self._take(iterator)
            message = [len(new), int(self._failure is not None), self._num_own_images]
            every = all_gather_numbers(message, everyone, self._device, self._where)
            self._raise_failures([failed for _, failed, _ in every])

            present = [has for has, _, _ in every]
            is_over = self._shares_work and not self._repeats_last and not all(present)
            if is_over or not any(present):
                return
            if self._repeats_last and self.num_rounds == 0 and not all(present):
                rule, got = "hold at least one on every worker", f"none on worker {present.index(0)}"
                remedy = "Use smaller batches, more images, or fewer workers."
                raise StatisticsError.of("batches", rule, got=got, where=self._where, remedy=remedy)

            self.num_rounds += 1
            self.num_batches += sum(present)
            self.num_images = sum(images for _, _, images in every)
            batch = new[0] if new else batch
            yield batch, bool(new)

        self.check_failures()

    def _is_enough(self) -> bool:
        is_long = self._max_rounds is not None and self.num_rounds >= self._max_rounds
        return is_long or (self._enough_images is not None and self.num_images >= self._enough_images)

    def _take(self, iterator: Iterator[Any]) -> list[Any]:
        """The next batch; none at the end of the data, or after a failure."""
        if self._failure is not None:
            return []

        try:
            new = list(itertools.islice(iterator, 1))
            if new and new[0] is None:
                remedy = "Leave it out of the data."
                raise StatisticsError.of("a batch", "not be None", got="None", where=self._where, remedy=remedy)
            self._num_own_images += sum(map(count_images, new))
        except Exception as error:
            self._failure = error
            return []
        return new

    def run(self, step: Callable[[], T]) -> T | None:
        """Do this worker's part of a round; None if it fails, which the others are told in the next one."""
        try:
            return step()
        except Exception as error:
            if self._shares_work or resolve_group("all") is None:
                raise
            self._failure = error
            return None

    def check_failures(self) -> None:
        """Raise if a worker has failed in this round. A collective."""
        failed = [int(self._failure is not None)]
        every = all_gather_numbers(failed, resolve_group("all"), self._device, self._where)
        self._raise_failures([failed for (failed,) in every])

    def _raise_failures(self, failed: list[int]) -> None:
        if self._failure is not None:
            raise self._failure
        if any(failed):
            raise StatisticsError.of(
                "every worker",
                "reach the end of its data",
                got=f"a failure on worker {failed.index(1)}",
                where=self._where,
                remedy="Its own message says why; the model is as it was.",
            )


def count_images(batch: Any) -> int:
    """Samples in a batch, in the forms in which loaders give them.

    A tensor: its rows. A list of records, or of images [C, H, W]: its entries. (inputs, labels), as a pair of tensors
    or of lists (torchvision's references): those of the inputs. A dictionary: those of its first value that is a
    tensor with dimensions, or a list. A list of tensors of three dimensions is one of images, whatever else it may be.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        values = batch.values()
        return count_images(next((value for value in values if _has_rows(value)), 0))
    if not isinstance(batch, (list, tuple)):
        return len(batch) if isinstance(batch, Sized) and not isinstance(batch, str) else 1  # an ImageList, for one

    is_images = all(isinstance(entry, Tensor) and entry.dim() == 3 for entry in batch)
    is_pair = not is_images and bool(batch) and isinstance(batch[0], Tensor)
    is_pair = is_pair or (isinstance(batch, tuple) and bool(batch) and isinstance(batch[0], (tuple, list)))
    is_pair = is_pair or (len(batch) == 2 and all(isinstance(entry, list) for entry in batch))
    return count_images(batch[0]) if is_pair else len(batch)


def _has_rows(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    return isinstance(value, Sized) and not isinstance(value, str)

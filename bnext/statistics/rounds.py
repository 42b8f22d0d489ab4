"""Batches of all workers in lock-step: one of each worker per round, until no worker has one, or one has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bnext.distributed import all_gather_numbers, get_rank, resolve_group
from bnext.errors import StatisticsError

__all__ = ["Rounds", "count_images", "make_bar"]

_WHERE = "recompute_population_statistics"


class Rounds:
    """Iterates over rounds; gives this worker's batch, or None where it has none and others have.

    Args:
        data: this worker's batches.
        device: for the numbers that workers exchange.
        shares_work: whether the forward of a batch needs the other workers: it ends with the shortest data.
        num_batches: of each worker, at most; None: all.
        num_samples: images over all workers, at least, if there are so many; None: all.
        skip: batches that were used before, which are loaded and passed over.

    Attributes:
        num_batches: used so far, over all workers.
        num_samples: images in them.
        done: rounds so far, the skipped ones included.
    """

    def __init__(
        self,
        data: Iterable[Any],
        device: torch.device,
        *,
        shares_work: bool = False,
        num_batches: int | None = None,
        num_samples: int | None = None,
        skip: int = 0,
    ) -> None:
        self._data, self._device = data, device
        self._shares = shares_work
        self._limits = num_batches, num_samples
        self._skip = skip
        self._failure: Exception | None = None
        self._own_samples = 0
        self.num_batches = self.num_samples = self.done = 0

    def __iter__(self) -> Iterator[Any]:
        ended, batches = object(), iter(())
        everyone = resolve_group("all")
        while not self._is_enough():
            batch = ended
            try:
                batches = iter(self._data) if self.done == 0 else batches
                batch = ended if self._failure is not None else next(batches, ended)
                if batch is None:
                    raise StatisticsError(f"a batch must not be None; got None ({_WHERE}). Leave it out of the data.")
                self._own_samples += 0 if batch is ended else count_images(batch)
            except Exception as error:
                self._failure = error
            message = [int(batch is not ended), int(self._failure is not None), self._own_samples]
            every = all_gather_numbers(message, everyone, self._device, _WHERE)
            self._raise_failures([failed for _, failed, _ in every])
            num_present = sum(has for has, _, _ in every)
            if num_present == 0 or (self._shares and num_present < len(every)):
                return
            self.done += 1
            self.num_batches += num_present
            self.num_samples = sum(samples for _, _, samples in every)
            if self.done > self._skip:
                yield None if batch is ended else batch

    def _is_enough(self) -> bool:
        num_batches, num_samples = self._limits
        is_long = num_batches is not None and self.done >= num_batches
        return is_long or (num_samples is not None and self.num_samples >= num_samples)

    def run(self, step: Callable[[], object]) -> None:
        """Do this worker's part of a round; if it fails, the others are told in the next one, and then it is raised."""
        try:
            step()
        except Exception as error:
            if self._shares or resolve_group("all") is None:
                raise  # who waits for this worker in a forward cannot be told
            self._failure = error

    def finish(self) -> None:
        """After a round that is to be the last one: whether all have ended it."""
        every = all_gather_numbers([int(self._failure is not None)], resolve_group("all"), self._device, _WHERE)
        self._raise_failures([failed for (failed,) in every])

    def _raise_failures(self, failed: list[int]) -> None:
        if self._failure is not None:
            raise self._failure
        if any(failed):
            raise StatisticsError(
                f"every worker must reach the end of its data; got a failure on worker {failed.index(1)} ({_WHERE}). "
                f"Its own message says why; the statistics are as they were."
            )


def make_bar(is_wanted: bool, num_batches: int | None) -> Any:
    """A progress bar of rounds, on the first worker's terminal."""
    is_shown = is_wanted and get_rank(resolve_group("all")) == 0
    disable = None if is_shown else True  # None: shown on a terminal only
    return tqdm(total=num_batches, desc="re-estimating", unit="batch", disable=disable)


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
        return count_images(next((v for v in values if _has_rows(v)), 0))
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

"""Which images make up the batch of an iteration: a pure function of the seed and the iteration.

The stream of a training is one shuffled pass over the data set after the other. A sample is named
by its position in that stream as well as by its index in the data set, so that its augmentation
can be seeded without knowing who loads it. Nothing here reads an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from bnext.errors import ConfigError
from bnext.seeding import derive_seed

__all__ = ["BatchSampler", "aspect_ratio_groups", "check_batch_size"]

_SHUFFLE = 1  # what the derived seed is for


def aspect_ratio_groups(dataset_dicts: Sequence[dict[str, Any]]) -> list[int]:
    """The group of each image for batches of one orientation: 0 landscape, 1 portrait or square.

    Args:
        dataset_dicts: records in Detectron2's format.

    Raises:
        ConfigError: if a record lacks "width" or "height".
    """
    if any("width" not in record or "height" not in record for record in dataset_dicts):
        raise ConfigError(
            "DATALOADER.ASPECT_RATIO_GROUPING must be False for records without width and height; "
            "got True (DATASETS.TRAIN). Add the two sizes to every record, or set it to False."
        )
    return [0 if record["width"] > record["height"] else 1 for record in dataset_dicts]


def check_batch_size(total_batch_size: int, num_workers: int) -> None:
    """Refuse a batch that cannot be dealt to the workers in equal parts.

    Args:
        total_batch_size: SOLVER.IMS_PER_BATCH, images per SGD step over all workers.
        num_workers: 1 or more.

    Raises:
        ConfigError: if it is no positive multiple of the number of workers.
    """
    if total_batch_size < 1 or total_batch_size % num_workers:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of the {num_workers} worker(s) (--num-gpus x "
            f"--num-machines); got {total_batch_size}. Change one of the two."
        )


class BatchSampler(Sampler):
    """Endless batches of (position in the stream, index in the data set) for one worker.

    Without groups, iteration t takes positions t*B to (t+1)*B - 1 of the stream (B: total batch
    size), each worker its own slice: the union over workers does not depend on their number. With
    groups, images of a group are collected from the stream until they fill one worker's batch;
    the batches so found go to the workers in turn.

    Args:
        size: images in the data set.
        total_batch_size: images per SGD step over all workers; a multiple of `world_size`.
        seed: an integer of 0 or more, the same on every worker.
        rank: this worker, in [0, world_size).
        world_size: number of workers.
        groups: None, or the group of each image; a worker's batch then holds images of one group.
        start_iteration: the iteration of the first batch given out.

    Raises:
        ConfigError: if the total batch size is not a positive multiple of the number of workers, or
            the data set is empty.

    Example:
        >>> whole = [batch for batch, _ in zip(BatchSampler(10, 4, seed=0), range(6))]
        >>> later = BatchSampler(10, 4, seed=0, start_iteration=5)
        >>> next(iter(later)) == whole[5]
        True
    """

    def __init__(
        self,
        size: int,
        total_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
        start_iteration: int = 0,
    ) -> None:
        if size < 1:
            raise ConfigError(
                "DATASETS.TRAIN must have at least one image to train on; got 0. Name data sets with images, "
                "or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
            )
        check_batch_size(total_batch_size, world_size)
        self.size = size
        self.total_batch_size = total_batch_size
        self.batch_size = total_batch_size // world_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.groups = groups
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.groups is None:
            return self._plain_batches()
        first = self.start_iteration * self.world_size + self.rank
        return islice(self._grouped_batches(self.groups), first, None, self.world_size)

    def _plain_batches(self) -> Iterator[list[tuple[int, int]]]:
        start = self.start_iteration * self.total_batch_size
        stream = self._stream(start)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            yield list(islice(stream, self.total_batch_size))[mine]

    def _grouped_batches(self, groups: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        for position, index in self._stream(0):
            batch = waiting.setdefault(groups[index], [])
            batch.append((position, index))
            if len(batch) == self.batch_size:
                yield waiting.pop(groups[index])

    def _stream(self, start: int) -> Iterator[tuple[int, int]]:
        epoch, offset = divmod(start, self.size)
        while True:
            order = np.random.default_rng(derive_seed(self.seed, _SHUFFLE, epoch)).permutation(self.size)
            for place in range(offset, self.size):
                yield epoch * self.size + place, int(order[place])
            epoch, offset = epoch + 1, 0

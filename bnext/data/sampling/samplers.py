"""Samplers of one shuffled stream of images, and the sizes of their batches.

The stream of a training is one shuffled pass over the data set after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from detectron2.config import CfgNode
from torch.utils.data import Sampler

from bnext.data.records import Record
from bnext.errors import ConfigError
from bnext.seeding import Purpose, derive_seed

__all__ = [
    "BatchSampler",
    "GroupedBatchSampler",
    "aspect_ratio_groups",
    "check_batch_size",
    "count_micro_batch",
    "shuffle_forever",
]

Sample = tuple[int, int]  # position in the stream, index in the data set


def shuffle_forever(size: int, seed: int, start: int = 0) -> Iterator[Sample]:
    """The stream of a training: every image once, in random order, then again in another.

    Args:
        size: images in the data set, 1 or more.
        seed: an integer of 0 or more.
        start: position of the first sample given out.
    """
    epoch, offset = divmod(start, size)
    while True:
        order = np.random.default_rng(derive_seed(seed, Purpose.SHUFFLE, epoch)).permutation(size)
        for place in range(offset, size):
            yield epoch * size + place, int(order[place])

        epoch, offset = epoch + 1, 0


class BatchSampler(Sampler[list[Sample]]):
    """Endless batches of (position in the stream, index in the data set) for one worker.

    Iteration t takes positions t*B to (t+1)*B - 1 of the stream (B: total batch size), each worker its own slice: the
    union over workers does not depend on their number.

    Args:
        size: images in the data set.
        total_batch_size: images per SGD step over all workers; a multiple of `world_size`.
        seed: an integer of 0 or more, the same on every worker.
        rank: this worker, in [0, world_size).
        world_size: number of workers.
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
        start_iteration: int = 0,
    ) -> None:
        if size < 1:
            raise ConfigError.of(
                "DATASETS.TRAIN",
                "have at least one image to train on",
                got="0",
                remedy="Name data sets with images, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False.",
            )
        check_batch_size(total_batch_size, world_size)

        self.size = size
        self.total_batch_size = total_batch_size
        self.batch_size = total_batch_size // world_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[Sample]]:
        stream = shuffle_forever(self.size, self.seed, self.start_iteration * self.total_batch_size)
        share = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            yield list(islice(stream, self.total_batch_size))[share]

    def list_alike(self, index: int) -> Sequence[int]:
        """Images, by their indices, that may stand in the place of one that cannot be used."""
        return range(self.size)


class GroupedBatchSampler(BatchSampler):
    """Endless batches whose images are all of one group, such as those of one orientation.

    Images of a group are collected from the stream until they fill one worker's batch; the batches so found go to the
    workers in turn.

    Args:
        groups: the group of each image in the data set.
        total_batch_size, seed, rank, world_size, start_iteration: see `BatchSampler`.
    """

    def __init__(self, groups: Sequence[int], total_batch_size: int, **options: int) -> None:
        super().__init__(len(groups), total_batch_size, **options)
        self.groups = groups

    def __iter__(self) -> Iterator[list[Sample]]:
        first = self.start_iteration * self.world_size + self.rank
        return islice(self._collect(), first, None, self.world_size)

    def _collect(self) -> Iterator[list[Sample]]:
        waiting: dict[int, list[Sample]] = {}
        for position, index in shuffle_forever(self.size, self.seed):
            group = self.groups[index]
            batch = waiting.setdefault(group, [])
            batch.append((position, index))

            if len(batch) == self.batch_size:
                yield waiting.pop(group)


def aspect_ratio_groups(records: Sequence[Record]) -> list[int]:
    """The group of each image for batches of one orientation: 0 landscape, 1 portrait or square.

    Args:
        records: in Detectron2's format.

    Raises:
        ConfigError: if a record lacks "width" or "height".
    """
    if any("width" not in record or "height" not in record for record in records):
        raise ConfigError.of(
            "DATALOADER.ASPECT_RATIO_GROUPING",
            "be False for records without width and height",
            got=True,
            where="DATASETS.TRAIN",
            remedy="Add the two sizes to every record, or set it to False.",
        )

    return [0 if record["width"] > record["height"] else 1 for record in records]


def count_micro_batch(cfg: CfgNode) -> int:
    """Images over all workers that a training runs through the model together, which its norms see.

    Args:
        cfg: SOLVER.IMS_PER_BATCH, of a step, and SOLVER.BNEXT.ACCUMULATE are read.
    """
    return max(1, int(cfg.SOLVER.IMS_PER_BATCH) // int(cfg.SOLVER.BNEXT.ACCUMULATE))


def check_batch_size(total_batch_size: int, num_workers: int) -> None:
    """Refuse a batch that cannot be dealt to the workers in equal parts.

    Args:
        total_batch_size: SOLVER.IMS_PER_BATCH, images per SGD step over all workers.
        num_workers: 1 or more.

    Raises:
        ConfigError: if it is no positive multiple of the number of workers.
    """
    if total_batch_size < 1 or total_batch_size % num_workers:
        raise ConfigError.of(
            "SOLVER.IMS_PER_BATCH",
            f"be a positive multiple of the {num_workers} worker(s) (--num-gpus x --num-machines)",
            got=total_batch_size,
            remedy="Change one of the two.",
        )

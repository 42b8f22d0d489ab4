"""The training data loader: the same images and augmentations in iteration t, whoever loads them.

Detectron2's own loader builds its random state as it goes; after a resume it starts over with the
first images. This one can begin at any iteration without reading what came before.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import Dataset

from bnext.data.batches import CheckedMapper, limit_loader_workers, load_batches
from bnext.data.records import load_train_records
from bnext.data.sampler import BatchSampler, aspect_ratio_groups
from bnext.errors import DatasetError
from bnext.seeding import derive_seed, seeded

__all__ = ["MappedDataset", "TrainLoader", "build_train_loader", "share_seed"]

_AUGMENT, _REPLACE = 2, 3  # what the derived seeds are for
_MAX_REPLACEMENTS = 100


class MappedDataset(Dataset):
    """Records of a data set, mapped with random numbers that depend on the place in the stream only.

    Args:
        records: Detectron2's records.
        mapper: turns a record into the model's input; None asks for another image.
        seed: the training's seed.

    Raises:
        DatasetError: on access, if the mapper rejects 100 images in a row.
    """

    def __init__(self, records: Any, mapper: Callable[[dict[str, Any]], dict[str, Any] | None], seed: int) -> None:
        self.records = records
        self.mapper = CheckedMapper(mapper)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        position, index = sample
        others = np.random.default_rng(derive_seed(self.seed, _REPLACE, position))

        with seeded(derive_seed(self.seed, _AUGMENT, position)):
            for _ in range(_MAX_REPLACEMENTS):
                mapped = self.mapper(self.records[index])
                if mapped is not None:
                    return mapped
                index = int(others.integers(len(self.records)))

        raise DatasetError.of(
            "The mapper",
            "accept some image",
            got=f"None for {_MAX_REPLACEMENTS} images in a row",
            where=f"the last one: record {index}",
            remedy="Check the augmentations and the annotations of DATASETS.TRAIN.",
        )


class TrainLoader:
    """Endless training batches of one worker, from `start_iteration` on.

    Args:
        records: Detectron2's records, e.g. from `get_detection_dataset_dicts`.
        mapper: turns a record into the model's input, e.g. `DatasetMapper(cfg, True)`.
        total_batch_size: images per SGD step over all workers.
        seed: an integer of 0 or more, the same on every worker.
        num_loader_workers: processes that load; has no influence on what comes out.
        group_by_aspect_ratio: batches of landscape or of portrait images only.

    Raises:
        ConfigError: if the total batch size cannot be dealt to the workers (`BatchSampler`).

    Note:
        `seed` and `start_iteration` may be changed until the first batch is taken.
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any] | None],
        total_batch_size: int,
        *,
        seed: int,
        num_loader_workers: int = 0,
        group_by_aspect_ratio: bool = False,
    ) -> None:
        self.seed = seed
        self.start_iteration = 0
        self.total_batch_size = total_batch_size
        self._groups = aspect_ratio_groups(records) if group_by_aspect_ratio else None
        self._size = len(records)
        self._batches()  # complains now, not at the first batch
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        self._num_loader_workers = num_loader_workers

    def _batches(self) -> BatchSampler:
        return BatchSampler(
            self._size,
            self.total_batch_size,
            seed=self.seed,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            groups=self._groups,
            start_iteration=self.start_iteration,
        )

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator: nothing starts before the first batch is taken, so a resume can still set where.
        dataset = MappedDataset(self._records, self._mapper, self.seed)
        yield from load_batches(dataset, self._batches(), self._num_loader_workers)


def share_seed(seed: int) -> int:
    """The seed of all workers: the one given, or, where it is negative, one drawn by worker 0.

    Args:
        seed: cfg.SEED.

    Note:
        A collective where the seed is negative.
    """
    return seed if seed >= 0 else comm.all_gather(secrets.randbits(31))[0]


def build_train_loader(cfg: CfgNode, mapper: Callable[..., Any] | None = None) -> Any:
    """The training loader of a config.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER.*, INPUT.*, SOLVER.IMS_PER_BATCH and SEED are read.
        mapper: instead of Detectron2's `DatasetMapper(cfg, True)`.

    Returns:
        A `TrainLoader`; for a DATALOADER.SAMPLER_TRAIN other than "TrainingSampler" Detectron2's own
        loader, which cannot be resumed exactly (a warning says so).

    Raises:
        ConfigError: if SOLVER.IMS_PER_BATCH is not a multiple of the number of workers.
        DatasetError: if no image is left to train on.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        logging.getLogger(__name__).warning(
            "DATALOADER.SAMPLER_TRAIN %s starts over after a resume: a resumed training then sees other images "
            "than an uninterrupted one. TrainingSampler resumes exactly.",
            cfg.DATALOADER.SAMPLER_TRAIN,
        )
        return build_detection_train_loader(cfg, mapper=mapper)
    return TrainLoader(
        load_train_records(cfg),
        mapper or DatasetMapper(cfg, True),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=share_seed(cfg.SEED),
        num_loader_workers=limit_loader_workers(cfg.DATALOADER.NUM_WORKERS),
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )

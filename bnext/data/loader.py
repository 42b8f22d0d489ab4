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
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from bnext.data.sampler import BatchSampler, aspect_ratio_groups
from bnext.distributed.groups import count_cores
from bnext.errors import DatasetError
from bnext.seeding import derive_seed, seeded

__all__ = ["MappedDataset", "TrainLoader", "build_train_loader", "limit_loader_workers", "share_seed"]

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
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        position, index = sample
        others = np.random.default_rng(derive_seed(self.seed, _REPLACE, position))
        with seeded(derive_seed(self.seed, _AUGMENT, position)):
            for _ in range(_MAX_REPLACEMENTS):
                mapped = self._map(self.records[index])
                if mapped is not None:
                    return mapped
                index = int(others.integers(len(self.records)))
        raise DatasetError(
            f"The mapper must accept some image; got None for {_MAX_REPLACEMENTS} images in a row (the last one: "
            f"record {index}). Check the augmentations and the annotations of DATASETS.TRAIN."
        )

    def _map(self, record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.mapper(record)
        except (OSError, SizeMismatchError) as error:
            raise DatasetError(
                f"An image of DATASETS.TRAIN must be readable and as large as its record says; got "
                f"{type(error).__name__}: {error} ({record.get('file_name')}). Restore the file, or remove its record."
            ) from error


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
        yield from DataLoader(
            MappedDataset(self._records, self._mapper, self.seed),
            batch_sampler=self._batches(),
            num_workers=self._num_loader_workers,
            collate_fn=_keep_list,
            generator=torch.Generator(),  # else torch would draw from the global generator
        )


def _keep_list(batch: list[Any]) -> list[Any]:
    return batch


def limit_loader_workers(wanted: int) -> int:
    """At most as many loading processes as this worker's share of the CPU cores.

    Args:
        wanted: DATALOADER.NUM_WORKERS.
    """
    return min(wanted, max(1, count_cores() // comm.get_local_size()))


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
        _train_records(cfg),
        mapper or DatasetMapper(cfg, True),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=share_seed(cfg.SEED),
        num_loader_workers=limit_loader_workers(cfg.DATALOADER.NUM_WORKERS),
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )


def _train_records(cfg: CfgNode) -> list[dict[str, Any]]:
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    try:
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            proposal_files=proposals,
        )
    except AssertionError as error:  # how Detectron2 says that nothing is left
        raise DatasetError(
            f"DATASETS.TRAIN must have at least one usable image; got none ({error or list(cfg.DATASETS.TRAIN)}). "
            "Check the annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        ) from error

"""The training data loader: the same images and augmentations in iteration t, whoever loads them.

Detectron2's own loader builds its random state as it goes; after a resume it starts over with the
first images. This one can begin at any iteration without reading what came before.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import Dataset

from bnext.data.batches import limit_loader_workers, load_batches
from bnext.data.mapping import CheckedMapper, Mapper, build_mapper
from bnext.data.records import Record, load_train_records
from bnext.data.sampling.build import build_sampler
from bnext.data.sampling.domain_batches import DomainBatchSampler
from bnext.data.sampling.samplers import BatchSampler, Sample
from bnext.errors import DatasetError
from bnext.lazy_config import is_lazy
from bnext.seeding import Purpose, derive_seed, seeded

__all__ = ["MappedDataset", "TrainLoader", "build_train_loader", "count_fixed_images", "share_seed"]

_MAX_REPLACEMENTS = 100


class Mapped(NamedTuple):
    """A mapped record, and the files of the records before it in whose place it stands."""

    record: Record
    refused: tuple[str, ...]


class MappedDataset(Dataset[Mapped]):
    """Records of a data set, mapped with random numbers that depend on the place in the stream only.

    Args:
        records: Detectron2's records.
        mapper: turns a record into the model's input; None asks for another image.
        sampler: has the training's seed, and says which images are alike.

    Raises:
        DatasetError: on access, if an image cannot be read, or the mapper rejects 100 images in a row.
    """

    def __init__(self, records: Any, mapper: Mapper, sampler: BatchSampler) -> None:
        self.records = records
        self.mapper = mapper if isinstance(mapper, CheckedMapper) else CheckedMapper(mapper)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: Sample) -> Mapped:
        position, index = sample
        seed, alike = self.sampler.seed, self.sampler.list_alike(index)
        refused: list[str] = []
        others = np.random.default_rng(derive_seed(seed, Purpose.REPLACE, position))

        with seeded(derive_seed(seed, Purpose.AUGMENT, position)):
            for _ in range(_MAX_REPLACEMENTS):
                record = self.records[index]
                mapped = self.mapper(record)
                if mapped is not None:
                    return Mapped(mapped, tuple(refused))

                refused.append(str(record.get("file_name", f"record {index}")))
                index = alike[int(others.integers(len(alike)))]

        raise DatasetError.of(
            "The mapper",
            "accept some image",
            got=f"None for {_MAX_REPLACEMENTS} images in a row",
            where=f"the last one: {refused[-1]}",
            remedy="Check the augmentations and the annotations of DATASETS.TRAIN.",
        )


class TrainLoader:
    """Endless training batches of one worker.

    Args:
        records: Detectron2's records, e.g. from `load_train_records`.
        mapper: turns a record into the model's input, e.g. `ImageMapper(cfg, True)`.
        sampler: says which records, and from which seed their augmentations are drawn.
        num_loader_workers: processes that load; has no influence on what comes out.

    Note:
        `sampler.seed` and `sampler.start_iteration` may be changed until the first batch is taken. Images in whose
        place others are taken, as the mapper refused them, are counted; the 1st, the 10th, the 100th ... are said.
    """

    def __init__(
        self, records: list[Record], mapper: Mapper, sampler: BatchSampler, num_loader_workers: int = 0
    ) -> None:
        self.sampler = sampler
        self._records = DatasetFromList(records, copy=False)
        self._mapper = mapper
        self._num_loader_workers = num_loader_workers
        sizes = {(record.get("height"), record.get("width")) for record in records}
        self._is_of_one_size = len(sizes) == 1 and None not in next(iter(sizes))

    @property
    def num_images(self) -> int:
        """Records of the data sets."""
        return len(self._records)

    @property
    def is_of_one_size(self) -> bool:
        """Whether all records say the same height and width."""
        return self._is_of_one_size

    def __iter__(self) -> Iterator[list[Record]]:
        # A generator: nothing starts before the first batch is taken, so a resume can still set where.
        dataset = MappedDataset(self._records, self._mapper, self.sampler)
        num_refused, num_images = 0, 0

        for batch in load_batches(dataset, self.sampler, self._num_loader_workers):
            for mapped in batch:
                num_images += 1
                for file in mapped.refused:
                    num_refused += 1
                    _say_refused(file, num_refused, num_images)
            yield [mapped.record for mapped in batch]


def _say_refused(file: str, num_refused: int, num_images: int) -> None:
    if str(num_refused).strip("0") == "1":  # 1, 10, 100, ...
        logging.getLogger(__name__).warning(
            "The mapper has refused %d image(s) so far, while %d were trained on: random others take their places. "
            "The last one was %s.",
            num_refused,
            num_images,
            file,
        )


def share_seed(seed: int) -> int:
    """The seed of all workers: the one given, or, where it is negative, one drawn by worker 0.

    Args:
        seed: cfg.SEED.

    Note:
        A collective where the seed is negative.
    """
    return seed if seed >= 0 else comm.all_gather(secrets.randbits(31))[0]


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> Any:
    """The training loader of a config.

    Args:
        cfg: DATASETS.TRAIN, DATALOADER.*, INPUT.*, SOLVER.IMS_PER_BATCH and SEED are read.
        mapper: instead of `ImageMapper(cfg, True)`.

    Returns:
        A `TrainLoader`; for a DATALOADER.SAMPLER_TRAIN other than "TrainingSampler" Detectron2's own
        loader, which cannot be resumed exactly (a warning says so).

    Raises:
        ConfigError: if SOLVER.IMS_PER_BATCH is not a multiple of the number of workers.
        DatasetError: if no image is left to train on.
    """
    mapper = CheckedMapper(mapper) if mapper is not None else build_mapper(cfg, True)
    records = load_train_records(cfg)

    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        logging.getLogger(__name__).warning(
            "DATALOADER.SAMPLER_TRAIN %s starts over after a resume: a resumed training then sees other images "
            "than an uninterrupted one. TrainingSampler resumes exactly.",
            cfg.DATALOADER.SAMPLER_TRAIN,
        )
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)

    sampler = build_sampler(cfg, records, share_seed(cfg.SEED))
    num_loader_workers = limit_loader_workers(cfg.DATALOADER.NUM_WORKERS)
    return TrainLoader(records, mapper, sampler, num_loader_workers)


def count_fixed_images(cfg: CfgNode, loader: Any) -> int | None:
    """Number of training images, if each comes once before any comes again, and always alike; None if not.

    Args:
        cfg: INPUT.* is read: sizes, flips and crops that are drawn make images that never come again.
        loader: of `build_train_loader`.

    Note:
        Images of several sizes are not alike either: models pad them to the largest of their batch.
    """
    is_shuffled = isinstance(loader, TrainLoader) and not isinstance(loader.sampler, DomainBatchSampler)
    if is_lazy(cfg) or not is_shuffled:
        return None

    inputs = cfg.INPUT
    is_random = inputs.RANDOM_FLIP != "none" or inputs.CROP.ENABLED or len(set(inputs.MIN_SIZE_TRAIN)) > 1
    return None if is_random or not loader.is_of_one_size else loader.num_images

"""Batches of records: which images come together on this worker, and how they are read.

    records, a mapper and, for each batch, the indices of its records  ->  a loader of lists of mapped records

The batches here go once through data sets, for a detector that is not trained; in `loader` are those of a training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from bnext.data.classes import are_found_by_name, relabel_records
from bnext.data.mapping import build_mapper
from bnext.data.records import Record, has_labels, load_records
from bnext.data.sampling.samplers import count_micro_batch
from bnext.data.surroundings import TravellingDataset
from bnext.distributed.groups import count_cores
from bnext.errors import ConfigError
from bnext.seeding import Purpose, derive_seed

__all__ = [
    "build_evaluation_batches",
    "build_shuffled_batches",
    "build_validation_batches",
    "limit_loader_workers",
    "load_batches",
]


def limit_loader_workers(wanted: int) -> int:
    """At most as many loading processes as this worker's share of the CPU cores.

    Args:
        wanted: DATALOADER.NUM_WORKERS.
    """
    return min(wanted, max(1, count_cores() // comm.get_local_size()))


def load_batches(dataset: Dataset[Any], batches: Iterable[list[Any]], num_loader_workers: int) -> DataLoader[Any]:
    """A loader of lists of samples, which leaves the global random numbers alone.

    Args:
        dataset: gives a sample for each index.
        batches: the indices of each batch.
        num_loader_workers: processes that load; 0: this one.
    """
    return DataLoader(
        TravellingDataset(dataset),
        batch_sampler=batches,
        num_workers=num_loader_workers,
        collate_fn=list,
        generator=torch.Generator(),  # else torch would draw from the global one
    )


def _load_records(
    cfg: CfgNode, records: Sequence[Record], batches: Sequence[list[int]], *, labelled: bool
) -> DataLoader[Any]:
    """A loader of records as the test sees them, with the labels of a training where they are wanted."""
    mapper = build_mapper(cfg, labelled, as_test=True)
    dataset = MapDataset(DatasetFromList(records, copy=False), mapper)
    return load_batches(dataset, batches, limit_loader_workers(cfg.DATALOADER.NUM_WORKERS))


def build_evaluation_batches(
    cfg: CfgNode, records: Sequence[Record], indices: Iterable[int], images_per_batch: int = 1
) -> DataLoader[Any]:
    """Batches of records in their order, without labels; their sizes differ by at most one.

    Args:
        cfg: INPUT.* and DATALOADER.NUM_WORKERS are read.
        records: of all workers.
        indices: this worker's; there may be none.
        images_per_batch: at most.

    Raises:
        DatasetError: on access, an image cannot be read.
    """
    indices = list(indices)
    number = -(-len(indices) // images_per_batch)
    borders = [step * len(indices) // max(1, number) for step in range(number + 1)]
    batches = [indices[start:end] for start, end in itertools.pairwise(borders)]

    return _load_records(cfg, records, batches, labelled=False)


def build_validation_batches(cfg: CfgNode, name: str) -> DataLoader[Any]:
    """This worker's labelled batches of a data set, in its order, without random augmentations.

    Args:
        cfg: INPUT.*, SOLVER.IMS_PER_BATCH, TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES, DATALOADER.NUM_WORKERS are read.
        name: a registered data set with annotations.

    Returns:
        A loader. Over all workers a batch has as many images as a micro-batch of the training (`count_micro_batch`).

    Raises:
        ConfigError: no labels, or fewer images than workers.
        DatasetError: see `load_records`; on access, an image cannot be read.
    """
    records, world_size = load_records(name, cfg), comm.get_world_size()
    if not has_labels(records, ("annotations", "sem_seg_file_name")):
        raise ConfigError.of(
            "DATASETS.TEST",
            "name labelled data sets for a validation loss",
            got=f"{name!r}, whose records have no annotations",
            remedy="Name another one, or set TEST.BNEXT.VALIDATION_LOSS.PERIOD to 0.",
        )
    if len(records) < world_size:
        raise ConfigError.of(
            "DATASETS.TEST",
            f"name data sets with an image for each of the {world_size} workers for a validation loss",
            got=f"{len(records)} in {name!r}",
            remedy="Use fewer workers, or set TEST.BNEXT.VALIDATION_LOSS.PERIOD to 0.",
        )

    records = [_drop_null_crowds(record) for record in relabel_records(cfg, name, records)]
    size, number = count_micro_batch(cfg), cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES
    starts = range(0, len(records), size)[: number or None]
    batches = [range(start, min(start + size, len(records))) for start in starts]

    return _load_records(cfg, records, _take_shares(batches), labelled=True)


def _drop_null_crowds(record: Record) -> Record:
    """The record without `iscrowd` that is null: Detectron2 takes it for a crowd, the evaluation for an object."""
    if all(each.get("iscrowd", 0) is not None for each in record.get("annotations", ())):
        return record

    annotations = []
    for each in record["annotations"]:
        annotations.append({key: value for key, value in each.items() if key != "iscrowd" or value is not None})
    return {**record, "annotations": annotations}


def build_shuffled_batches(
    cfg: CfgNode, names: Sequence[str], *, domains: Sequence[str] = (), labelled: bool = False
) -> DataLoader[Any]:
    """This worker's batches of data sets in a random order that is always the same, without random augmentations.

    Args:
        cfg: INPUT.* of the test, SOLVER.IMS_PER_BATCH, SEED and DATALOADER.NUM_WORKERS are read.
        names: registered data sets; no annotations are needed.
        domains: one for each data set, in place of its own.
        labelled: whether labels are to be given as in training, for RoIs that are sampled by them.

    Returns:
        A loader. A batch has at most as many images as a micro-batch of the training (`count_micro_batch`) over all
        workers, all of one data set; those of a set differ in size by one image at most, and images that would be a
        batch of fewer than workers are left out. The batches of several sets alternate in proportion to their sizes,
        each set's first batch at the beginning: whoever stops early has seen all.

    Raises:
        DatasetError: see `load_records`; on access, an image cannot be read.
        ConfigError: labels are needed and there are none.
    """
    records: list[Record] = []
    parts = []
    for index, name in enumerate(names):
        added = load_records(name, cfg)
        if labelled and not has_labels(added):
            raise ConfigError.of(
                "Data sets",
                "be labelled where RoIs are sampled as in training",
                got=f"{name!r} without annotations",
                where="TEST.BNEXT.PRECISE_BN.ROIS is 'sampled'",
                remedy="Set TEST.BNEXT.PRECISE_BN.ROIS to 'top_scored'.",
            )
        if labelled and are_found_by_name(cfg, is_training=True):
            added = relabel_records(cfg, name, added)
        if domains:
            added = [{**record, "domain": domains[index]} for record in added]

        order = np.random.default_rng(derive_seed(max(cfg.SEED, 0), Purpose.ORDER, index)).permutation(len(added))
        parts.append(_cut(len(records) + order, count_micro_batch(cfg)))
        records += added

    return _load_records(cfg, records, _take_shares(_interleave(parts)), labelled=labelled)


def _cut(order: np.ndarray, size: int) -> list[list[int]]:
    """Batches of nearly equal sizes: a last one of one image would be no mini-batch at a level with one position."""
    rest = len(order) % size
    if rest < comm.get_world_size():
        order = order[: len(order) - rest]

    number = -(-len(order) // size)
    return [part.tolist() for part in np.array_split(order, number)] if number else []


def _interleave(parts: Sequence[list[list[int]]]) -> list[list[int]]:
    """The batches of all data sets, such that each has come equally far at any time."""
    places = []
    for number, part in enumerate(parts):
        places += [(index / len(part), number, index) for index in range(len(part))]

    return [parts[number][index] for _, number, index in sorted(places)]


def _take_shares(batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """This worker's part of each batch of all workers; a batch that leaves it none is left out."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    shares = [list(batch[rank::world_size]) for batch in batches]
    return [share for share in shares if share]

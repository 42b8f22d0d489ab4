"""The labelled batches of a validation loss: a data set in its order, without random augmentations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from torch.utils.data import DataLoader

from bnext.data.loader import limit_loader_workers
from bnext.distributed import get_rank, resolve_group
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import CheckedMapper, has_labels, load_records

__all__ = ["build_validation_batches"]


def build_validation_batches(cfg: CfgNode, name: str) -> Iterable[list[dict[str, Any]]]:
    """This worker's labelled batches of a data set, in its order, without random augmentations.

    Args:
        cfg: INPUT.*, SOLVER.IMS_PER_BATCH, TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES, DATALOADER.NUM_WORKERS are read.
        name: a registered data set with annotations.

    Returns:
        A loader. Over all workers a batch has SOLVER.IMS_PER_BATCH images, the same for any number of workers.

    Raises:
        ConfigError: no labels, or fewer images than workers.
        DatasetError: see `load_records`; on access, an image cannot be read.
    """
    records = load_records(name, cfg)
    if not has_labels(records, ("annotations", "sem_seg_file_name")):
        raise ConfigError(
            f"DATASETS.TEST must name labelled data sets for a validation loss; got {name!r}, whose records have no "
            f"annotations. Name another one, or set TEST.BNEXT.VALIDATION_LOSS.PERIOD to 0."
        )
    rank, world_size = get_rank(resolve_group("all")), comm.get_world_size()
    if len(records) < world_size:
        raise ConfigError(
            f"DATASETS.TEST must name data sets with an image for each of the {world_size} workers for a validation "
            f"loss; got {len(records)} in {name!r}. Use fewer workers, or set TEST.BNEXT.VALIDATION_LOSS.PERIOD to 0."
        )
    size, number = cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES
    starts = range(0, len(records), size)[: number or None]
    shares = [list(range(start, min(start + size, len(records))))[rank::world_size] for start in starts]
    return DataLoader(
        MapDataset(
            DatasetFromList(records, copy=False),
            CheckedMapper(DatasetMapper(cfg, True, augmentations=build_augmentation(cfg, False))),
        ),
        batch_sampler=[share for share in shares if share],
        num_workers=limit_loader_workers(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=list,
        generator=torch.Generator(),  # else torch would draw from the global one
    )

"""The choice of a sampler by a config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from bnext.data.records import Record, load_train_records
from bnext.data.sampling.domain_batches import DomainBatchSampler
from bnext.data.sampling.samplers import BatchSampler, GroupedBatchSampler, aspect_ratio_groups
from bnext.data.sampling.shares import check_ratios, choose_weights, read_domains
from bnext.notices import tell_once

__all__ = ["build_sampler", "check_domain_batches"]

_GROUPING = "DATALOADER.ASPECT_RATIO_GROUPING"


def build_sampler(cfg: CfgNode, records: Sequence[Record], seed: int) -> BatchSampler:
    """The sampler of this worker that a config asks for.

    Args:
        cfg: SOLVER.IMS_PER_BATCH and ACCUMULATE, DATALOADER.ASPECT_RATIO_GROUPING and DATALOADER.BNEXT.* are read.
        records: of the training, in Detectron2's format.
        seed: an integer of 0 or more, the same on every worker.

    Raises:
        ConfigError, DatasetError: see `BatchSampler`, `aspect_ratio_groups`, `read_domains` and `choose_weights`.
    """
    size = cfg.SOLVER.IMS_PER_BATCH
    options = {"seed": seed, "rank": comm.get_rank(), "world_size": comm.get_world_size()}

    if _has_domain_batches(cfg):
        return _build_domain_sampler(cfg, records, options)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return GroupedBatchSampler(aspect_ratio_groups(records), size, **options)
    return BatchSampler(len(records), size, **options)


def check_domain_batches(cfg: CfgNode) -> None:
    """Refuse batches of domains that the training sets cannot give; their records are read where there are any.

    Args:
        cfg: SOLVER.IMS_PER_BATCH, DATASETS.TRAIN and DATALOADER.* are read.

    Raises:
        ConfigError, DatasetError: see `check_ratios`, `read_domains` and `choose_weights`.
    """
    if not _has_domain_batches(cfg):
        return

    check_ratios(cfg)
    records = load_train_records(cfg)
    choose_weights(cfg, records, read_domains(cfg, records))


def _has_domain_batches(cfg: CfgNode) -> bool:
    node = cfg.DATALOADER.get("BNEXT")
    return node is not None and node.BATCHES != "mixed"


def _build_domain_sampler(cfg: CfgNode, records: Sequence[Record], options: dict[str, Any]) -> BatchSampler:
    node = cfg.DATALOADER.BNEXT
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING and _has_both_orientations(records):
        message = "%s has no effect, as DATALOADER.BNEXT.BATCHES is '%s': images of a batch are of both orientations."
        tell_once(logging.getLogger(__name__), (_GROUPING, node.BATCHES), message, _GROUPING, node.BATCHES)

    domains = read_domains(cfg, records)
    return DomainBatchSampler(
        domains,
        cfg.SOLVER.IMS_PER_BATCH,
        weights=choose_weights(cfg, records, domains),
        kind=node.BATCHES,
        num_micro_batches=cfg.SOLVER.BNEXT.ACCUMULATE,
        **options,
    )


def _has_both_orientations(records: Sequence[Record]) -> bool:
    return len({record.get("width", 0) > record.get("height", 0) for record in records}) > 1

"""Re-estimate population statistics of a detector on images: in a training, of a checkpoint, for another data set.

All of it is `recompute_statistics`; the others say on which images.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, DatasetMapper, MapDataset, get_detection_dataset_dicts
from detectron2.data.detection_utils import SizeMismatchError, build_augmentation
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader

from bnext.checkpoints.checkpointer import Checkpointer, load_model
from bnext.data.check import check_datasets
from bnext.data.loader import build_train_loader, limit_loader_workers
from bnext.errors import ConfigError, DatasetError
from bnext.evaluation.numbered_batches import NumberedBatches
from bnext.evaluation.without_trace import drawing_from
from bnext.files import is_same_file
from bnext.heads import forward_sampled_rois
from bnext.heads.statistics import choose_forward
from bnext.layers import LevelBatchNorm2d
from bnext.seeding import derive_seed
from bnext.statistics import RecomputeReport, recompute_population_statistics
from bnext.statistics.observe import Selection, select_norms

__all__ = [
    "CheckedMapper",
    "build_batches",
    "format_report",
    "has_labels",
    "is_level_norm",
    "load_records",
    "needs_labels",
    "recompute_statistics",
    "repair_checkpoint",
]

Forward = Callable[[nn.Module, Any], object]
_RECOMPUTE, _ORDER = 8, 11  # what the derived seeds are for
_DOMAIN = "bnext_domain"  # in a record: the domain of its image


def is_level_norm(path: str, module: nn.Module) -> bool:
    """Selects the norms of level-shared heads."""
    return isinstance(module, LevelBatchNorm2d)


def recompute_statistics(
    cfg: CfgNode,
    model: nn.Module,
    layers: Selection | None = None,
    *,
    batches: Iterable[Any] | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    on_first_batch: Callable[[], None] | None = None,
    **options: Any,
) -> RecomputeReport:
    """Re-estimate the statistics of a detector's norms on training images, or on what `batches` gives.

    Args:
        cfg: TEST.BNEXT.PRECISE_BN says how: estimator, tolerance, and the RoIs of an R-CNN. Without `batches` its
            training data, batch size and TEST.PRECISE_BN.NUM_ITER are used.
        model: the detector; of a dense one anchors, matching and losses are left out, of an R-CNN whatever follows
            its backbone, if no norm does.
        layers: called as layers(path, module), says which norms; None: all. Others keep their statistics.
        batches: of this worker, such as those of `build_batches`; None: the training's.
        num_batches: at most; None: TEST.PRECISE_BN.NUM_ITER of the training's, and all of `batches`.
        num_samples: enough images; None: not limited.
        on_first_batch: called when everything is checked and the first batch of this worker is there.
        options: further ones of `recompute_population_statistics`: source_samples, state_file, estimator.

    Raises:
        StatisticsError: see `recompute_population_statistics`.

    Note:
        A collective. Every worker uses its share of each batch.
    """
    node = cfg.TEST.BNEXT.PRECISE_BN
    forward = _choose_forward(cfg, model, layers)
    if batches is None:
        batches = build_train_loader(cfg)
        num_batches = num_batches or cfg.TEST.PRECISE_BN.NUM_ITER
    numbered = NumberedBatches(batches)
    arguments = {"estimator": node.ESTIMATOR, **options}
    if arguments["estimator"] != "layer_by_layer":  # every layer sees the same images
        arguments.setdefault("tolerance", node.TOLERANCE or None)
    seed = derive_seed(max(cfg.SEED, 0), _RECOMPUTE, comm.get_rank())
    with drawing_from(model, seed):  # what the loader draws
        report = recompute_population_statistics(
            model,
            numbered,
            num_batches=num_batches,
            num_samples=num_samples,
            forward=numbered.drawing(forward, seed, on_first_batch),
            layers=layers,
            domain=_read_domain if getattr(batches, "has_domains", False) else None,
            progress=True,
            **arguments,
        )
    logging.getLogger(__name__).info("%s", report)
    return report


def _choose_forward(cfg: CfgNode, model: nn.Module, layers: Selection | None = None) -> Forward | None:
    paths = [path for path, _ in select_norms(model, layers)]
    return choose_forward(model, paths, cfg.TEST.BNEXT.PRECISE_BN.ROIS)


def needs_labels(cfg: CfgNode, model: nn.Module) -> bool:
    """Whether the norms of a model are re-estimated on RoIs that are sampled by labels.

    Raises:
        StatisticsError: there is no norm to re-estimate.
    """
    return _choose_forward(cfg, model) is forward_sampled_rois


def _read_domain(batch: Sequence[dict[str, Any]]) -> str:
    return str(batch[0][_DOMAIN])  # a batch is of one data set


def load_records(name: str, cfg: CfgNode) -> list[dict[str, Any]]:
    """The records of a registered data set, labelled or not.

    Args:
        name: of the data set.
        cfg: DATASETS.PROPOSAL_FILES_TEST is read where the model wants proposals.

    Raises:
        DatasetError: it is unknown, empty, no list of records, or cannot be read.
    """
    if name not in DatasetCatalog:
        check_datasets([name])  # says so
    proposals = cfg.DATASETS.PROPOSAL_FILES_TEST if cfg.MODEL.LOAD_PROPOSALS else None
    try:
        records = list(get_detection_dataset_dicts([name], filter_empty=False, proposal_files=proposals))
    except Exception as error:  # whatever the function that was registered raises
        raise DatasetError(
            f"Data set {name!r} must be readable and have an image; got {type(error).__name__}: {error}. Correct its "
            f"files, or what it was registered with."
        ) from error
    kinds = {type(record).__name__ for record in records if not isinstance(record, dict)}
    if kinds:
        raise DatasetError(
            f"Data set {name!r} must be a list of records, a dict for each image; got entries of type "
            f"{', '.join(sorted(kinds))}. Correct the function that it was registered with."
        )
    return records


def has_labels(records: Iterable[dict[str, Any]], keys: Sequence[str] = ("annotations",)) -> bool:
    """Whether any image has an annotation, of one of several kinds; a list of none, as COCO's reader gives, is none."""
    return any(record.get(key) for record in records for key in keys)


def build_batches(
    cfg: CfgNode, names: Sequence[str], *, domains: Sequence[str] = (), labelled: bool = False
) -> DataLoader:
    """This worker's batches of data sets in a random order that is always the same, without random augmentations.

    Args:
        cfg: INPUT.* of the test, SOLVER.IMS_PER_BATCH, SEED and DATALOADER.NUM_WORKERS are read.
        names: registered data sets; no annotations are needed.
        domains: one for each data set, if norms have statistics per domain.
        labelled: whether labels are to be given as in training, for RoIs that are sampled by them.

    Returns:
        A loader. A batch has at most SOLVER.IMS_PER_BATCH images over all workers, all of one data set; those of a set
        differ in size by one image at most, and images that would be a batch of fewer than workers are left out. The
        batches of several sets alternate in proportion to their sizes, each set's first batch at the beginning:
        whoever stops early has seen all.

    Raises:
        DatasetError: see `load_records`; on access, an image cannot be read.
        ConfigError: labels are needed and there are none.
    """
    records, shares = [], []
    for number, name in enumerate(names):
        own = load_records(name, cfg)
        if labelled and not has_labels(own):
            raise ConfigError(
                f"Data sets must be labelled where RoIs are sampled as in training; got {name!r} without annotations "
                f"(TEST.BNEXT.PRECISE_BN.ROIS is 'sampled'). Set TEST.BNEXT.PRECISE_BN.ROIS to 'top_scored'."
            )
        shares.append(_deal(cfg, len(records), len(own), number))
        records += [{**record, _DOMAIN: domains[number]} for record in own] if domains else own
    augmentations = {"augmentations": build_augmentation(cfg, False)} if labelled else {}
    loader = DataLoader(
        MapDataset(DatasetFromList(records, copy=False), CheckedMapper(DatasetMapper(cfg, labelled, **augmentations))),
        batch_sampler=_interleave(shares),
        num_workers=limit_loader_workers(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=list,
        generator=torch.Generator(),  # else torch would draw from the global one
    )
    loader.has_domains = bool(domains)
    return loader


def _deal(cfg: CfgNode, first: int, number: int, index: int) -> list[list[int]]:
    """This worker's shares of the batches of one data set, whose records begin at `first`."""
    order = first + np.random.default_rng(derive_seed(max(cfg.SEED, 0), _ORDER, index)).permutation(number)
    size, rank, world_size = cfg.SOLVER.IMS_PER_BATCH, comm.get_rank(), comm.get_world_size()
    rest = number % size
    order = order[: number - rest] if rest < world_size else order
    # Of nearly equal sizes: a last batch of one image would be no mini-batch at a level with one position.
    shares = np.array_split(order, -(-len(order) // size)) if len(order) else []
    return [share[rank::world_size].tolist() for share in shares]


def _interleave(parts: Sequence[list[list[int]]]) -> list[list[int]]:
    """The batches of all data sets, such that each has come equally far at any time; equal sizes on all workers."""
    places = [(index / len(part), number, index) for number, part in enumerate(parts) for index in range(len(part))]
    return [parts[number][index] for _, number, index in sorted(places)]


class CheckedMapper:
    """Detectron2's mapper; an image or record that it cannot read is a fault of the data set."""

    def __init__(self, mapper: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._mapper(record)
        except (OSError, SizeMismatchError, KeyError, TypeError, ValueError) as error:
            name = record.get("file_name") or f"image_id {record.get('image_id')}"
            raise DatasetError(
                f"An image must be readable and as its record says; got {type(error).__name__}: {error} ({name}). "
                f"Restore the file, or correct or remove its record."
            ) from error


def format_report(report: RecomputeReport) -> str:
    """A table of every set of statistics: what was seen, how sure it is, how far it moved, and what is amiss."""
    missing, coarse = set(report.not_reached), set(report.not_converged)
    rows = []
    for estimate in report.estimates:
        if estimate in missing:
            rows.append([estimate.name, "0", "0", "", "", "", "not reached: as it was"])
            continue
        error = "unknown" if estimate.error == float("inf") else f"{100 * estimate.error:.2g} %"
        shift, ratio = f"{estimate.mean_shift:.2f} std", f"x {estimate.var_ratio:.2f}"
        note = "not converged" if estimate in coarse else ""
        rows.append([estimate.name, f"{estimate.count:,}", f"{estimate.num_samples:,}", error, shift, ratio, note])
    headers = ["statistics of", "elements", "samples", "standard error", "mean moved", "variance moved", ""]
    aligned = ["left"] + ["right"] * 5 + ["left"]
    return f"{tabulate(rows, headers=headers, disable_numparse=True, colalign=aligned)}\n\n{report}"


def repair_checkpoint(cfg: CfgNode, weights: str) -> nn.Module:
    """A model of `cfg` with the weights of a checkpoint of any row, its head's statistics estimated anew.

    Args:
        cfg: of the model that is wanted; OUTPUT_DIR/model_final.pth takes it.
        weights: the checkpoint; it is not changed.

    Raises:
        ConfigError: OUTPUT_DIR/model_final.pth is that checkpoint.
        CheckpointError: it does not fit.
        StatisticsError: the activations are not finite, or there are no data.
    """
    if is_same_file(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"), weights):
        raise ConfigError(
            f"OUTPUT_DIR must be another folder than that of the checkpoint, which is never changed; got "
            f"{cfg.OUTPUT_DIR!r} for both (repair_checkpoint). Choose another."
        )
    model = load_model(cfg, weights)
    recompute_statistics(cfg, model, layers=is_level_norm)
    saver = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process())
    saver.save("model_final")
    comm.synchronize()
    return model.eval()

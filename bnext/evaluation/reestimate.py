"""Re-estimate population statistics of a detector on images: in a training, of a checkpoint, for another data set.

All of it is `recompute_statistics`; the others say on which images.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.checkpoints.head_levels import describe_levels
from bnext.config.blame import building_from_config
from bnext.data.loader import build_train_loader, count_fixed_images
from bnext.data.sampling.samplers import count_micro_batch
from bnext.errors import ConfigError, StatisticsError
from bnext.files import is_same_file
from bnext.heads import forward_sampled_rois
from bnext.heads.build_warnings import building_unwarned
from bnext.heads.statistics import choose_forward
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from bnext.layers.walk import Selection
from bnext.notices import gathering_notices, tell_once
from bnext.repair.levels import find_levels, give_levels
from bnext.repair.observe_calls import NUM_OBSERVED, peek
from bnext.scope.forward import count_levels
from bnext.scope.model import drawing_from
from bnext.seeding import Purpose, derive_seed
from bnext.statistics import RecomputeReport, recompute_population_statistics
from bnext.statistics.data_pass import Forward
from bnext.statistics.observe import find_replaceable, select_norms
from bnext.tables import format_rows

__all__ = [
    "check_repaired",
    "format_report",
    "give_head_levels",
    "is_level_norm",
    "needs_labels",
    "recompute_statistics",
    "repair_checkpoint",
]


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
    **options: Any,
) -> RecomputeReport:
    """Re-estimate the statistics of a detector's norms on training images, or on what `batches` gives.

    Args:
        cfg: TEST.BNEXT.PRECISE_BN says how: estimator, tolerance, and the RoIs of an R-CNN. Without `batches` its
            training data, batch size and TEST.PRECISE_BN.NUM_ITER are used.
        model: the detector; of a dense one anchors, matching and losses are left out, of an R-CNN whatever follows
            its backbone, if no norm does.
        layers: called as layers(path, module), says which norms; None: all. Others keep their statistics.
        batches: of this worker, such as those of `build_shuffled_batches`; None: the training's.
        num_batches: at most; None: TEST.PRECISE_BN.NUM_ITER of the training's, and all of `batches`. Those of the
            training come in its micro-batches, which are as many images and normalize as in training; with batches of
            one domain each, all domains have their turns. Where those are of one size and always alike, without
            random flips, crops and sizes, the standard errors are those for the training set: 0 when all were seen.
            Otherwise, and of `batches`, they are for what the images are drawn from.
        num_samples: enough images; None: not limited.
        options: further ones of `recompute_population_statistics`, such as source_samples, estimator and domain.

    Raises:
        StatisticsError: see `recompute_population_statistics`.

    Note:
        A collective. Every worker uses its share of each batch.
    """
    node = cfg.TEST.BNEXT.PRECISE_BN
    forward = _choose_forward(cfg, model, layers)
    if batches is None:
        number = cfg.SOLVER.BNEXT.ACCUMULATE
        num_batches = number * (num_batches or cfg.TEST.PRECISE_BN.NUM_ITER)
        batches = build_train_loader(_with_batches_for_statistics(cfg))
        options = {"population_size": count_fixed_images(cfg, batches), **options}

    arguments = {"estimator": node.ESTIMATOR, **options}
    if arguments["estimator"] != "layer_by_layer":  # every layer sees the same images
        arguments.setdefault("tolerance", node.TOLERANCE or None)
        _tell_of_small_groups(model, layers)

    seed = derive_seed(max(cfg.SEED, 0), Purpose.REESTIMATE, comm.get_rank())
    with gathering_notices(), drawing_from(model, seed):  # what the loader draws
        report = recompute_population_statistics(
            model,
            batches,
            num_batches=num_batches,
            num_samples=num_samples,
            forward=forward,
            layers=layers,
            seed=seed,
            progress=True,
            **arguments,
        )

    logging.getLogger(__name__).info("%s", report)
    return report


def _tell_of_small_groups(model: nn.Module, layers: Selection | None) -> None:
    """Say once that mini-batches smaller than the batch stand before what is measured, as nobody expects it."""
    for norm in select_norms(model, layers).values():
        size = norm.spec.normalization_batch_size if isinstance(norm, BatchNorm2d) else None
        if size is not None:
            message = (
                "Statistics are re-estimated behind mini-batches of %d, the normalization batch size, as in training. "
                "Where images differ much, those of TEST.BNEXT.PRECISE_BN.ESTIMATOR layer_by_layer are far better."
            )
            tell_once(logging.getLogger(__name__), ("small groups", size), message, size)


def _with_batches_for_statistics(cfg: CfgNode) -> CfgNode:
    """The config with batches that normalize together, and no domain that chance might leave out."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BNEXT.ACCUMULATE = count_micro_batch(cfg), 1
    if cfg.DATALOADER.BNEXT.BATCHES == "random_domain":
        cfg.DATALOADER.BNEXT.BATCHES = "alternating"
    return cfg


def _choose_forward(cfg: CfgNode, model: nn.Module, layers: Selection | None = None) -> Forward | None:
    return choose_forward(model, select_norms(model, layers), cfg.TEST.BNEXT.PRECISE_BN.ROIS)


def give_head_levels(cfg: CfgNode, model: nn.Module, batches: Iterable[Any] | None = None) -> dict[str, Any]:
    """Statistics for each level in a head of others, which applies its norms to one level after the other. In place.

    Args:
        cfg: of the model.
        model: a detector of any architecture, with its weights.
        batches: some images, see `recompute_statistics`; None: the training's.

    Returns:
        What a file is to say of the norms that see levels, see `bnext.checkpoints.head_levels`; the names of levels in
        norms of detectron2 are numbers.

    Raises:
        StatisticsError, ConfigError: see `bnext.repair`.
    """
    forward = _choose_forward(cfg, model)
    entry = ("forward", "head") if isinstance(model, DenseDetector) else ("forward",)
    count_levels(model, entry)

    seed = derive_seed(max(cfg.SEED, 0), Purpose.REESTIMATE, comm.get_rank())
    with drawing_from(model, seed):
        first, _ = peek(build_train_loader(cfg) if batches is None else batches, NUM_OBSERVED)
    plan = find_levels(model, first, forward=forward)
    give_levels(model, plan)
    return describe_levels({path: norm.levels for path, norm in plan.norms.items()}, entry)


def needs_labels(cfg: CfgNode, model: nn.Module, layers: Selection | None = None) -> bool:
    """Whether the norms of a model are re-estimated on RoIs that are sampled by labels.

    Args:
        cfg, model, layers: see `recompute_statistics`.

    Raises:
        StatisticsError: there is no norm to re-estimate.
    """
    return _choose_forward(cfg, model, layers) is forward_sampled_rois


def format_report(report: RecomputeReport, most: int = 5) -> str:
    """A table of the sets of statistics that are known worst: what was seen, how sure it is, how far it moved.

    Args:
        report: of all sets.
        most: rows; how many more there are is said.
    """
    headers = ["statistics of", "elements", "samples", "standard error", "mean moved", "variance moved", "note"]
    rows = []

    worst = sorted(report.estimates, key=lambda estimate: (estimate.is_reached, -estimate.error))
    for estimate in worst[:most]:
        if not estimate.is_reached:
            rows.append([estimate.name, "0", "0", "", "", "", "not reached: as it was"])
            continue
        error = "unknown" if math.isinf(estimate.error) else f"{100 * estimate.error:.2g} %"
        shift, ratio = f"{estimate.mean_shift:.2f} std", f"x {estimate.var_ratio:.2f}"
        note = "not converged" if estimate in report.not_converged else ""
        rows.append([estimate.name, f"{estimate.count:,}", f"{estimate.num_samples:,}", error, shift, ratio, note])

    head = f"The {most} of {len(worst)} sets that are known worst:\n" if len(worst) > most else ""
    return f"{head}{format_rows(rows, headers)}\n\n{report}"


def check_repaired(left_out: Sequence[str], report: RecomputeReport) -> None:
    """Refuse to keep what was broken in a file with the values of a new norm.

    Args:
        left_out: of `Checkpointer.load`.
        report: of the re-estimation that followed.

    Raises:
        StatisticsError: the images did not reach it.
    """
    for estimate in report.not_reached:
        if any(owner == estimate.path or owner.startswith(f"{estimate.path}.") for owner in left_out):
            thing, rule = "statistics that are not finite in MODEL.WEIGHTS", "be reached by the images"
            got = f"none for {estimate.name} in {report.num_samples} images; nothing is written"
            raise StatisticsError.of(thing, rule, got=got, remedy="Use more or larger images.")


def repair_checkpoint(cfg: CfgNode, weights: str, layers: Selection | None = is_level_norm) -> nn.Module:
    """A model of `cfg` with the weights of a checkpoint, its head's statistics estimated anew.

    Args:
        cfg: of the model that is wanted; OUTPUT_DIR/model_final.pth takes it.
        weights: the checkpoint; it is not changed.
        layers: see `recompute_statistics`; by default the norms of level-shared heads.

    Raises:
        ConfigError: OUTPUT_DIR/model_final.pth is that checkpoint.
        CheckpointError: it does not fit.
        StatisticsError: the activations are not finite, or there are no data, or statistics that are not finite in the
            checkpoint were not reached.
    """
    if is_same_file(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"), weights):
        raise ConfigError.of(
            "OUTPUT_DIR",
            "be another folder than that of the checkpoint, which is never changed",
            got=f"{cfg.OUTPUT_DIR!r} for both",
            where="repair_checkpoint",
            remedy="Choose another.",
        )

    with building_from_config(), building_unwarned():
        model = build_model(cfg)
    loader = Checkpointer(model)
    begins_with_them = cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR == "moving_average"
    replaced = () if begins_with_them else tuple(find_replaceable(model, layers))
    loader.load(weights, checkpointables=[], complete=True, replaced=replaced)
    check_repaired(loader.left_out, recompute_statistics(cfg, model, layers))

    saver = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process())
    saver.save("model_final")
    comm.synchronize()
    return model.eval()

"""Re-estimate population statistics on the training images of a config: in a training, or of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from bnext.data.loader import build_train_loader
from bnext.data.seeding import derive_seed, seeded
from bnext.engine.checkpoint import Checkpointer
from bnext.heads import forward_sampled_rois, forward_statistics
from bnext.layers import LevelBatchNorm2d
from bnext.statistics import RecomputeReport, recompute_population_statistics

__all__ = ["is_level_norm", "recompute_statistics", "repair_checkpoint"]

_RECOMPUTE = 8  # what the derived seed is for


def is_level_norm(path: str, module: nn.Module) -> bool:
    """Selects the norms of level-shared heads."""
    return isinstance(module, LevelBatchNorm2d)


def recompute_statistics(
    cfg: CfgNode, model: nn.Module, layers: Callable[[str, nn.Module], bool] | None = None
) -> RecomputeReport:
    """Re-estimate the statistics of a detector's norms on TEST.PRECISE_BN.NUM_ITER training batches.

    Args:
        cfg: its training data, batch size and TEST.PRECISE_BN.NUM_ITER are used.
        model: the detector; anchors, matching and losses of a dense one are left out. The RoIs of an R-CNN are those
            that TEST.BNEXT.PRECISE_BN.ROIS says.
        layers: called as layers(path, module), says which norms; None: all. Others keep their statistics.

    Raises:
        StatisticsError: see `recompute_population_statistics`.

    Note:
        A collective. Every worker uses its share of each batch.
    """
    forward = forward_statistics if isinstance(model, DenseDetector) else None
    if isinstance(model, GeneralizedRCNN) and cfg.TEST.BNEXT.PRECISE_BN.ROIS == "sampled":
        forward = forward_sampled_rois
    batches = tqdm(
        build_train_loader(cfg),
        total=cfg.TEST.PRECISE_BN.NUM_ITER,
        desc="re-estimating",
        unit="batch",
        disable=None if comm.is_main_process() else True,  # None: shown on a terminal only
    )
    seed = derive_seed(max(cfg.SEED, 0), _RECOMPUTE, comm.get_rank())
    with batches, seeded(seed):  # the sampling of RoIs
        report = recompute_population_statistics(
            model, batches, num_batches=cfg.TEST.PRECISE_BN.NUM_ITER, forward=forward, layers=layers
        )
    logging.getLogger(__name__).info("%s", report)
    return report


def repair_checkpoint(cfg: CfgNode, weights: str) -> nn.Module:
    """A model of `cfg` with the weights of a checkpoint of any row, its head's statistics estimated anew.

    Args:
        cfg: of the model that is wanted; OUTPUT_DIR/model_final.pth takes it.
        weights: the checkpoint; it is not changed.

    Raises:
        CheckpointError: the checkpoint does not fit.
        StatisticsError: the activations are not finite, or there are no data.
    """
    model = build_model(cfg)
    Checkpointer(model).load(weights, checkpointables=[], complete=True)
    recompute_statistics(cfg, model, layers=is_level_norm)
    saver = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process())
    saver.save("model_final")
    comm.synchronize()
    return model.eval()

"""Re-estimate the population statistics of a checkpoint on the training images of a config."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn
from tqdm import tqdm

from bnext.data.loader import build_train_loader
from bnext.engine.checkpoint import Checkpointer
from bnext.heads import forward_statistics
from bnext.layers import LevelBatchNorm2d
from bnext.statistics import RecomputeReport, recompute_population_statistics

__all__ = ["recompute_head_statistics", "repair_checkpoint"]


def recompute_head_statistics(cfg: CfgNode, model: nn.Module) -> RecomputeReport:
    """Re-estimate the statistics of the level norms of a model on TEST.PRECISE_BN.NUM_ITER training batches.

    Args:
        cfg: its training data, batch size and TEST.PRECISE_BN.NUM_ITER are used.
        model: a detector with level norms; every other norm keeps its statistics.

    Note:
        A collective. Every worker uses its share of each batch.
    """
    forward = forward_statistics if isinstance(model, DenseDetector) else None
    batches = tqdm(
        build_train_loader(cfg),
        total=cfg.TEST.PRECISE_BN.NUM_ITER,
        desc="re-estimating",
        unit="batch",
        disable=None if comm.is_main_process() else True,  # None: shown on a terminal only
    )
    with batches:
        return recompute_population_statistics(
            model,
            batches,
            num_batches=cfg.TEST.PRECISE_BN.NUM_ITER,
            forward=forward,
            layers=lambda path, module: isinstance(module, LevelBatchNorm2d),
        )


def repair_checkpoint(cfg: CfgNode, weights: str) -> tuple[nn.Module, RecomputeReport]:
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
    report = recompute_head_statistics(cfg, model)
    saver = Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process())
    saver.save("model_final")
    comm.synchronize()
    return model.eval(), report

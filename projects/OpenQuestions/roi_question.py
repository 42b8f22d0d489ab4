"""The question of RoIs: an R-CNN's heads train on sampled RoIs and are tested on the top-scored ones."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn
from trained_detectors import ROIS, Trainings, evaluate

from bnext.checkpoints import load_model
from bnext.data.loader import build_train_loader
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers.walk import find_norms
from bnext.scope.model import setting

__all__ = ["CHOICES", "ask_rois"]

CHOICES = ("sampled", "top_scored")


def ask_rois(trainings: Trainings, seed: int) -> dict[str, Any]:
    """Population statistics of the RoI heads on both kinds of RoIs.

    Returns:
        "AP" -> "as trained", each kind of RoIs, and "mini_batch" (the RoIs of each image at test); "distances", path of
        a norm -> how far its statistics on top-scored RoIs are from those on sampled ones, in standard deviations, and
        |log of the ratio of standard deviations|, means over channels; "errors", the largest standard error of either
        (95 % of the channels), in per cent; "objects", the share of RoIs that overlap an object by half.
    """
    cfg, weights = trainings.find(ROIS, seed)
    model = load_model(cfg, weights)
    numbers: dict[str, Any] = {"AP": {"as trained": evaluate(cfg, model)}, "errors": {}}

    statistics = {}
    for rois in CHOICES:
        report = recompute_statistics(_with(cfg, "TEST.BNEXT.PRECISE_BN.ROIS", rois), model, _is_in_roi_heads)
        numbers["errors"][rois] = 100 * max(estimate.error for estimate in report.reached)
        statistics[rois] = _read(model)
        numbers["AP"][rois] = evaluate(cfg, model)
    numbers["distances"] = _measure_distances(*(statistics[rois] for rois in CHOICES))
    numbers["objects"] = _measure_objects(cfg, model)

    by_mini_batch = _with(cfg, "MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE", "mini_batch")
    if cfg.MODEL.MASK_ON:
        by_mini_batch = _with(by_mini_batch, "MODEL.BNEXT.ROI_MASK_HEAD.INFERENCE", "mini_batch")
    numbers["AP"]["mini_batch"] = evaluate(by_mini_batch, load_model(by_mini_batch, weights))
    return numbers


def _with(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([key, value])
    return cfg


def _is_in_roi_heads(path: str, norm: nn.Module) -> bool:
    return path.startswith("roi_heads.")


def _read(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    norms: dict[str, Any] = find_norms(model, _is_in_roi_heads)
    return {path: (norm.running_mean.double(), norm.running_var.double()) for path, norm in norms.items()}


def _measure_distances(one: Any, other: Any) -> dict[str, dict[str, float]]:
    distances = {}
    for path, (mean, var) in one.items():
        other_mean, other_var = other[path]
        shift = (other_mean - mean).abs() / var.sqrt()
        ratio = (other_var / var).log().abs() / 2
        distances[path] = {"mean": float(shift.mean()), "ratio": float(ratio.mean())}
    return distances


@torch.no_grad()
def _measure_objects(cfg: CfgNode, model: Any, num_batches: int = 10) -> dict[str, float]:
    """Share of sampled and of top-scored RoIs whose overlap (IoU) with an object is a half or more."""
    counts = {rois: [0, 0] for rois in CHOICES}
    model.eval()

    for batch in itertools.islice(build_train_loader(cfg), num_batches):
        objects = [record["instances"].to(model.device) for record in batch]
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        top_scored, _ = model.proposal_generator(images, features)
        with setting([model.proposal_generator], training=True), EventStorage():
            proposals, _ = model.proposal_generator(images, features, objects)
            sampled = model.roi_heads.label_and_sample_proposals(proposals, objects)

        for rois, of_images in zip(CHOICES, (sampled, top_scored), strict=True):
            for of_image, gt in zip(of_images, objects, strict=True):
                overlaps = pairwise_iou(of_image.proposal_boxes, gt.gt_boxes)
                counts[rois][0] += int((overlaps.amax(1) >= 0.5).sum()) if len(gt) else 0
                counts[rois][1] += len(of_image)
    return {rois: number / max(total, 1) for rois, (number, total) in counts.items()}

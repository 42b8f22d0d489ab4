"""Forwards of an R-CNN for the statistics of its norms."""

from __future__ import annotations

from typing import Any

from detectron2.utils.events import EventStorage
from torch import nn

from bnext.scope.model import setting

__all__ = ["forward_sampled_rois"]


def forward_sampled_rois(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """Run a detectron2 R-CNN on RoIs as SGD samples them: positives and negatives of labelled proposals.

    In evaluation mode its heads would see the top-scored RoIs instead, of which most are background or, for a mask
    head, all are detections.

    Args:
        model: a GeneralizedRCNN or what is derived from it.
        batch: records with "image" [3, H, W] and "instances", as detectron2's mappers make them for training.

    Note:
        What the model reports of the run is dropped. Norms and other leaf modules keep their mode.
    """
    rois = getattr(model, "roi_heads", None)
    heads = [getattr(rois, name, None) for name in ("mask_head", "keypoint_head")]
    # The parts that choose RoIs by their mode, and none that computes otherwise in it.
    parts = [model, getattr(model, "proposal_generator", None), rois, *heads]
    routing = [part for part in parts if isinstance(part, nn.Module)]

    # VIS_PERIOD asks for pictures of the training.
    with setting(routing, training=True, vis_period=0), EventStorage():
        model(batch)

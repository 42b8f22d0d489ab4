"""Forwards of an R-CNN for the statistics of its norms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.utils.events import EventStorage
from torch import nn

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
    with _routing_as_in_training(model), EventStorage():
        model(batch)


@contextlib.contextmanager
def _routing_as_in_training(model: Any) -> Iterator[None]:
    """Put those parts into training mode that choose RoIs by it, and none that computes otherwise in it.

    They draw no pictures meanwhile: VIS_PERIOD asks for those of the training.
    """
    rois = getattr(model, "roi_heads", None)
    routing = [model, getattr(model, "proposal_generator", None), rois]
    routing += [getattr(rois, name, None) for name in ("mask_head", "keypoint_head")]
    parts = [part for part in routing if isinstance(part, nn.Module)]
    values = {"training": True, "vis_period": 0}
    before = [(part, name, getattr(part, name)) for part in parts for name in values if hasattr(part, name)]
    try:
        for part, name, _ in before:
            setattr(part, name, values[name])
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)

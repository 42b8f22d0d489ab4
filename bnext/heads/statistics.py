"""The forward of a detector that its norms need: as little of it as they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from bnext.errors import check_choice
from bnext.heads.retinanet import forward_statistics
from bnext.heads.sampled_rois import forward_sampled_rois

__all__ = ["RoiChoice", "choose_forward"]

Forward = Callable[[nn.Module, Any], object]
RoiChoice = Literal["sampled", "top_scored"]


def choose_forward(model: nn.Module, paths: Iterable[str], rois: RoiChoice = "sampled") -> Forward | None:
    """The least forward that reaches norms; for `recompute_population_statistics`.

    Args:
        model: a detector of detectron2, or any other model.
        paths: of the norms.
        rois: on which RoIs those of RoI heads are reached: sampled as in SGD, or top-scored as at test.

    Returns:
        The backbone alone of a dense detector or an R-CNN, if all norms are there; a dense detector's without anchors,
        matching and losses; an R-CNN's on the chosen RoIs; None: the model itself.
    """
    check_choice("rois", rois, get_args(RoiChoice), where="choose_forward")

    if not isinstance(model, (DenseDetector, GeneralizedRCNN)):
        return None
    if all(path.startswith("backbone.") for path in paths):
        return _forward_backbone
    if isinstance(model, DenseDetector):
        return forward_statistics
    return forward_sampled_rois if rois == "sampled" else None


def _forward_backbone(model: Any, batch: list[dict[str, Any]]) -> None:
    model.backbone(model.preprocess_image(batch).tensor)

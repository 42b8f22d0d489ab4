"""The forwards of a detector for the statistics of its norms: as little of it as they see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.errors import check_choice
from bnext.layers.walk import find_norms
from bnext.scope.domain import naming_domains
from bnext.scope.model import setting
from bnext.scope.record import get_record
from bnext.statistics.data_pass import Forward

__all__ = ["RoiChoice", "choose_forward", "forward_sampled_rois", "forward_statistics"]

RoiChoice = Literal["sampled", "top_scored"]
_TOWERS = ("cls_subnet", "bbox_subnet")


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
    with naming_domains(batch):
        model.backbone(model.preprocess_image(batch).tensor)


def forward_statistics(model: DenseDetector, batch: list[dict[str, Any]]) -> None:
    """The part of a dense detector's forward that its norms see: no predictors, anchors, matching, losses or NMS.

    In a re-estimation, no more of the towers than norms need that are not known well enough yet.

    Args:
        model: a RetinaNet or FCOS. The head of another package is run as a whole.
        batch: records with "image" [3, H, W], as detectron2's mappers make them; no labels needed.
    """
    images = model.preprocess_image(batch)

    with naming_domains(batch):
        features = model.backbone(images.tensor)
        inputs = [features[level] for level in model.head_in_features]

        if _can_skip_predictors(model.head):
            with setting([model.head], **_shorten_towers(model.head)):
                model.head.forward_towers(inputs)
        else:
            model.head(inputs)


def _shorten_towers(head: nn.Module) -> dict[str, nn.Sequential]:
    """The towers up to the last norm that is wanted, where somebody has said which ones are."""
    wanted = get_record().wanted
    if not wanted:
        return {}

    shortened = {}
    for name in _TOWERS:
        tower = getattr(head, name)
        if isinstance(tower, nn.Sequential):
            places = [place for place, module in enumerate(tower) if not wanted.isdisjoint(module.modules())]
            shortened[name] = tower[: max(places, default=-1) + 1]
    return shortened


def _can_skip_predictors(head: nn.Module) -> bool:
    """Whether the towers are all that norms see: they have all norms, and nobody has overridden `forward` alone."""
    owner = next(base for base in type(head).__mro__ if "forward" in vars(base))
    if "forward_towers" not in vars(owner):
        return False

    others = [child for name, child in head.named_children() if name not in _TOWERS]
    return not any(find_norms(child) for child in others)


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

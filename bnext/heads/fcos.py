"""FCOS with the same head norms as RetinaNet; it reads MODEL.RETINANET, as detectron2 has no keys for FCOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from torch import Tensor

from bnext.config.recipe import resolve_norms
from bnext.heads.build_warnings import warn_of_faults
from bnext.heads.class_masks import mask_classes
from bnext.heads.lock_step import HeadNorm, looking_up_levels, make_head_norm, run_towers
from bnext.heads.places import give_norms, make_buildable

__all__ = ["BNextFCOS", "FCOSHead"]


class FCOSHead(detectron2_fcos.FCOSHead):
    """Detectron2's FCOSHead with its levels in lock-step.

    Args:
        levels: names of the input features.
        norm: a `NormSpec`; or what detectron2 takes, a name such as "GN" or a factory.
        kwargs: detectron2's: input_shape, num_classes, conv_dims, prior_prob.
    """

    def __init__(self, *, levels: Sequence[str], norm: HeadNorm = "", **kwargs: Any) -> None:
        super().__init__(norm=make_head_norm(norm, levels), **kwargs)
        self.levels = tuple(levels)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits [N, K, H, W], box deltas [N, 4, H, W] and centerness [N, 1, H, W] of every level."""
        towers = self.forward_towers(features)
        logits = [self.cls_score(feature) for feature in towers["cls_subnet"]]
        deltas = [self.bbox_pred(feature) for feature in towers["bbox_subnet"]]
        return logits, deltas, [self.ctrness(feature) for feature in towers["bbox_subnet"]]

    def forward_towers(self, features: list[Tensor]) -> dict[str, list[Tensor]]:
        """The part of `forward` before its predictors: name of the tower -> features [N, C, H, W] of every level."""
        return run_towers(self, ("bbox_subnet", "cls_subnet"), features)


@META_ARCH_REGISTRY.register()
def BNextFCOS(cfg: CfgNode) -> detectron2_fcos.FCOS:
    """Detectron2's FCOS by YAML keys: those of MODEL.RETINANET, its norm also by MODEL.BNEXT.RETINANET.

    The thresholds of RetinaNet's keys are 0.05 (score) and 0.5 (NMS), where FCOS's own defaults are 0.2 and 0.6;
    MODEL.ANCHOR_GENERATOR is not read, as FCOS has one point per position.

    Raises:
        ConfigError: see `bnext.config.resolve_norms`.
    """
    norms, node = resolve_norms(cfg), cfg.MODEL.RETINANET
    place = norms.places["RETINANET"]

    backbone = build_backbone(make_buildable(cfg, norms))
    with looking_up_levels(place.levels):
        shapes = [backbone.output_shape()[level] for level in place.levels]
    head = FCOSHead(
        levels=place.levels,
        norm=place.norm,
        input_shape=shapes,
        num_classes=node.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * node.NUM_CONVS,
        prior_prob=node.PRIOR_PROB,
    )

    model = detectron2_fcos.FCOS(
        backbone=backbone,
        head=head,
        head_in_features=node.IN_FEATURES,
        num_classes=node.NUM_CLASSES,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    give_norms(model, norms)
    mask_classes(model)
    warn_of_faults(cfg, model)
    return model

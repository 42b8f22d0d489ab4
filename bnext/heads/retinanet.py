"""RetinaNet with a head whose batch norm is any row of the paper's Table 5.

`BNextRetinaNet` is detectron2's own RetinaNet with this head in it: losses, anchors, inference and
state-dict keys are detectron2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch import retinanet as detectron2_retinanet
from torch import Tensor

from bnext.config.recipe import read_place, resolve_norms
from bnext.heads.build_warnings import warn_of_faults
from bnext.heads.class_masks import mask_classes
from bnext.heads.lock_step import HeadNorm, looking_up_levels, make_head_norm, run_towers
from bnext.heads.places import give_norms, make_buildable

__all__ = ["BNextRetinaNet", "RetinaNetHead"]


class RetinaNetHead(detectron2_retinanet.RetinaNetHead):
    """Detectron2's RetinaNetHead with its levels in lock-step.

    Args:
        levels: names of the input features, for example ("p3", "p4", "p5", "p6", "p7").
        norm: a `NormSpec`; or what detectron2 takes, a name such as "GN" or a factory.
        kwargs: detectron2's: input_shape, num_classes, num_anchors, conv_dims, prior_prob.
    """

    @configurable
    def __init__(self, *, levels: Sequence[str], norm: HeadNorm = "", **kwargs: Any) -> None:
        super().__init__(norm=make_head_norm(norm, levels), **kwargs)
        self.levels = tuple(levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        place = read_place(cfg, "RETINANET")
        return {**super().from_config(cfg, input_shape), "levels": place.levels, "norm": place.norm}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [N, A*K, H, W] and box deltas [N, A*4, H, W] of every level, in the order of `levels`."""
        towers = self.forward_towers(features)
        logits = [self.cls_score(feature) for feature in towers["cls_subnet"]]
        deltas = [self.bbox_pred(feature) for feature in towers["bbox_subnet"]]
        return logits, deltas

    def forward_towers(self, features: list[Tensor]) -> dict[str, list[Tensor]]:
        """The part of `forward` before its predictors: name of the tower -> features [N, C, H, W] of every level."""
        return run_towers(self, ("cls_subnet", "bbox_subnet"), features)


@META_ARCH_REGISTRY.register()
def BNextRetinaNet(cfg: CfgNode) -> RetinaNet:
    """Detectron2's RetinaNet with the norms of MODEL.BNEXT; its head's are those of MODEL.BNEXT.RETINANET.

    Raises:
        ConfigError: see `bnext.config.resolve_norms`.
    """
    norms = resolve_norms(cfg)
    levels = norms.places["RETINANET"].levels

    without_norm = make_buildable(cfg, norms)
    without_norm.MODEL.RETINANET.NORM = ""  # detectron2's head is made and left
    with looking_up_levels(levels):
        arguments = RetinaNet.from_config(without_norm)
    shapes = arguments["backbone"].output_shape()
    arguments["head"] = RetinaNetHead(cfg, [shapes[level] for level in levels])

    model = RetinaNet(**arguments)
    give_norms(model, norms)
    mask_classes(model)
    warn_of_faults(cfg, model)
    return model

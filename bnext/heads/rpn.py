"""The RPN head with a norm, which detectron2 has not: its convolution sees every level of the FPN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from torch import Tensor
from torch.nn import functional as F

from bnext.config.recipe import read_place
from bnext.heads.lock_step import SEEING_LEVELS, HeadNorm, name_levels
from bnext.heads.places import add_norms

__all__ = ["BNextRPNHead", "RPNHead"]


class RPNHead(StandardRPNHead):
    """Detectron2's StandardRPNHead with a norm behind its convolutions, and its levels in lock-step.

    Args:
        levels: names of the input features, for example ("p2", "p3", "p4", "p5", "p6").
        norm: a `NormSpec`; or what detectron2 takes, a name such as "GN" or a factory. With a norm the
            convolutions have no bias.
        kwargs: detectron2's: in_channels, num_anchors, box_dim, conv_dims.
    """

    @configurable
    def __init__(self, *, levels: Sequence[str], norm: HeadNorm = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.levels = tuple(levels)
        add_norms(self._convs, norm, self.levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        place = read_place(cfg, "RPN")
        return {**super().from_config(cfg, input_shape), "levels": place.levels, "norm": place.norm}

    @property
    def _convs(self) -> list[Conv2d]:
        return [self.conv] if isinstance(self.conv, Conv2d) else list(self.conv)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [N, A, H, W] and box deltas [N, A*4, H, W] of every level, in the order of `levels`."""
        by_level = name_levels(self.levels, features)
        for conv in self._convs:
            by_level = _run_conv(conv, by_level)

        hidden = by_level.values()
        return [self.objectness_logits(t) for t in hidden], [self.anchor_deltas(t) for t in hidden]


def _run_conv(conv: Conv2d, features: dict[str, Tensor]) -> dict[str, Tensor]:
    """A convolution with its norm and activation: a level norm gets all levels at once."""
    if not isinstance(conv.norm, SEEING_LEVELS):
        return {level: conv(feature) for level, feature in features.items()}

    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    features = {level: F.conv2d(feature, conv.weight, conv.bias, *geometry) for level, feature in features.items()}
    return {level: conv.activation(feature) for level, feature in conv.norm(features).items()}


@RPN_HEAD_REGISTRY.register()
def BNextRPNHead(cfg: CfgNode, input_shape: list[ShapeSpec]) -> RPNHead:
    """The head that MODEL.BNEXT.RPN describes; bnext's architectures take it where that node names a norm."""
    return RPNHead(cfg, input_shape)

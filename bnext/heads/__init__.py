"""Detectron2 heads whose norms know which batch they normalize."""

from bnext.heads.fcos import FCOSHead
from bnext.heads.retinanet import RetinaNetHead, forward_statistics

__all__ = ["FCOSHead", "RetinaNetHead", "forward_statistics"]

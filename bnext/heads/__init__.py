"""Detectron2 heads whose norms know which batch they normalize."""

import importlib.util

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.heads.retinanet import RetinaNetHead, forward_statistics

__all__ = ["RetinaNetHead", "forward_statistics"]

if importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is not None:  # since detectron2 0.6
    from bnext.heads.fcos import FCOSHead

    __all__ += ["FCOSHead"]

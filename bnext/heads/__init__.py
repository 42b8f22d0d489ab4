"""Detectron2 heads and architectures whose norms know which batch they normalize."""

import importlib.util

import bnext.config
import bnext.heads.architectures
import bnext.heads.lazy_model  # noqa: F401  both register classes
from bnext.heads.class_masks import mask_classes
from bnext.heads.domains import tell_domains
from bnext.heads.places import give_norms, make_buildable
from bnext.heads.retinanet import RetinaNetHead
from bnext.heads.roi import mixing_images, tell_images
from bnext.heads.rpn import RPNHead
from bnext.heads.statistics import forward_sampled_rois, forward_statistics

__all__ = [
    "RPNHead",
    "RetinaNetHead",
    "forward_sampled_rois",
    "forward_statistics",
    "give_norms",
    "make_buildable",
    "mask_classes",
    "mixing_images",
    "tell_domains",
    "tell_images",
]

if importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is not None:  # since detectron2 0.6
    from bnext.heads.fcos import FCOSHead

    __all__ += ["FCOSHead"]

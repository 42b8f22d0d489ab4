"""Configs of bnext's architectures for the tests of their keys."""

from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.config.places import PLACES

__all__ = ["DOMAINS", "make_cfg", "make_whole"]

DOMAINS = {"MODEL.BNEXT.DOMAINS.NAMES": ("day", "night")}


def make_cfg(architecture="BNextRetinaNet", changes=()):
    """Detectron2's defaults with an architecture, and changes of keys."""
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    cfg.merge_from_list([item for pair in dict(changes).items() for item in pair])
    return cfg


def make_whole(architecture="BNextPanopticFPN", changes=()):
    """The same with a BN at every place that it has."""
    norms = {place.norm: "BN" for place in PLACES.values() if architecture in place.architectures}
    return make_cfg(architecture, {**norms, "MODEL.MASK_ON": True, "MODEL.KEYPOINT_ON": True, **dict(changes)})

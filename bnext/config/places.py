"""The places of a detector that have a norm: who has them, and which key names their norm."""

from __future__ import annotations

import dataclasses

__all__ = [
    "ARCHITECTURES",
    "BATCH_NORMS",
    "LAZY_ARCHITECTURE",
    "LEVEL_ARCHITECTURES",
    "PLACES",
    "RCNN_ARCHITECTURES",
    "RESNET_BACKBONES",
    "Place",
]

# Meta-architectures whose head sees several named levels; they read MODEL.RETINANET.
LEVEL_ARCHITECTURES = ("BNextRetinaNet", "BNextFCOS")
# Those with RoI heads, with an RPN, and with a semantic head.
RCNN_ARCHITECTURES = ("BNextGeneralizedRCNN", "BNextPanopticFPN")
# The model of a LazyConfig, of whatever kind.
LAZY_ARCHITECTURE = "BNextLazyModel"
_WITH_RPN = ("BNextGeneralizedRCNN", "BNextProposalNetwork", "BNextPanopticFPN")
_SEGMENTORS = ("BNextPanopticFPN", "BNextSemanticSegmentor")
# All that are bnext's; others heed no key of MODEL.BNEXT.
ARCHITECTURES = (*LEVEL_ARCHITECTURES, *_WITH_RPN, "BNextSemanticSegmentor")

# Backbones that have the norm of MODEL.RESNETS.NORM and no other. What another has shows when it is built.
RESNET_BACKBONES = ("build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
# Names whose norms are of bnext, by a node of keys; the other norms are detectron2's.
BATCH_NORMS = ("BN", "SyncBN")


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of a detector that has a norm.

    Args:
        norm: key of the norm's name.
        architectures: that have the place.
        default: the norm's name where nobody sets it.
        switch: key that must be true for it; "": it is always there.
        levels: key of the features of several levels that each of its norms sees; "": each sees one feature.
        sees_rois: whether its samples are RoIs.
    """

    norm: str
    architectures: tuple[str, ...]
    default: str = ""
    switch: str = ""
    levels: str = ""
    sees_rois: bool = False

    @property
    def answers(self) -> tuple[str, ...]:
        """The allowed answers to whose statistics."""
        if not self.levels:
            return ("shared", "per_domain")
        return ("shared", "per_level", "per_domain", "per_level_and_domain")

    @property
    def has_norm_of_ours(self) -> bool:
        """Whether detectron2 knows no norm there, neither a key nor a layer."""
        return self.norm.startswith("MODEL.BNEXT.")


def _roi_head(norm: str, switch: str = "") -> Place:
    return Place(norm, RCNN_ARCHITECTURES, switch=switch, sees_rois=True)


PLACES = {
    # The bottom-up network, of any kind; the heads of C4 models.
    "RESNETS": Place("MODEL.RESNETS.NORM", ARCHITECTURES, default="FrozenBN"),
    "FPN": Place("MODEL.FPN.NORM", ARCHITECTURES),
    "RETINANET": Place("MODEL.RETINANET.NORM", LEVEL_ARCHITECTURES, levels="MODEL.RETINANET.IN_FEATURES"),
    "RPN": Place("MODEL.BNEXT.RPN.NORM", _WITH_RPN, levels="MODEL.RPN.IN_FEATURES"),
    "ROI_BOX_HEAD": _roi_head("MODEL.ROI_BOX_HEAD.NORM"),
    "ROI_MASK_HEAD": _roi_head("MODEL.ROI_MASK_HEAD.NORM", switch="MODEL.MASK_ON"),
    "ROI_KEYPOINT_HEAD": _roi_head("MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", switch="MODEL.KEYPOINT_ON"),
    "SEM_SEG_HEAD": Place("MODEL.SEM_SEG_HEAD.NORM", _SEGMENTORS, default="GN"),
}

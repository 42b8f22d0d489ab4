"""Detectron2's own architectures with the norms of MODEL.BNEXT; RetinaNet and FCOS, whose heads differ, are beside.

Losses, inference and state-dict keys are detectron2's; `build_model`, `DefaultPredictor` and train_net
see the same model.
"""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, ProposalNetwork, SemanticSegmentor
from torch import nn

from bnext.config.recipe import resolve_norms
from bnext.heads.build_warnings import warn_of_faults
from bnext.heads.class_masks import mask_classes
from bnext.heads.places import give_norms, make_buildable

__all__ = ["BNextGeneralizedRCNN", "BNextPanopticFPN", "BNextProposalNetwork", "BNextSemanticSegmentor"]


@META_ARCH_REGISTRY.register()
def BNextGeneralizedRCNN(cfg: CfgNode) -> GeneralizedRCNN:
    """Faster, Mask, Keypoint and Cascade R-CNN. Raises ConfigError: see `bnext.config.resolve_norms`."""
    return _build(GeneralizedRCNN, cfg)


@META_ARCH_REGISTRY.register()
def BNextProposalNetwork(cfg: CfgNode) -> ProposalNetwork:
    """An RPN alone. Raises ConfigError: see `bnext.config.resolve_norms`."""
    return _build(ProposalNetwork, cfg)


@META_ARCH_REGISTRY.register()
def BNextPanopticFPN(cfg: CfgNode) -> PanopticFPN:
    """Panoptic FPN. Raises ConfigError: see `bnext.config.resolve_norms`."""
    return _build(PanopticFPN, cfg)


@META_ARCH_REGISTRY.register()
def BNextSemanticSegmentor(cfg: CfgNode) -> SemanticSegmentor:
    """A backbone with a semantic head. Raises ConfigError: see `bnext.config.resolve_norms`."""
    return _build(SemanticSegmentor, cfg)


def _build(architecture: Callable[[CfgNode], nn.Module], cfg: CfgNode) -> nn.Module:
    norms = resolve_norms(cfg)
    model = architecture(make_buildable(cfg, norms))
    give_norms(model, norms)
    mask_classes(model)
    warn_of_faults(cfg, model)
    return model

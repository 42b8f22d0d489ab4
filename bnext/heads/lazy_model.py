"""The model of a LazyConfig as an architecture: `build_model` makes it like every other."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as StockRetinaNetHead
from detectron2.modeling.proposal_generator import StandardRPNHead
from torch import nn

from bnext.config.lazy import tell_unheeded
from bnext.config.places import LAZY_ARCHITECTURE
from bnext.config.recipe import NormRecipe, resolve_norms
from bnext.errors import ConfigError
from bnext.heads.build_warnings import warn_of_faults
from bnext.heads.class_masks import mask_classes
from bnext.heads.places import give_norms
from bnext.heads.retinanet import RetinaNetHead
from bnext.heads.rpn import RPNHead
from bnext.layers.spec import NormSpec
from bnext.lazy_config import copy_node, find_target, name_target

__all__ = ["build_lazy_model"]

# detectron2's head that sees several levels -> bnext's.
_HEADS = {StockRetinaNetHead: RetinaNetHead, StandardRPNHead: RPNHead}
try:
    from detectron2.modeling.meta_arch.fcos import FCOSHead as StockFCOSHead

    from bnext.heads.fcos import FCOSHead

    _HEADS[StockFCOSHead] = FCOSHead
except ImportError:  # before detectron2 0.6
    pass
_PATHS = {"RETINANET": "head", "RPN": "proposal_generator.head"}


def build_lazy_model(cfg: CfgNode) -> nn.Module:
    """The `model` of a LazyConfig, with the norms that its `norms` gives to places of it.

    Raises:
        ConfigError: a place of `norms` has no such head, or no norm.
    """
    tell_unheeded(cfg)
    norms = resolve_norms(cfg)
    node = copy_node(cfg, "model", "for every command")
    _put_heads(node, norms)

    model = instantiate(node)
    if not isinstance(model, nn.Module):
        remedy = "Call the class of a model there."
        raise ConfigError.of("model", "be a call that makes a torch module", got=type(model).__name__, remedy=remedy)
    give_norms(model, norms)
    mask_classes(model)
    warn_of_faults(cfg, model)
    return model


def _put_heads(model: Any, norms: NormRecipe) -> None:
    """Put bnext's heads, whose norms see several levels, in the place of detectron2's where `norms` speaks of them."""
    for place, path in _PATHS.items():
        if place not in norms.places:
            continue

        head = model
        for part in path.split("."):
            head = head.get(part) if head is not None else None
        target = find_target(head)
        if target not in _HEADS and target not in _HEADS.values():
            rule = f"be left out of a model without a head of {' or '.join(kind.__name__ for kind in _HEADS)}"
            remedy = "Give its norms in the call of the head, L(build_norm)(spec=L(NormSpec)(...))."
            got = "no head" if head is None else name_target(head)
            raise ConfigError.of(f"norms.{place}", rule, got=got, where=f"model.{path}", remedy=remedy)

        head["_target_"] = _HEADS.get(target, target)
        norm = norms.places[place].norm
        head["levels"] = list(norms.places[place].levels)
        head["norm"] = LazyCall(NormSpec)(**vars(norm)) if isinstance(norm, NormSpec) else norm


META_ARCH_REGISTRY._do_register(LAZY_ARCHITECTURE, build_lazy_model)

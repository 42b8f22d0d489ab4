"""Every place of a detector gets the norm that the config says: built by detectron2 first, then made ours.

Detectron2 builds a model from names of norms; `make_buildable` gives it names that each of its versions
knows, with the same convolutions, and `give_norms` puts the norms of the config in. What a level-shared
head needs besides is in `bnext.heads.lock_step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from torch import nn

from bnext.config.places import PLACES, find_changed_keys, get_norm_name, get_place_norm, has_place
from bnext.errors import ConfigError
from bnext.heads.lock_step import HeadNorm, make_head_norm
from bnext.heads.roi import tell_images
from bnext.heads.roi_shuffle import shuffle_heads
from bnext.layers import BatchNorm2d, NormSpec, name_norms
from bnext.layers.forms import find_forms
from bnext.layers.groups import find_foreign_norms
from bnext.surgery import convert_norm

__all__ = ["add_norms", "give_norms", "make_buildable"]

# In the place of "GN" and "LN", which 0.6 has not or cannot try: no backbone has norms of this class unasked.
STAND_IN = "naiveSyncBN"
NAMES_OF_CLASSES = {nn.BatchNorm2d: "BN", nn.SyncBatchNorm: "SyncBN"}
REMEDIES = {
    "RESNETS": "Lower MODEL.BACKBONE.FREEZE_AT, whose stages are frozen, or take a backbone with batch norms",
    "FPN": "Take a backbone with an FPN, such as MODEL.BACKBONE.NAME build_resnet_fpn_backbone",
    "ROI_BOX_HEAD": "Set MODEL.ROI_BOX_HEAD.NAME to FastRCNNConvFCHead and NUM_CONV to 1 or more (4 is usual)",
    "ROI_MASK_HEAD": "Set MODEL.ROI_MASK_HEAD.NUM_CONV to 1 or more (4 is usual)",
    "ROI_KEYPOINT_HEAD": "Set MODEL.ROI_KEYPOINT_HEAD.NAME to KRCNNConvDeconvUpsampleHead",
    "RPN": "Set MODEL.PROPOSAL_GENERATOR.NAME to RPN and MODEL.RPN.HEAD_NAME to StandardRPNHead",
}


def make_buildable(cfg: CfgNode) -> CfgNode:
    """A copy of a config whose names of norms every version of detectron2 can build."""
    cfg = cfg.clone()
    cfg.defrost()
    for place, what in PLACES.items():
        is_ours = what.norm.startswith("MODEL.BNEXT.")
        if not is_ours and has_place(cfg, place) and get_norm_name(cfg, place) in ("GN", "LN"):
            cfg.MODEL[what.norm.split(".")[1]].NORM = STAND_IN
    if cfg.MODEL.BNEXT.RPN.NORM and cfg.MODEL.RPN.HEAD_NAME == "StandardRPNHead":
        cfg.MODEL.RPN.HEAD_NAME = "BNextRPNHead"
    return cfg


def give_norms(model: nn.Module, cfg: CfgNode) -> None:
    """Put the norms of the config into a model that detectron2 has built from `make_buildable(cfg)`.

    BN and SyncBN become `BatchNorm2d`s with the same state-dict keys and state, by the nodes of MODEL.BNEXT.
    What FREEZE_AT has frozen stays frozen.

    Args:
        model: one of detectron2's meta-architectures.
        cfg: the config, checked by `check_config`.

    Raises:
        ConfigError: a place has keys or a norm in the config, but no norm in the model.
    """
    for place in (place for place in PLACES if has_place(cfg, place)):
        roots = [(path, module) for path, module in _find_roots(model, place) if module is not None]
        if place == "ROI_KEYPOINT_HEAD":
            for head in (head for _, head in roots if isinstance(head, KRCNNConvDeconvUpsampleHead)):
                add_norms([part for part in head if isinstance(part, Conv2d)], get_place_norm(cfg, place))
        elif not PLACES[place].levels:  # heads with levels make their norms themselves
            _replace_norms(model, [path for path, _ in roots], cfg, place)
        _check_found(cfg, place, [module for _, module in roots])
        if PLACES[place].sees_rois:
            _check_same_inference(cfg, place, roots)
    name_norms(model)
    tell_images(model)
    shuffle_heads(model, cfg)


def _find_roots(model: Any, place: str) -> Iterator[tuple[str, nn.Module | None]]:
    """The parts of a model that belong to a place; RoI heads may be lists, one for each stage of a cascade."""
    backbone = getattr(model, "backbone", None)
    has_pyramid = hasattr(backbone, "bottom_up")
    rois = getattr(model, "roi_heads", None)
    if place == "RESNETS":
        yield ("backbone.bottom_up", backbone.bottom_up) if has_pyramid else ("backbone", backbone)
        yield "roi_heads.res5", getattr(rois, "res5", None)
    elif place == "FPN" and has_pyramid:
        yield from ((f"backbone.{name}", part) for name, part in backbone.named_children() if name != "bottom_up")
    elif place == "RETINANET":
        yield "head", getattr(model, "head", None)
    elif place == "RPN":
        yield "proposal_generator", getattr(model, "proposal_generator", None)
    elif place == "SEM_SEG_HEAD":
        yield "sem_seg_head", getattr(model, "sem_seg_head", None)
    elif place.startswith("ROI_"):
        name = place.removeprefix("ROI_").lower()
        yield f"roi_heads.{name}", getattr(rois, name, None)


def add_norms(convs: Sequence[Conv2d], norm: HeadNorm, levels: Sequence[str] | None = None) -> None:
    """Put norms behind convolutions that have none, whose biases go, as detectron2's do where it has a norm."""
    make_norm = make_head_norm(norm, levels)
    for conv in convs if make_norm else ():
        conv.norm, conv.bias = get_norm(make_norm, conv.out_channels), None


def _replace_norms(model: nn.Module, paths: list[str], cfg: CfgNode, place: str) -> None:
    """Batch norms of torch become ours, and stand-ins what they stand for; FrozenBN stays."""
    name, specs = get_norm_name(cfg, place), {}
    for path, norm, _ in find_forms(model):
        if not any(path.startswith(f"{root}.") for root in paths):
            continue
        if name in ("GN", "LN") and isinstance(norm, (NaiveSyncBatchNorm, FrozenBatchNorm2d)):
            made: Any = make_head_norm(name, None)(norm.num_features)
            made.requires_grad_(isinstance(norm, NaiveSyncBatchNorm))  # FREEZE_AT has frozen a stand-in
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made)
        elif type(norm) in NAMES_OF_CLASSES:
            specs[path] = _make_spec(norm, cfg, place)
    if specs:
        convert_norm(model, specs, adopt_eps=False)


def _make_spec(norm: Any, cfg: CfgNode, place: str) -> NormSpec:
    """The spec of a place for a norm that is there; where no key says otherwise, it keeps what it has."""
    spec = get_place_norm(cfg, place, NAMES_OF_CLASSES[type(norm)])
    changed, own = find_changed_keys(cfg, place), {}
    if "EPS" not in changed:
        own["eps"] = norm.eps
    if not {"MOMENTUM", "AVERAGE"} & set(changed):
        own |= {"average": "cumulative"} if norm.momentum is None else {"momentum": norm.momentum}
    if "AFFINE" not in changed and not norm.affine:
        own["affine"] = "none"
    if norm.running_mean is None and not {"POPULATION", "INFERENCE"} & set(changed):
        own |= {"population": "none", "inference": "mini_batch"}
    return spec.replace(**own)


def _check_found(cfg: CfgNode, place: str, roots: list[nn.Module]) -> None:
    """A norm that the config asks for is in the model; of a BN's keys, a BN."""
    key, name = PLACES[place].norm, get_norm_name(cfg, place)
    changed = [key for key in find_changed_keys(cfg, place) if key != "SHUFFLE"]  # which heads of others may do with
    if changed and not any(isinstance(part, BatchNorm2d) for root in roots for part in root.modules()):
        key, value = f"MODEL.BNEXT.{place}.{changed[0]}", cfg.MODEL.BNEXT[place][changed[0]]
        what = f"no batch norm that is not frozen; got {value!r}"
    elif _is_chosen(key, name) and not any(find_forms(root) for root in roots):
        what = f"no norm at all; got {name!r}"
    else:
        return
    remedy = REMEDIES.get(place, f"Choose a head of detectron2 that heeds {PLACES[place].norm}")
    if place == "ROI_BOX_HEAD" and not roots:  # C4's box head is the last stage of the backbone
        remedy = "Set MODEL.ROI_HEADS.NAME to StandardROIHeads or CascadeROIHeads, with an FPN"
    raise ConfigError(
        f"{key} must keep its default in a model that has there {what} (MODEL.META_ARCHITECTURE is "
        f"{cfg.MODEL.META_ARCHITECTURE!r}). {remedy}, or remove the key."
    )


def _check_same_inference(cfg: CfgNode, place: str, roots: Sequence[tuple[str, nn.Module]]) -> None:
    """With mini-batches at inference, a batch norm that is not ours would go on with population statistics."""
    if cfg.MODEL.BNEXT[place].INFERENCE == "population":
        return
    for root, module in roots:
        for name, norm in find_foreign_norms(module):
            raise ConfigError(
                f"MODEL.BNEXT.{place}.INFERENCE must be 'population' in a head with a batch norm that is not "
                f"bnext's; got {cfg.MODEL.BNEXT[place].INFERENCE!r} ({root}.{name} is a {type(norm).__name__}). "
                f"Make it a BatchNorm2d, or remove the key."
            )


def _is_chosen(key: str, name: str) -> bool:
    """Whether a name was set for a place whose norms depend on it alone. (Backbones may have names of their own.)"""
    if key == PLACES["RESNETS"].norm or not name:
        return False
    return key.startswith("MODEL.BNEXT.") or name != get_cfg().MODEL[key.split(".")[1]].NORM

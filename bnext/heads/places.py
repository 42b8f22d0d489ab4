"""Every place of a detector gets its norm: built by detectron2 first, then made ours.

Detectron2 builds a model from names of norms; `make_buildable` gives it names that each of its versions
knows, with the same convolutions, and `give_norms` puts the norms of a recipe in. What a level-shared
head needs besides is in `bnext.heads.lock_step`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from torch import nn

from bnext.config.places import PLACES
from bnext.config.recipe import NormRecipe, PlaceNorm
from bnext.errors import ConfigError, list_few
from bnext.heads.domains import tell_domains
from bnext.heads.lock_step import HeadNorm, make_head_norm
from bnext.heads.roi import tell_images
from bnext.heads.roi_shuffle import shuffle_heads
from bnext.layers import BatchNorm2d, NormSpec, name_norms
from bnext.layers.forms import find_forms
from bnext.layers.sources import is_per_domain
from bnext.layers.spec import OWNED
from bnext.layers.unseen import tell_forwards
from bnext.layers.walk import find_foreign_norms, replace_modules
from bnext.notices import tell_once
from bnext.surgery import convert_norm

__all__ = ["add_norms", "find_parts", "give_norms", "make_buildable"]

log = logging.getLogger(__name__)

FROZEN_NORMS = (
    "%d of %d norms of %s are frozen (FrozenBatchNorm2d: %s) and heed no key, %s neither: they have one set of "
    "statistics for all domains, that of their weights. Set MODEL.BACKBONE.FREEZE_AT 0 to give them what the others "
    "have."
)
# In the place of "GN" and "LN", which 0.6 has not or cannot try: no backbone has norms of this class unasked.
STAND_IN = "naiveSyncBN"
# Where the parts of a place are; the FPN's are all of the backbone but its bottom-up network.
PATHS: dict[str, tuple[str, ...]] = {
    "RESNETS": ("backbone.bottom_up", "roi_heads.res5"),
    "FPN": (),
    "RETINANET": ("head",),
    "RPN": ("proposal_generator",),
    "ROI_BOX_HEAD": ("roi_heads.box_head",),
    "ROI_MASK_HEAD": ("roi_heads.mask_head",),
    "ROI_KEYPOINT_HEAD": ("roi_heads.keypoint_head",),
    "SEM_SEG_HEAD": ("sem_seg_head",),
}
NAMES_OF_CLASSES = {nn.BatchNorm2d: "BN", nn.SyncBatchNorm: "SyncBN"}
REMEDIES = {
    "RESNETS": "Lower MODEL.BACKBONE.FREEZE_AT, whose stages are frozen, or take a backbone with batch norms",
    "FPN": "Take a backbone with an FPN, such as MODEL.BACKBONE.NAME build_resnet_fpn_backbone",
    "ROI_BOX_HEAD": "Set MODEL.ROI_BOX_HEAD.NAME to FastRCNNConvFCHead and NUM_CONV to 1 or more (4 is usual)",
    "ROI_MASK_HEAD": "Set MODEL.ROI_MASK_HEAD.NUM_CONV to 1 or more (4 is usual)",
    "ROI_KEYPOINT_HEAD": "Set MODEL.ROI_KEYPOINT_HEAD.NAME to KRCNNConvDeconvUpsampleHead",
    "RPN": "Set MODEL.PROPOSAL_GENERATOR.NAME to RPN and MODEL.RPN.HEAD_NAME to StandardRPNHead",
}
# C4's box head is the last stage of the backbone.
NO_HEAD = "Set MODEL.ROI_HEADS.NAME to StandardROIHeads or CascadeROIHeads, with an FPN"


def make_buildable(cfg: CfgNode, norms: NormRecipe) -> CfgNode:
    """A copy of a config whose names of norms every version of detectron2 can build."""
    cfg = cfg.clone()
    cfg.defrost()

    for name, norm in norms.places.items():
        place = PLACES[name]
        if norm.name in ("GN", "LN") and not place.has_norm_of_ours:
            cfg.MODEL[place.norm.split(".")[1]].NORM = STAND_IN

    rpn = norms.places.get("RPN")
    if rpn is not None and rpn.name and cfg.MODEL.RPN.HEAD_NAME == "StandardRPNHead":
        cfg.MODEL.RPN.HEAD_NAME = "BNextRPNHead"
    return cfg


def give_norms(model: nn.Module, norms: NormRecipe) -> None:
    """Put norms into a model that detectron2 has built, from `make_buildable` or a LazyConfig.

    BN and SyncBN become `BatchNorm2d`s with the same state-dict keys and state, with the answers of their place.
    What FREEZE_AT has frozen stays frozen.

    Args:
        model: one of detectron2's meta-architectures.
        norms: of its places.

    Raises:
        ConfigError: a place has a norm or changed keys in the recipe, but no norm in the model.
    """
    for name, norm in norms.places.items():
        parts = find_parts(model, name)
        if name == "ROI_KEYPOINT_HEAD":
            for head in parts.values():
                if isinstance(head, KRCNNConvDeconvUpsampleHead):
                    add_norms([part for part in head if isinstance(part, Conv2d)], norm.norm)
        elif not PLACES[name].levels:  # heads with levels make their norms themselves
            _replace_norms(model, list(parts), norm)

        _check_present(model, norm, parts)
        _tell_frozen(model, norm, parts)
        if PLACES[name].sees_rois and norm.spec.inference == "mini_batch":
            _check_same_inference(norm, parts)

    name_norms(model)
    if norms.domains:
        tell_domains(model)
        tell_forwards(model)
    tell_images(model)
    shuffle_heads(model, norms)


def find_parts(model: nn.Module, place: str) -> dict[str, nn.Module]:
    """Path -> part of a model that belongs to a place; RoI heads may be lists, one for each stage of a cascade."""
    backbone = getattr(model, "backbone", None)
    has_pyramid = hasattr(backbone, "bottom_up")

    paths = PATHS[place]
    if place == "RESNETS" and not has_pyramid:
        paths = ("backbone", "roi_heads.res5")
    elif place == "FPN" and isinstance(backbone, nn.Module) and has_pyramid:
        paths = tuple(f"backbone.{name}" for name, _ in backbone.named_children() if name != "bottom_up")

    parts = {}
    for path in paths:
        with contextlib.suppress(AttributeError):  # a head that is None, or not there
            parts[path] = model.get_submodule(path)
    return parts


def add_norms(convs: Sequence[Conv2d], norm: HeadNorm, levels: Sequence[str] | None = None) -> None:
    """Put norms behind convolutions that have none, whose biases go, as detectron2's do where it has a norm."""
    make_norm = make_head_norm(norm, levels)
    for conv in convs if make_norm else ():
        conv.norm, conv.bias = get_norm(make_norm, conv.out_channels), None


def _replace_norms(model: nn.Module, roots: Sequence[str], place: PlaceNorm) -> None:
    """Batch norms of torch become ours, and stand-ins what they stand for; FrozenBN stays."""
    specs = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for path, norm, _ in find_forms(model):
        if not any(path.startswith(f"{root}.") for root in roots):
            continue

        if place.name in ("GN", "LN") and isinstance(norm, (NaiveSyncBatchNorm, FrozenBatchNorm2d)):
            new_norm = get_norm(make_head_norm(place.name, None), norm.num_features)
            new_norm.requires_grad_(isinstance(norm, NaiveSyncBatchNorm))  # FREEZE_AT has frozen a stand-in
            replacements[norm] = new_norm
        elif type(norm) in NAMES_OF_CLASSES:
            specs[path] = _make_spec(norm, place)

    replace_modules(model, replacements)
    if specs:
        convert_norm(model, specs, adopt_eps=False)


def _make_spec(norm: Any, place: PlaceNorm) -> NormSpec:
    """The spec of a place for a norm that is there; where no key says otherwise, it keeps what it has."""
    changed, kept = set(place.changed), {}

    if "EPS" not in changed:
        kept["eps"] = norm.eps
    if not changed & {"MOMENTUM", "AVERAGE"}:
        kept |= {"average": "cumulative"} if norm.momentum is None else {"momentum": norm.momentum}
    if "AFFINE" not in changed and not norm.affine:
        kept["affine"] = "none"
    if norm.running_mean is None and not changed & {"POPULATION", "INFERENCE"}:
        kept |= {"population": "none", "inference": "mini_batch"}

    return place.make_spec(NAMES_OF_CLASSES[type(norm)]).replace(**kept)


def _check_present(model: nn.Module, norm: PlaceNorm, parts: dict[str, nn.Module]) -> None:
    """Refuse a norm that the model has not, and keys of a batch norm where it has none."""
    place = PLACES[norm.place]
    changed = [key for key in norm.changed if key != "SHUFFLE" or not parts]  # which heads of others may do with
    # The names of a backbone's norms may be its own.
    is_chosen = norm.place != "RESNETS" and norm.name not in ("", place.default)

    modules = [module for part in parts.values() for module in part.modules()]
    if changed and not any(isinstance(module, BatchNorm2d) for module in modules):
        key, value = f"MODEL.BNEXT.{norm.place}.{changed[0]}", norm.get_value(changed[0])
        missing = "no batch norm that is not frozen"
    elif is_chosen and not any(find_forms(part) for part in parts.values()):
        key, value, missing = place.norm, norm.name, "no norm at all"
    else:
        return

    remedy = REMEDIES.get(norm.place, f"Choose a head of detectron2 that heeds {place.norm}")
    if place.sees_rois and not parts:
        remedy = NO_HEAD
    raise ConfigError.of(
        key,
        f"keep its default in a model that has there {missing}",
        got=repr(value),
        where=type(model).__name__,
        remedy=f"{remedy}, or remove the key.",
    )


def _tell_frozen(model: nn.Module, place: PlaceNorm, parts: dict[str, nn.Module]) -> None:
    """Say which norms of a place are frozen, where its keys ask for domains or for mini-batches at inference."""
    answers = vars(place.spec)
    asked = [name.upper() for name in OWNED if is_per_domain(answers[name])]
    if place.spec.inference == "mini_batch":
        asked.append("INFERENCE")

    paths: dict[str, bool] = {}
    for root, part in parts.items() if asked else ():
        for path, norm, _ in find_forms(part):
            paths[f"{root}.{path}"] = isinstance(norm, FrozenBatchNorm2d)

    frozen = [path for path, is_frozen in paths.items() if is_frozen]
    if frozen:
        keys = f"MODEL.BNEXT.{place.place}.{', '.join(asked)}"
        tell_once(log, model, FROZEN_NORMS, len(frozen), len(paths), place.place, list_few(frozen), keys)


def _check_same_inference(norm: PlaceNorm, parts: dict[str, nn.Module]) -> None:
    """With mini-batches at inference, a batch norm that is not ours would go on with population statistics."""
    for root, part in parts.items():
        for path, foreign in find_foreign_norms(part).items():
            raise ConfigError.of(
                f"MODEL.BNEXT.{norm.place}.INFERENCE",
                "be 'population' in a head with a batch norm that is not bnext's",
                got=repr(norm.spec.inference),
                where=f"{root}.{path} is a {type(foreign).__name__}",
                remedy="Make it a BatchNorm2d, or remove the key.",
            )

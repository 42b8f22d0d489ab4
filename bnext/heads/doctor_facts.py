"""Facts for the doctor that a config knows of a detector: its places, its levels, and how it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from torch import nn

from bnext.config.check import flatten
from bnext.config.places import PLACES
from bnext.data.sampling.samplers import count_micro_batch
from bnext.diagnostics.diagnose import read_weight_decay
from bnext.diagnostics.facts import Facts, NormFacts, TrainingFacts
from bnext.heads.places import find_parts
from bnext.lazy_config import is_lazy

__all__ = ["add_config_facts"]


def add_config_facts(facts: Facts, cfg: CfgNode, model: nn.Module, num_workers: int | None = None) -> Facts:
    """Facts of a model with those of its config.

    Args:
        facts: see `collect_facts`.
        cfg: of the model.
        model: any of detectron2's architectures, or one of the user's.
        num_workers: that train it; None: those of this run.
    """
    size = num_workers or comm.get_world_size()
    known = facts.training or TrainingFacts()
    if not known.weight_decay and not is_lazy(cfg):
        known = dataclasses.replace(known, weight_decay=_read_weight_decay(facts, cfg, model))
    training = dataclasses.replace(
        known,
        num_workers=size,
        images_per_worker=max(1, count_micro_batch(cfg) // size),
        accumulation=int(cfg.SOLVER.BNEXT.ACCUMULATE),
        virtual_images=int(cfg.SOLVER.BNEXT.VIRTUAL_IMAGES) // size,
    )
    places = _find_places(model)
    levels = _find_levels(model)

    norms = []
    for norm in facts.norms:
        root = next((root for root in places if norm.path.startswith(f"{root}.")), "")
        place = places.get(root, "")
        changed: dict[str, Any] = {"place": place, "reason": _explain(cfg, model, norm, place)}
        if place:  # the heads of C4 models are of the backbone's place
            sees_rois = PLACES[place].sees_rois or root.startswith("roi_heads.")
            changed |= {"sees_rois": sees_rois, "norm_key": PLACES[place].norm}
        if place in levels:
            changed["levels"] = levels[place]
        norms.append(dataclasses.replace(norm, **changed))
    return dataclasses.replace(facts, norms=tuple(norms), config=flatten(cfg), training=training)


def _read_weight_decay(facts: Facts, cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Weight decay of the norms, as the optimizer of the config would have it."""
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return read_weight_decay(model, facts.norms, groups)


def _find_places(model: nn.Module) -> dict[str, str]:
    """Path of each part of a detector -> its place; a head of another detector than detectron2's heeds no key."""
    is_dense = hasattr(model, "head_in_features")
    names = [name for name in PLACES if name != "RETINANET" or is_dense]
    return {path: name for name in names for path in find_parts(model, name)}


def _find_levels(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Place -> the features that its norms are called on, one after the other or together."""
    features = {"RETINANET": model, "RPN": getattr(model, "proposal_generator", None)}
    names = {"RETINANET": "head_in_features", "RPN": "in_features"}

    levels = {}
    for place, part in features.items():
        found = getattr(part, names[place], None)
        if isinstance(found, Sequence) and not isinstance(found, str):  # of a LazyConfig it is no list
            levels[place] = tuple(map(str, found))
    return levels


def _explain(cfg: CfgNode, model: nn.Module, norm: NormFacts, place: str) -> str:
    """The key that froze a norm, where it was one."""
    is_frozen = isinstance(model.get_submodule(norm.path), FrozenBatchNorm2d)
    if not is_frozen or place != "RESNETS":
        return norm.reason
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        return "MODEL.RESNETS.NORM is FrozenBN"
    return f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}"

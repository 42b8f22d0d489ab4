"""Config keys of bnext: their defaults, and what they say of a place. Their check is in `bnext.config.check`."""

from __future__ import annotations

import dataclasses
from typing import Any

from detectron2.config import CfgNode

from bnext.config.estimates import add_test_keys
from bnext.config.schedules import add_schedule_keys
from bnext.errors import ConfigError
from bnext.layers.build import NAMED_NORMS
from bnext.layers.spec import NormSpec, Workers

__all__ = [
    "BATCH_NORMS",
    "LEVEL_ARCHITECTURES",
    "PLACES",
    "RESNET_BACKBONES",
    "Place",
    "add_bnext_config",
    "find_changed_keys",
    "get_head_norm",
    "get_norm_name",
    "get_place_norm",
    "has_place",
    "is_per_domain",
    "make_node",
    "read_key",
]

# Meta-architectures whose head sees several named levels; they read MODEL.RETINANET.
LEVEL_ARCHITECTURES = ("BNextRetinaNet", "BNextFCOS")
_RCNNS = ("BNextGeneralizedRCNN", "BNextPanopticFPN")
_WITH_RPN = ("BNextGeneralizedRCNN", "BNextProposalNetwork", "BNextPanopticFPN")
_SEGMENTORS = ("BNextPanopticFPN", "BNextSemanticSegmentor")
_ALL = (*LEVEL_ARCHITECTURES, *_WITH_RPN, "BNextSemanticSegmentor")
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
        switch: key that must be true for it; "": it is always there.
        levels: key of the features of several levels that each of its norms sees; "": each sees one feature.
        sees_rois: whether its samples are RoIs.
    """

    norm: str
    architectures: tuple[str, ...]
    switch: str = ""
    levels: str = ""
    sees_rois: bool = False

    @property
    def sources(self) -> tuple[str, str]:
        """The allowed answers to whose statistics."""
        return ("shared", "per_level" if self.levels else "per_domain")


PLACES = {
    "RESNETS": Place("MODEL.RESNETS.NORM", _ALL),  # the bottom-up network, of any kind; the heads of C4 models
    "FPN": Place("MODEL.FPN.NORM", _ALL),
    "RETINANET": Place("MODEL.RETINANET.NORM", LEVEL_ARCHITECTURES, levels="MODEL.RETINANET.IN_FEATURES"),
    "RPN": Place("MODEL.BNEXT.RPN.NORM", _WITH_RPN, levels="MODEL.RPN.IN_FEATURES"),
    "ROI_BOX_HEAD": Place("MODEL.ROI_BOX_HEAD.NORM", _RCNNS, sees_rois=True),
    "ROI_MASK_HEAD": Place("MODEL.ROI_MASK_HEAD.NORM", _RCNNS, switch="MODEL.MASK_ON", sees_rois=True),
    "ROI_KEYPOINT_HEAD": Place(
        "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", _RCNNS, switch="MODEL.KEYPOINT_ON", sees_rois=True
    ),
    "SEM_SEG_HEAD": Place("MODEL.SEM_SEG_HEAD.NORM", _SEGMENTORS),
}


def add_bnext_config(cfg: CfgNode) -> None:
    """Add the keys of bnext to a config, between `get_cfg()` and `merge_from_file`.

    The defaults leave detectron2's behaviour as it is: everything is shared, but a BN in a RetinaNet head has
    statistics per level and a shared affine, as its `CycleBatchNormList` (row 4 of the paper's Table 5).
    """
    cfg.MODEL.BNEXT = CfgNode()
    for name, place in PLACES.items():
        cfg.MODEL.BNEXT[name] = make_node(name, place)
    cfg.MODEL.BNEXT.DOMAINS = CfgNode()
    # Names of the domains, in every place where something is per_domain; see bnext.use_domain.
    cfg.MODEL.BNEXT.DOMAINS.NAMES = ()
    # The domain of samples without one, or of an unknown one; "": that is an error.
    cfg.MODEL.BNEXT.DOMAINS.FALLBACK = ""
    # "SGD" or "ADAMW"; the name and the values that other projects on detectron2 use.
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"
    add_schedule_keys(cfg)
    add_test_keys(cfg)


def make_node(name: str, place: Place) -> CfgNode:
    """The keys of one place; the same for all. `NormSpec` says at length what they mean."""
    node = CfgNode()
    if place.norm.startswith("MODEL.BNEXT."):
        # "BN", "SyncBN", "FrozenBN", "GN", "LN" or "": none. Detectron2 has no such key, and no norm here.
        node.NORM = ""
    # Mini-batch statistics in SGD: of all together ("shared"), or of each alone: "per_level" or "per_domain".
    node.STATISTICS = "per_level" if place.levels else "shared"
    # At most so many samples of a worker are normalized together (Ghost BN); 0: its whole batch.
    node.NORMALIZATION_BATCH_SIZE = 0
    # Who shares a mini-batch: "one", "node", "all", or so many workers; None: as the norm's name says.
    node.WORKERS = None
    # What normalizes in training: the "mini_batch", the "population", or in between ("renorm").
    node.TRAINING = "mini_batch"
    # Limits of renorm's corrections.
    node.R_MAX = 3.0
    node.D_MAX = 5.0
    # Population statistics, which normalize at inference: one set ("shared"), one of each, or "none".
    node.POPULATION = "per_level" if place.levels else "shared"
    # How they take in a mini-batch: "moving" average with MOMENTUM (torch's sense), or "cumulative".
    node.AVERAGE = "moving"
    node.MOMENTUM = 0.1
    # What normalizes at inference: the "population", or the "mini_batch"; in a RoI head that of each image's RoIs.
    node.INFERENCE = "population"
    # Scale and shift: one pair ("shared"), one of each, or "none".
    node.AFFINE = "shared"
    # What no longer changes: "none", "statistics", "affine", or "both".
    node.FROZEN = "none"
    # A mini-batch of one element per channel in training is an "error", or normalized by the "population".
    node.SINGLE_ELEMENT = "error"
    node.EPS = 1e-5
    if place.sees_rois:
        # Deal the RoIs of all workers out at random, so that no mini-batch is of one image: only their "statistics"
        # travel, or their "features", for heads that couple RoIs otherwise; or "none".
        node.SHUFFLE = "none"
        # Groups of a deal of statistics, over all workers; 0: one for each worker.
        node.SHUFFLE_GROUPS = 0
    return node


def get_norm_name(cfg: CfgNode, place: str) -> str:
    """The name of a place's norm, such as "BN"."""
    return str(read_key(cfg, PLACES[place].norm))


def get_place_norm(cfg: CfgNode, place: str, name: str | None = None) -> NormSpec | str:
    """The norm of a place: a spec for "BN" and "SyncBN", else its name.

    Args:
        cfg: a whole config.
        place: one of `PLACES`.
        name: of the norm, instead of that in the config.

    Raises:
        ConfigError: the answers of its node contradict one another.
    """
    name = get_norm_name(cfg, place) if name is None else name
    if name not in BATCH_NORMS:
        return name
    node = cfg.MODEL.BNEXT[place]
    fields = {field.name for field in dataclasses.fields(NormSpec)}
    answers: dict[str, Any] = {key.lower(): value for key, value in node.items() if key.lower() in fields}
    answers["normalization_batch_size"] = node.NORMALIZATION_BATCH_SIZE or None
    answers["workers"] = _find_workers(node, name)
    if is_per_domain(node):
        domains = cfg.MODEL.BNEXT.DOMAINS
        answers |= {"domains": tuple(domains.NAMES), "fallback_domain": domains.FALLBACK or None}
    try:
        return NormSpec(**answers)
    except ConfigError as error:
        raise ConfigError(f"MODEL.BNEXT.{place}: {error}") from error


def _find_workers(node: CfgNode, name: str) -> Workers:
    if node.WORKERS is not None:
        return node.WORKERS
    return "all" if node.get("SHUFFLE") == "statistics" else NAMED_NORMS[name].workers


def get_head_norm(cfg: CfgNode) -> NormSpec | str:
    """The norm of a level-shared head: a spec for "BN" and "SyncBN", else detectron2's name of it."""
    return get_place_norm(cfg, "RETINANET")


def has_place(cfg: CfgNode, place: str) -> bool:
    """Whether the config's architecture has a place. (Its FPN, and the kind of its heads, show when it is built.)"""
    what = PLACES[place]
    return cfg.MODEL.META_ARCHITECTURE in what.architectures and (not what.switch or bool(read_key(cfg, what.switch)))


def find_changed_keys(cfg: CfgNode, place: str) -> list[str]:
    """The keys of a place's node, but NORM, that are not at their defaults."""
    node, default = cfg.MODEL.BNEXT[place], make_node(place, PLACES[place])
    return [key for key, value in default.items() if key != "NORM" and node[key] != value]


def read_key(cfg: CfgNode, key: str) -> Any:
    """The value of a key such as "MODEL.FPN.NORM"."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def is_per_domain(node: CfgNode) -> bool:
    """Whether something of a place belongs to domains."""
    return "per_domain" in (node.STATISTICS, node.POPULATION, node.AFFINE)

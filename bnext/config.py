"""Config keys of bnext: their defaults, their meaning, and the check that they make sense together."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

try:
    from detectron2.config import CfgNode
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "detectron2 must be installed for bnext's configs, heads, data and tools; got none. Run "
        "`python tools/install_detectron2.py`, or install it from its repository or from conda-forge. "
        "bnext's layers and statistics work without it."
    ) from error

from bnext.config_schedules import add_schedule_keys, check_schedules
from bnext.errors import ConfigError
from bnext.layers.build import NAMED_NORMS, NORM_NAMES
from bnext.layers.spec import Average, Frozen, Inference, NormSpec, SingleElement, Training, check_choice

__all__ = [
    "BATCH_NORMS",
    "LEVEL_ARCHITECTURES",
    "PLACES",
    "Place",
    "add_bnext_config",
    "check_config",
    "find_changed_keys",
    "get_head_norm",
    "get_norm_name",
    "get_place_norm",
    "has_place",
]

# Meta-architectures whose head sees several named levels; they read MODEL.RETINANET.
LEVEL_ARCHITECTURES = ("BNextRetinaNet", "BNextFCOS")
_RCNNS = ("BNextGeneralizedRCNN", "BNextPanopticFPN")
_WITH_RPN = ("BNextGeneralizedRCNN", "BNextProposalNetwork", "BNextPanopticFPN")
_SEGMENTORS = ("BNextPanopticFPN", "BNextSemanticSegmentor")
_ALL = (*LEVEL_ARCHITECTURES, *_WITH_RPN, "BNextSemanticSegmentor")
# Backbones that have the norm of MODEL.RESNETS.NORM and no other. What another has shows when it is built.
_RESNETS = ("build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
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
    """

    norm: str
    architectures: tuple[str, ...]
    switch: str = ""
    levels: str = ""

    @property
    def sources(self) -> tuple[str, str]:
        """The allowed answers to whose statistics."""
        return ("shared", "per_level" if self.levels else "per_domain")


PLACES = {
    "RESNETS": Place("MODEL.RESNETS.NORM", _ALL),  # the bottom-up network, of any kind; the heads of C4 models
    "FPN": Place("MODEL.FPN.NORM", _ALL),
    "RETINANET": Place("MODEL.RETINANET.NORM", LEVEL_ARCHITECTURES, levels="MODEL.RETINANET.IN_FEATURES"),
    "RPN": Place("MODEL.BNEXT.RPN.NORM", _WITH_RPN, levels="MODEL.RPN.IN_FEATURES"),
    "ROI_BOX_HEAD": Place("MODEL.ROI_BOX_HEAD.NORM", _RCNNS),
    "ROI_MASK_HEAD": Place("MODEL.ROI_MASK_HEAD.NORM", _RCNNS, switch="MODEL.MASK_ON"),
    "ROI_KEYPOINT_HEAD": Place("MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", _RCNNS, switch="MODEL.KEYPOINT_ON"),
    "SEM_SEG_HEAD": Place("MODEL.SEM_SEG_HEAD.NORM", _SEGMENTORS),
}


def add_bnext_config(cfg: CfgNode) -> None:
    """Add the keys of bnext to a config, between `get_cfg()` and `merge_from_file`.

    The defaults leave detectron2's behaviour as it is: everything is shared, but a BN in a RetinaNet head has
    statistics per level and a shared affine, as its `CycleBatchNormList` (row 4 of the paper's Table 5).
    """
    cfg.MODEL.BNEXT = CfgNode()
    for name, place in PLACES.items():
        cfg.MODEL.BNEXT[name] = _make_node(name, place)
    cfg.MODEL.BNEXT.DOMAINS = CfgNode()
    # Names of the domains, in every place where something is per_domain; see bnext.use_domain.
    cfg.MODEL.BNEXT.DOMAINS.NAMES = ()
    # The domain of samples without one, or of an unknown one; "": that is an error.
    cfg.MODEL.BNEXT.DOMAINS.FALLBACK = ""
    # "SGD" or "ADAMW"; the name and the values that other projects on detectron2 use.
    if "OPTIMIZER" not in cfg.SOLVER:
        cfg.SOLVER.OPTIMIZER = "SGD"
    add_schedule_keys(cfg)


def _make_node(name: str, place: Place) -> CfgNode:
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
    # What normalizes at inference: the "population", or the "mini_batch".
    node.INFERENCE = "population"
    # Scale and shift: one pair ("shared"), one of each, or "none".
    node.AFFINE = "shared"
    # What no longer changes: "none", "statistics", "affine", or "both".
    node.FROZEN = "none"
    # A mini-batch of one element per channel in training is an "error", or normalized by the "population".
    node.SINGLE_ELEMENT = "error"
    node.EPS = 1e-5
    return node


def get_norm_name(cfg: CfgNode, place: str) -> str:
    """The name of a place's norm, such as "BN"."""
    return str(_read(cfg, PLACES[place].norm))


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
    answers["workers"] = NAMED_NORMS[name].workers if node.WORKERS is None else node.WORKERS
    if _is_per_domain(node):
        domains = cfg.MODEL.BNEXT.DOMAINS
        answers |= {"domains": tuple(domains.NAMES), "fallback_domain": domains.FALLBACK or None}
    try:
        return NormSpec(**answers)
    except ConfigError as error:
        raise ConfigError(f"MODEL.BNEXT.{place}: {error}") from error


def get_head_norm(cfg: CfgNode) -> NormSpec | str:
    """The norm of a level-shared head: a spec for "BN" and "SyncBN", else detectron2's name of it."""
    return get_place_norm(cfg, "RETINANET")


def has_place(cfg: CfgNode, place: str) -> bool:
    """Whether the config's architecture has a place. (Its FPN, and the kind of its heads, show when it is built.)"""
    what = PLACES[place]
    return cfg.MODEL.META_ARCHITECTURE in what.architectures and (not what.switch or bool(_read(cfg, what.switch)))


def find_changed_keys(cfg: CfgNode, place: str) -> list[str]:
    """The keys of a place's node, but NORM, that are not at their defaults."""
    node, default = cfg.MODEL.BNEXT[place], _make_node(place, PLACES[place])
    return [key for key, value in default.items() if key != "NORM" and node[key] != value]


def check_config(cfg: CfgNode) -> None:
    """Refuse keys of bnext that are unknown, contradict one another, or would have no effect.

    Raises:
        ConfigError: names the key, its value, and what is allowed.
    """
    if "BNEXT" not in cfg.MODEL:
        raise ConfigError(
            "MODEL.BNEXT must be in the config; got a config without it (check_config). "
            "Call bnext.add_bnext_config(cfg) after get_cfg() and before merge_from_file."
        )
    _check_domains(cfg)
    for place in PLACES:
        _check_choices(cfg.MODEL.BNEXT[place], place)
        _check_has_effect(cfg, place)
        if has_place(cfg, place):
            check_choice(PLACES[place].norm, get_norm_name(cfg, place), NORM_NAMES, where="config")
            is_batch_norm = get_norm_name(cfg, place) in BATCH_NORMS or not find_changed_keys(cfg, place)
            get_place_norm(cfg, place, name=None if is_batch_norm else "BN")
    check_schedules(cfg)


def _read(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _is_per_domain(node: CfgNode) -> bool:
    return "per_domain" in (node.STATISTICS, node.POPULATION, node.AFFINE)


def _check_choices(node: CfgNode, place: str) -> None:
    sources = PLACES[place].sources
    allowed = {
        "STATISTICS": sources,
        "POPULATION": (*sources, "none"),
        "AFFINE": (*sources, "none"),
        "TRAINING": get_args(Training),
        "AVERAGE": get_args(Average),
        "INFERENCE": get_args(Inference),
        "FROZEN": get_args(Frozen),
        "SINGLE_ELEMENT": get_args(SingleElement),
    }
    for key, values in allowed.items():
        check_choice(f"MODEL.BNEXT.{place}.{key}", node[key], values, where="config")
    is_number = isinstance(node.WORKERS, int) and not isinstance(node.WORKERS, bool)
    if not is_number and node.WORKERS not in (None, "one", "node", "all"):
        raise ConfigError(
            f"MODEL.BNEXT.{place}.WORKERS must be one of 'one', 'node', 'all', a number of workers, or None for what "
            f"the norm's name says; got {node.WORKERS!r} (config). Choose one of them."
        )
    for keys, other, value in ((("R_MAX", "D_MAX"), "TRAINING", "renorm"), (("MOMENTUM",), "AVERAGE", "moving")):
        for key in keys:
            if node[key] != _make_node(place, PLACES[place])[key] and node[other] != value:
                raise ConfigError(
                    f"MODEL.BNEXT.{place}.{key} must keep its default unless {other} is {value!r}; got {node[key]!r} "
                    f"({other} is {node[other]!r}). Set {other}, or remove the key."
                )


def _check_has_effect(cfg: CfgNode, place: str) -> None:
    """Changed keys need the place, with a batch norm; a choice between levels needs several."""
    what, node = PLACES[place], cfg.MODEL.BNEXT[place]
    named = ["NORM"] if node.get("NORM") else []
    for key in [*named, *find_changed_keys(cfg, place)]:
        start = f"MODEL.BNEXT.{place}.{key} must keep its default"
        if cfg.MODEL.META_ARCHITECTURE not in what.architectures:
            raise ConfigError(
                f"{start} in a model without this place of bnext; got {node[key]!r} (MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE!r}). Set MODEL.META_ARCHITECTURE to one of "
                f"{', '.join(what.architectures)}, or remove the key."
            )
        if not has_place(cfg, place):
            raise ConfigError(
                f"{start} where {what.switch} is False; got {node[key]!r} (config). Set {what.switch} to True, or "
                f"remove the key."
            )
        if key != "NORM":
            _check_has_norm(cfg, place, key)


def _check_has_norm(cfg: CfgNode, place: str, key: str) -> None:
    what, norm = PLACES[place], get_norm_name(cfg, place)
    start, value = f"MODEL.BNEXT.{place}.{key} must keep its default", cfg.MODEL.BNEXT[place][key]
    if norm not in BATCH_NORMS and (place != "RESNETS" or cfg.MODEL.BACKBONE.NAME in _RESNETS):
        check_choice(what.norm, norm, NORM_NAMES, where="config")
        raise ConfigError(
            f"{start} where there is no batch norm of bnext; got {value!r} ({what.norm} is {norm!r}). "
            f"Set {what.norm} to one of {', '.join(BATCH_NORMS)}, or remove the key."
        )
    is_choice = key in ("STATISTICS", "POPULATION", "AFFINE") and "none" not in value
    if what.levels and is_choice and len(_read(cfg, what.levels)) < 2:
        raise ConfigError(
            f"{start} where the head sees a single level; got {value!r} ({what.levels} is {_read(cfg, what.levels)}). "
            f"Name several levels there."
        )


def _check_domains(cfg: CfgNode) -> None:
    """Names that nothing uses would be a separate BN that is none."""
    domains = cfg.MODEL.BNEXT.DOMAINS
    if not all(isinstance(name, str) and name for name in domains.NAMES):
        raise ConfigError(
            f"MODEL.BNEXT.DOMAINS.NAMES must be names; got {domains.NAMES!r} (config). Write them as ('day', 'night')."
        )
    key = "NAMES" if domains.NAMES else "FALLBACK"
    if domains[key] and not any(_is_per_domain(cfg.MODEL.BNEXT[place]) for place in PLACES):
        raise ConfigError(
            f"MODEL.BNEXT.DOMAINS.{key} must keep its default where nothing is per_domain; got {domains[key]!r} "
            f"(config). Set STATISTICS, POPULATION or AFFINE of a place, such as MODEL.BNEXT.RESNETS, to 'per_domain'."
        )

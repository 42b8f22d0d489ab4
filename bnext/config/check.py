"""The check that bnext's config keys make sense: each alone, together, and in the model that the config describes."""

from __future__ import annotations

from typing import get_args

from detectron2.config import CfgNode

from bnext.config.estimates import check_test_keys
from bnext.config.places import (
    BATCH_NORMS,
    PLACES,
    RESNET_BACKBONES,
    find_changed_keys,
    get_norm_name,
    get_place_norm,
    has_place,
    is_per_domain,
    make_node,
    read_key,
)
from bnext.config.schedules import check_schedules
from bnext.errors import ConfigError, check_choice
from bnext.layers.build import NORM_NAMES
from bnext.layers.spec import Average, Frozen, Inference, SingleElement, Training

__all__ = ["check_config"]


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
            if PLACES[place].sees_rois:
                _check_shuffle(cfg, place)
            is_batch_norm = get_norm_name(cfg, place) in BATCH_NORMS or not find_changed_keys(cfg, place)
            get_place_norm(cfg, place, name=None if is_batch_norm else "BN")
    check_schedules(cfg)
    check_test_keys(cfg, has_roi_heads=has_place(cfg, "ROI_BOX_HEAD"))


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
            if node[key] != make_node(place, PLACES[place])[key] and node[other] != value:
                raise ConfigError(
                    f"MODEL.BNEXT.{place}.{key} must keep its default unless {other} is {value!r}; got {node[key]!r} "
                    f"({other} is {node[other]!r}). Set {other}, or remove the key."
                )


def _check_shuffle(cfg: CfgNode, place: str) -> None:
    """A shuffle that would be none, or that something else makes superfluous."""
    node, key = cfg.MODEL.BNEXT[place], f"MODEL.BNEXT.{place}"
    shuffle = node.SHUFFLE
    check_choice(f"{key}.SHUFFLE", shuffle, ("none", "statistics", "features"), where="config")
    _check_shuffle_groups(cfg, place)
    if shuffle == "none":
        return
    superfluous = {
        "NORMALIZATION_BATCH_SIZE": node.NORMALIZATION_BATCH_SIZE != 0,
        "TRAINING": node.TRAINING == "population",
        "FROZEN": node.FROZEN in ("statistics", "both"),
        "WORKERS": shuffle == "features" and node.WORKERS not in (None, "one", 1),
    }
    for other in (other for other, is_set in superfluous.items() if is_set):
        raise ConfigError(
            f"{key}.{other} must keep its default where RoIs are dealt out; got {node[other]!r} (SHUFFLE is "
            f"{shuffle!r}). Remove one of the two."
        )
    if shuffle == "features" and get_norm_name(cfg, place) == "SyncBN":
        raise ConfigError(
            f"{PLACES[place].norm} must not be SyncBN where features are shuffled; got 'SyncBN' ({key}.SHUFFLE is "
            f"'features'): all RoIs share one mini-batch wherever they are. Use BN."
        )
    if shuffle == "features" and is_per_domain(node):
        raise ConfigError(
            f"{key}.SHUFFLE must be 'none' or 'statistics' where something is per_domain; got 'features' (config): "
            f"RoIs move to workers that do not know their domain. Use 'statistics'."
        )


def _check_shuffle_groups(cfg: CfgNode, place: str) -> None:
    node, key = cfg.MODEL.BNEXT[place], f"MODEL.BNEXT.{place}"
    shuffle, groups = node.SHUFFLE, node.SHUFFLE_GROUPS
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 0 or groups == 1:
        raise ConfigError(
            f"{key}.SHUFFLE_GROUPS must be 2 or more, or 0 for one per worker; got {groups!r} (config). Choose a "
            f"number; one group over all workers is {PLACES[place].norm} SyncBN without a shuffle."
        )
    if groups and shuffle != "statistics":
        raise ConfigError(
            f"{key}.SHUFFLE_GROUPS must keep its default unless SHUFFLE is 'statistics'; got {groups} (SHUFFLE is "
            f"{shuffle!r}). Set SHUFFLE to 'statistics', or remove the key: features move to as many workers as "
            f"there are."
        )
    if shuffle == "statistics" and node.WORKERS in ("one", 1) and not groups:
        raise ConfigError(
            f"{key}.SHUFFLE_GROUPS must be 2 or more where each worker deals its own RoIs; got 0 (WORKERS is "
            f"{node.WORKERS!r}). Set it, or remove WORKERS: the RoIs of all workers are dealt out."
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
        is_foreign = key == "SHUFFLE" and node[key] == "features"  # what couples RoIs is seen when the head is built
        if key != "NORM" and not is_foreign:
            _check_has_norm(cfg, place, key)


def _check_has_norm(cfg: CfgNode, place: str, key: str) -> None:
    what, norm = PLACES[place], get_norm_name(cfg, place)
    start, value = f"MODEL.BNEXT.{place}.{key} must keep its default", cfg.MODEL.BNEXT[place][key]
    if norm not in BATCH_NORMS and (place != "RESNETS" or cfg.MODEL.BACKBONE.NAME in RESNET_BACKBONES):
        check_choice(what.norm, norm, NORM_NAMES, where="config")
        raise ConfigError(
            f"{start} where there is no batch norm of bnext; got {value!r} ({what.norm} is {norm!r}). "
            f"Set {what.norm} to one of {', '.join(BATCH_NORMS)}, or remove the key."
        )
    is_choice = key in ("STATISTICS", "POPULATION", "AFFINE") and "none" not in value
    levels = read_key(cfg, what.levels) if what.levels else ()
    if what.levels and is_choice and len(levels) < 2:
        raise ConfigError(
            f"{start} where the head sees a single level; got {value!r} ({what.levels} is {levels}). "
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
    if domains[key] and not any(is_per_domain(cfg.MODEL.BNEXT[place]) for place in PLACES):
        raise ConfigError(
            f"MODEL.BNEXT.DOMAINS.{key} must keep its default where nothing is per_domain; got {domains[key]!r} "
            f"(config). Set STATISTICS, POPULATION or AFFINE of a place, such as MODEL.BNEXT.RESNETS, to 'per_domain'."
        )

"""The domain of each image: said for a whole set in a config or with its registration, or by a record itself.

    a config, the catalogs  --find_domain-->  the domain of a set  --name_source-->  records with `domain`

A record's own `domain` comes first: the function of a registered set may give one for each image. Then
DATASETS.DOMAINS.TRAIN and TEST, the `domain` of an entry of DATASETS.BNEXT.COCO, and the metadata of the set. Where a
training makes images of an auxiliary domain (SOLVER.BNEXT.AUXILIARY), those of a set without a domain are "clean".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.corrupted_sets import find_base
from bnext.errors import ConfigError, DatasetError, Refusal

__all__ = [
    "check_domain_lists",
    "count_domains",
    "find_auxiliary_domain",
    "find_domain",
    "find_norm_domains",
    "find_train_domains",
    "keep_domains",
    "name_source",
    "select_sets",
]

KEY = "DATASETS.DOMAINS"
PARTS = ("TRAIN", "TEST")
CLEAN = "clean"
_LENGTH = Refusal(
    ConfigError,
    KEY + ".{part}",
    "name one domain for each of the {number} sets of DATASETS.{part}, or be empty",
    "Write one name for each set, in their order; '' where its registration says it.",
)
_NO_NAMES = Refusal(ConfigError, KEY + ".{part}", "be names", "Write them as ('day', 'night').")
_TWO_DOMAINS = Refusal(
    ConfigError, KEY, "give a set one domain", "Correct TRAIN or TEST, or register the other images as another set."
)
_TAKEN_NAME = Refusal(
    DatasetError,
    "A domain",
    "be called otherwise than {names}, which name what is computed over all domains",
    "Rename it in DATASETS.DOMAINS, or where data set {name!r} is registered.",
)
_TAKEN_NAMES = ("mean", "worst")
_NO_NAME = Refusal(
    DatasetError, "The `domain` of a record", "be a name", "Correct the function that data set {name!r} is made by."
)


def check_domain_lists(cfg: CfgNode) -> None:
    """Refuse lists of domains that do not go with the lists of sets.

    Args:
        cfg: DATASETS.TRAIN, TEST and DOMAINS are read.

    Raises:
        ConfigError: names the list and what it would have to be.
    """
    named: dict[str, str] = {}
    for part in PARTS:
        domains, sets = cfg.DATASETS.DOMAINS[part], cfg.DATASETS[part]
        if not isinstance(domains, (list, tuple)) or not all(isinstance(name, str) for name in domains):
            raise _NO_NAMES.of(repr(domains), "config", part=part)
        if domains and len(domains) != len(sets):
            raise _LENGTH.of(f"{len(domains)}, {tuple(domains)}", f"sets: {tuple(sets)}", part=part, number=len(sets))

        for name, domain in zip(sets, domains, strict=bool(domains)):
            if domain and named.setdefault(name, domain) != domain:
                raise _TWO_DOMAINS.of(f"{named[name]!r} and {domain!r}", f"data set {name!r}")


def find_domain(cfg: CfgNode, name: str) -> str:
    """The domain of all images of a set; "": it is not said, or by its records alone.

    Args:
        cfg: DATASETS and SOLVER.BNEXT.AUXILIARY are read.
        name: of the set, which need not be registered yet where the config lists it.
    """
    return _find_said_domain(cfg, name) or (CLEAN if find_auxiliary_domain(cfg) else "")


def _find_said_domain(cfg: CfgNode, name: str) -> str:
    domain = _find_paired_domain(cfg, name)
    if domain:
        return domain

    name = find_base(name)
    listed = (cfg.DATASETS.get("BNEXT") or {}).get("COCO") or ()
    for entry in listed:
        if entry.get("name") == name:
            return str(entry.get("domain", ""))
    return str(MetadataCatalog.get(name).get("domain", "") or "") if name in DatasetCatalog else ""


def _find_paired_domain(cfg: CfgNode, name: str) -> str:
    """The domain that DATASETS.DOMAINS says of a set, or of the one that it is a corrupted variant of."""
    node = cfg.DATASETS.get("DOMAINS") or {}
    pairs = [pair for part in PARTS for pair in zip(cfg.DATASETS[part], node.get(part) or (), strict=False)]
    for one in dict.fromkeys((name, find_base(name))):
        for other, domain in pairs:
            if other == one and domain:
                return str(domain)
    return ""


def find_auxiliary_domain(cfg: CfgNode) -> str:
    """The domain of the images that a training makes of its own (SOLVER.BNEXT.AUXILIARY); "" if it makes none."""
    node = (cfg.SOLVER.get("BNEXT") or {}).get("AUXILIARY") or {}
    kind = node.get("KIND", "none")
    return "" if kind == "none" else str(node.get("DOMAIN") or kind)


def find_train_domains(cfg: CfgNode) -> tuple[str, ...]:
    """The domains that the training sets are said to be of, in their order; several sets may be of one."""
    domains = [find_domain(cfg, name) for name in cfg.DATASETS.TRAIN]
    return tuple(dict.fromkeys(filter(None, domains)))


def find_norm_domains(cfg: CfgNode) -> tuple[str, ...]:
    """The domains whose images norms see in a training: those of its sets, and last that of auxiliary images."""
    domains = (*find_train_domains(cfg), find_auxiliary_domain(cfg))
    return tuple(dict.fromkeys(filter(None, domains)))


def select_sets(cfg: CfgNode, part: str, names: Sequence[str]) -> None:
    """Put other sets in the place of those of DATASETS.TRAIN or TEST, each with the domain that it has. In place.

    Args:
        cfg: not frozen.
        part: "TRAIN" or "TEST".
        names: of the sets.
    """
    domains = tuple(find_domain(cfg, name) for name in names)
    cfg.DATASETS[part] = tuple(names)
    cfg.DATASETS.DOMAINS[part] = domains if any(domains) else ()


def keep_domains(cfg: CfgNode, before: CfgNode, changed: Collection[str]) -> None:
    """Let sets keep their domains where other lists of sets, but none of domains, have been put in. In place.

    DATASETS.DOMAINS goes by position: ('day', 'night') would be said of whatever two sets come next.

    Args:
        cfg: not frozen.
        before: as it was, with the lists that went together.
        changed: the keys that have been given new values.
    """
    for part in PARTS:
        if f"DATASETS.{part}" in changed and f"{KEY}.{part}" not in changed:
            domains = tuple(_find_paired_domain(before, name) for name in cfg.DATASETS[part])
            cfg.DATASETS.DOMAINS[part] = domains if any(domains) else ()


def name_source(cfg: CfgNode, name: str, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a set with `dataset_source`, its index in DATASETS.TRAIN or else TEST, and their `domain`.

    Args:
        cfg: DATASETS is read.
        name: of the set; of one that is in neither list there is no index.
        records: left as they are. One that has a `domain` keeps it.

    Raises:
        DatasetError: a `domain` of a record is no name, or one that an evaluation uses otherwise.

    Source:
        The key `dataset_source` is that of UniDet (Zhou et al. 2022) and Detic.
    """
    source: dict[str, Any] = {}
    for part in ("TEST", "TRAIN"):
        if name in cfg.DATASETS[part]:
            source["dataset_source"] = list(cfg.DATASETS[part]).index(name)
    domain = find_domain(cfg, name)
    if domain:
        source["domain"] = domain

    named = [{**source, **record} for record in records]
    for record in named:
        given = record.get("domain", "none")
        if not isinstance(given, str) or not given:
            raise _NO_NAME.of(repr(given), str(record.get("file_name", "")), name=name)
        if given in _TAKEN_NAMES:
            names = " and ".join(map(repr, _TAKEN_NAMES))
            raise _TAKEN_NAME.of(repr(given), f"data set {name!r}", names=names, name=name)
    return named


def count_domains(records: Sequence[dict[str, Any]]) -> Counter[str]:
    """Domain -> images; "": those without one."""
    return Counter(record.get("domain", "") for record in records)

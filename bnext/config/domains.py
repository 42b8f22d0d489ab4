"""The domains of a config: those of its norms, beside those of its data.

What the domain of a set is, is in `bnext.data.domains`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from detectron2.config import CfgNode

from bnext.config.recipe import NormRecipe, resolve_norms
from bnext.data.domains import check_domain_lists, count_domains, find_auxiliary_domain, find_domain
from bnext.data.records import load_records, load_train_records
from bnext.errors import ConfigError, Refusal, list_few
from bnext.notices import tell_once

__all__ = ["NAMES", "check_domains", "count_set_domains"]

NAMES = "MODEL.BNEXT.DOMAINS.NAMES"
NOT_OF_NORMS = Refusal(
    ConfigError, "--domain", "be a domain of the norms, {names}", "Correct it, or leave --domain out."
)
NO_DOMAIN = Refusal(
    ConfigError,
    "Every image of a training",
    "have a domain where norms have domains ({names})",
    "Give data set {name!r} one in DATASETS.DOMAINS.TRAIN, or with its registration.",
)
UNKNOWN = Refusal(
    ConfigError,
    "The domains of a training's images",
    "be among those of the norms, {names}",
    "Correct DATASETS.DOMAINS.TRAIN, or name it in " + NAMES + ", too.",
)
UNSEEN = Refusal(
    ConfigError,
    "The domains of images in DATASETS.TEST",
    "be among those of the norms, {names}, or have a rule",
    "Correct DATASETS.DOMAINS.TEST, or say in MODEL.BNEXT.DOMAINS.UNSEEN what they are to be taken for.",
)
NO_IMAGES = Refusal(
    ConfigError,
    "Every domain of DATASETS.TRAIN",
    "have an image to train on where norms have domains",
    "Annotate images of it, leave the set out, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False to train on images "
    "without objects.",
)
NO_AUXILIARY = Refusal(
    ConfigError,
    NAMES,
    "have the domain of auxiliary images, {domain!r}",
    "Add it, leave NAMES empty, or correct SOLVER.BNEXT.AUXILIARY.DOMAIN.",
)
NEVER_SEEN = (
    "No image of DATASETS.TRAIN is of the domain(s) %s of " + NAMES + ": what the norms keep for them stays as it is "
    "at the start. There are %s."
)


def check_domains(cfg: CfgNode, *, eval_only: bool = False, domain: str | None = None) -> None:
    """Refuse images of domains that the norms do not have, before anything is trained or evaluated.

    Args:
        cfg: a whole config, its sets registered.
        eval_only: whether nothing is trained.
        domain: of which all test images are taken to be, whatever their records say; None: as they say.

    Raises:
        ConfigError: names the set, its domain, and those of the norms.
        DatasetError: a set whose domains its records alone can tell cannot be read.
    """
    check_domain_lists(cfg)
    norms = resolve_norms(cfg, says_unused=False)
    if domain is not None and domain not in norms.domains:
        names = list_few(map(repr, norms.domains)) or "which have none"
        raise NOT_OF_NORMS.of(repr(domain), NAMES, names=names)
    if not norms.domains:
        return

    if not eval_only:
        _check_train(cfg, norms)
    for name in cfg.DATASETS.TEST if domain is None else ():
        counts = count_set_domains(cfg, name)
        unseen = {domain: number for domain, number in counts.items() if domain not in norms.domains}
        if unseen and norms.unseen == "error":
            raise UNSEEN.of(_describe(unseen), f"data set {name!r}", names=list_few(map(repr, norms.domains)))


def _check_train(cfg: CfgNode, norms: NormRecipe) -> None:
    names = list_few(map(repr, norms.domains))
    records = load_train_records(cfg)

    for index, name in enumerate(cfg.DATASETS.TRAIN):
        counts = count_domains([record for record in records if record.get("dataset_source") == index])
        if counts[""]:
            raise NO_DOMAIN.of(_describe({"": counts[""]}), f"data set {name!r}", names=names, name=name)
        unknown = {domain: number for domain, number in counts.items() if domain not in norms.domains}
        if unknown:
            raise UNKNOWN.of(_describe(unknown), f"data set {name!r}", names=names)

    auxiliary = find_auxiliary_domain(cfg)
    if auxiliary and auxiliary not in norms.domains:
        raise NO_AUXILIARY.of(names, "config", domain=auxiliary)

    seen = count_domains(records)
    for name in cfg.DATASETS.TRAIN:
        domain = find_domain(cfg, name)
        if domain and not seen[domain]:
            raise NO_IMAGES.of(f"none of {domain!r}", f"data set {name!r}; there are {_describe(seen)}")

    never = [repr(name) for name in norms.domains if not seen[name] and name != auxiliary]
    if never:
        tell_once(logging.getLogger(__name__), cfg.OUTPUT_DIR, NEVER_SEEN, list_few(never), _describe(seen))


def count_set_domains(cfg: CfgNode, name: str) -> Counter[str]:
    """Domain -> images of a set; "": those without one. A set that is said to be of one domain is counted, too.

    Raises:
        DatasetError: see `load_records`.
    """
    return count_domains(load_records(name, cfg))


def _describe(counts: Mapping[str, int]) -> str:
    """Images of each domain in words."""
    return list_few([f"{number:,} {f'of {name!r}' if name else 'without one'}" for name, number in counts.items()])

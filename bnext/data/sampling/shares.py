"""Domains of the images of a training, and the share that each has: by ratios, or by its size and a temperature."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode

from bnext.data.domains import find_train_domains
from bnext.data.records import Record
from bnext.errors import ConfigError, DatasetError, Refusal, list_few
from bnext.text import suggest

__all__ = ["check_ratios", "choose_weights", "read_domains"]

_RATIOS = "DATALOADER.BNEXT.RATIOS"
_PARTS = 1_000_000  # in which shares are counted, so that no machine rounds them in another way

_NO_DOMAIN = Refusal(
    DatasetError,
    "Every image of DATASETS.TRAIN",
    "have a domain where others have one, and DATALOADER.BNEXT.BATCHES goes by it",
    "Give each data set one in DATASETS.DOMAINS.TRAIN, or with its registration.",
)
_NO_IMAGES = Refusal(
    DatasetError,
    "Domain {name!r}",
    "have an image to train on",
    "Annotate images of it, take its sets out of DATASETS.TRAIN, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False "
    "to train on images without objects.",
)
_NO_ANNOTATIONS = Refusal(
    DatasetError,
    "Domain {name!r}",
    "have annotations where DATALOADER.BNEXT.BALANCE is 'annotations'",
    "Set DATALOADER.BNEXT.BALANCE to 'images', or give shares in DATALOADER.BNEXT.RATIOS.",
)


def read_domains(cfg: CfgNode, records: Sequence[Record]) -> list[str]:
    """The domain of each image of a training, or, where none has one, the name of its data set.

    Args:
        cfg: DATASETS is read.
        records: see `load_train_records`.

    Raises:
        DatasetError: some have a domain and others have none, or one of the domains has no images.
    """
    domains = [record.get("domain", "") for record in records]
    expected = find_train_domains(cfg)
    if not any(domains):
        expected = tuple(cfg.DATASETS.TRAIN)
        domains = [expected[record["dataset_source"]] if "dataset_source" in record else "" for record in records]

    if not all(domains):
        without = Counter(record.get("file_name", "an image") for record in records if not record.get("domain"))
        raise _NO_DOMAIN.of(f"{without.total():,} without one", list_few(without))
    for name in expected:
        if name not in domains:
            raise _NO_IMAGES.of("none", where="DATASETS.TRAIN", name=name)
    return domains


def choose_weights(cfg: CfgNode, records: Sequence[Record], domains: Sequence[str]) -> dict[str, int]:
    """Domain -> whole number in proportion to its share, in the order in which they come.

    The shares are DATALOADER.BNEXT.RATIOS. Without them, a domain of n images is seen in proportion to n^(1/T), T being
    DATALOADER.BNEXT.TEMPERATURE. Where annotations are balanced, n counts those, and it is annotations that are seen in
    that proportion: the share of images has a factor of images / annotations.

    Args:
        cfg: DATALOADER.BNEXT.* are read.
        records: of a training.
        domains: of each record.

    Raises:
        ConfigError: ratios name another domain, or not all.
        DatasetError: a domain has no annotations where they are balanced.

    Source:
        Arivazhagan et al., "Massively multilingual neural machine translation in the wild" (2019): the
        temperature.
    """
    node, sizes = cfg.DATALOADER.BNEXT, Counter(domains)
    if node.RATIOS:
        ratios = {name: int(number) for name, number in node.RATIOS}
        _check_names(ratios, sizes)
        return {domain: ratios[domain] for domain in sizes}

    amounts = _count_annotations(records, domains) if node.BALANCE == "annotations" else sizes
    parts = {}
    for domain, size in sizes.items():
        if not amounts[domain]:
            raise _NO_ANNOTATIONS.of(f"none on {size:,} images", name=domain)
        seen = (amounts[domain] / amounts.total()) ** (1 / node.TEMPERATURE)
        parts[domain] = seen * size / amounts[domain]

    whole = sum(parts.values())
    return {domain: max(1, round(_PARTS * part / whole)) for domain, part in parts.items()}


def check_ratios(cfg: CfgNode) -> None:
    """Refuse ratios that no batch of SOLVER.IMS_PER_BATCH images can have.

    Args:
        cfg: DATALOADER.BNEXT.* and SOLVER.IMS_PER_BATCH are read.

    Raises:
        ConfigError: names both keys.
    """
    node, size = cfg.DATALOADER.BNEXT, cfg.SOLVER.IMS_PER_BATCH
    if node.BATCHES != "composed" or not node.RATIOS:
        return

    numbers = [int(number) for _, number in node.RATIOS]
    least = sum(numbers) // math.gcd(*numbers)
    if size % least:
        ratios = " to ".join(map(str, numbers))
        raise ConfigError.of(
            _RATIOS,
            f"fit SOLVER.IMS_PER_BATCH, a multiple of {least} images for {ratios}",
            got=f"batches of {size}",
            where="config",
            remedy="Change one of the two; without ratios, a TEMPERATURE gives shares that fit on average.",
        )


def _check_names(ratios: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Refuse ratios of other domains than those that have images."""
    for name in ratios:
        if name not in sizes:
            rule, remedy = "name domains of DATASETS.TRAIN", f"Those with images are {', '.join(map(repr, sizes))}."
            raise ConfigError.of(_RATIOS, rule, got=repr(name), where="config", remedy=suggest(name, sizes, remedy))

    missing = [name for name in sizes if name not in ratios]
    if missing:
        remedy = "Add them, or take their data sets out of DATASETS.TRAIN."
        got = f"none of {', '.join(map(repr, missing))}"
        raise ConfigError.of(_RATIOS, "have all domains of DATASETS.TRAIN", got=got, where="config", remedy=remedy)


def _count_annotations(records: Sequence[Record], domains: Sequence[str]) -> Counter[str]:
    """Objects of each domain, without crowds, from which nothing is learned."""
    numbers: Counter[str] = Counter()
    for record, domain in zip(records, domains, strict=True):
        numbers[domain] += sum(not each.get("iscrowd") for each in record.get("annotations", ()))
    return numbers

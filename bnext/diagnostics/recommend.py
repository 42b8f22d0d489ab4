"""Advice on norms for this batch, these workers, this data: for each place of a model, with its source and limit.

The figures are those of the literature, measured on its models and data; nothing is measured here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.lazy_keys import name_keys

__all__ = ["Advice", "Option", "recommend"]

SECTION_4 = "Wu and Johnson 2021, section 4 (ResNet-50, ImageNet)"
TABLE_3 = "Wu and Johnson 2021, Tables 3 and 6 (Mask R-CNN R50-FPN, COCO, 3x)"
TABLE_5 = "Wu and Johnson 2021, Table 5 (RetinaNet R50-FPN, COCO, 3x)"
SCRATCH = "detectron2's scratch_mask_rcnn_R_50_FPN_3x_gn"

# Normalization batch sizes of section 4: up to SMALL frozen norms win, from LARGE on population statistics do.
_SMALL, _LARGE = 8, 16


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice of a norm.

    Args:
        norm: in words.
        keys: config keys and values that choose it; empty: there is no config.
        figure: its result in the source; "": none was published.
        source: of the figure, or of the advice.
        limit: where it does not hold; "": none is known.
        is_chosen: whether the config chooses it already.
    """

    norm: str
    figure: str
    source: str
    limit: str = ""
    keys: Mapping[str, object] = dataclasses.field(default_factory=dict)
    is_chosen: bool = False


@dataclasses.dataclass(frozen=True)
class Advice:
    """Choices for one place of a model, best first.

    Args:
        place: as in `NormFacts.place`; "": the whole model.
        situation: what is known of it, in a line.
        options: best first.
    """

    place: str
    situation: str
    options: tuple[Option, ...]

    @property
    def is_followed(self) -> bool:
        """Whether one of the options is chosen already."""
        return any(option.is_chosen for option in self.options)


def recommend(facts: Facts) -> tuple[Advice, ...]:
    """Advice for every place that has a norm, and for the data.

    Args:
        facts: with `training`; without its batch size there is advice for heads that several levels share alone.
    """
    places: dict[str, NormFacts] = {}
    for norm in facts.norms:
        places.setdefault(norm.place, norm)

    every: list[Advice] = []
    for place, norm in places.items():
        advice = _advise_place(facts, place, norm)
        if advice is not None:
            options = tuple(_choose_option(facts, option) for option in advice.options)
            every.append(dataclasses.replace(advice, options=options))
    return (*every, *_advise_on_data(facts))


def _choose_option(facts: Facts, option: Option) -> Option:
    """An option that says whether it is the user's, with keys as the user's config has them."""
    keys = name_keys(facts, option.keys)
    return dataclasses.replace(option, is_chosen=_is_chosen(facts, option), keys=keys)


def _is_chosen(facts: Facts, option: Option) -> bool:
    is_alone = facts.training is None or (facts.training.num_workers or 1) == 1
    same = {"SyncBN": "BN"} if is_alone else {}  # which one worker cannot tell apart

    chosen = [(facts.get_config(key), value) for key, value in option.keys.items()]
    return bool(chosen) and all(same.get(str(has), has) == same.get(str(value), value) for has, value in chosen)


# ---- places


def _advise_place(facts: Facts, place: str, norm: NormFacts) -> Advice | None:
    if len(_find_levels(facts, norm)) > 1:
        return _advise_on_levels(facts, place, norm)

    batch = _count_images(facts)
    if batch is None:
        return None
    if norm.sees_rois:
        return _advise_on_rois(place, norm, *batch)
    return _advise_on_features(facts, place, norm, *batch)


def _find_levels(facts: Facts, norm: NormFacts) -> tuple[str, ...]:
    """Features that a norm gets in one forward, by name or number."""
    if norm.levels:
        return norm.levels
    seen = [forward.calls[norm.path] for forward in facts.forwards if norm.path in forward.calls]
    sizes = {call.size[2:] for calls in seen for call in calls}
    return tuple(map(str, sizes)) if any(len(calls) > 1 for calls in seen) else ()


def _count_images(facts: Facts) -> tuple[int, int] | None:
    """Images of a worker, and workers; None: not known."""
    training = facts.training
    if training is None or training.images_per_worker is None:
        return None
    return training.images_per_worker, training.num_workers or 1


def _choose(norm: NormFacts, name: str, **answers: object) -> dict[str, object]:
    """Keys that give a place a norm, and answers of its node."""
    if not norm.norm_key:
        return {}
    return {norm.norm_key: name, **{f"MODEL.BNEXT.{norm.place}.{key}": value for key, value in answers.items()}}


def _advise_on_levels(facts: Facts, place: str, norm: NormFacts) -> Advice:
    levels = _find_levels(facts, norm)
    limit = "measured with SyncBN over 16 images; with fewer, statistics of a batch are noisier"
    together = _choose(norm, "SyncBN", STATISTICS="shared", POPULATION="shared")
    apart = _choose(norm, "SyncBN", STATISTICS="per_level", POPULATION="per_level")

    options = [
        Option("GroupNorm", "39.5 AP", TABLE_5, "no batch is needed", _choose(norm, "GN")),
        Option("BN of all levels together (row 1)", "39.1 AP", TABLE_5, limit, together),
        Option("BN of each level, with a population for each (row 4)", "39.1 AP", TABLE_5, limit, apart),
        Option("no norm", "38.7 AP", TABLE_5, "", _choose(norm, "")),
    ]
    return Advice(place, f"a head that {len(levels)} levels share", tuple(options))


def _advise_on_rois(place: str, norm: NormFacts, num_images: int, num_workers: int) -> Advice:
    situation = f"RoIs of {_count(num_images, num_workers)}"
    no_batch = [
        Option("GroupNorm", "41.4 box AP", TABLE_3, "no batch is needed", _choose(norm, "GN")),
        Option("no norm", "41.1 box AP", TABLE_3, "", _choose(norm, "")),
    ]
    if num_workers > 1:
        options = [
            Option("SyncBN", "41.7 box AP", TABLE_3, "RoIs of all workers are one mini-batch", _choose(norm, "SyncBN")),
            Option(
                "BN with RoIs dealt out over the workers",
                "41.7 box AP",
                TABLE_3,
                "measured with one image on each worker",
                _choose(norm, "BN", SHUFFLE="statistics"),
            ),
            *no_batch,
        ]
        return Advice(place, situation, tuple(options))

    at_inference = Option(
        "BN with each image's RoIs as its mini-batch at inference, too",
        "41.5 box AP",
        TABLE_3,
        "an image with very few RoIs has poor statistics",
        _choose(norm, "BN", INFERENCE="mini_batch"),
    )
    return Advice(place, situation, (at_inference, *no_batch))


def _advise_on_features(facts: Facts, place: str, norm: NormFacts, num_images: int, num_workers: int) -> Advice:
    total = num_images * num_workers
    has_weights = place in ("RESNETS", "") and _begins_with_weights(facts)
    words = _count(num_images, num_workers)
    situation = f"{words}, weights to begin with" if has_weights else words

    frozen = Option(
        "FrozenBN",
        "25.2 % error at 2 images, where live statistics have 32.5 %",
        SECTION_4,
        "with weights of a training alone: frozen initial statistics normalize nothing (vision PR#5443)",
        _choose(norm, "FrozenBN"),
    )
    group = Option("GroupNorm", "", SCRATCH, "weights that were trained with BN do not fit it", _choose(norm, "GN"))
    synchronized = Option(
        "SyncBN",
        _read_table(total),
        SECTION_4,
        f"of {total} images over {num_workers} workers",
        _choose(norm, "SyncBN"),
    )
    plain = Option("BN", _read_table(num_images), SECTION_4, f"of {num_images} images", _choose(norm, "BN"))

    options = [frozen] if has_weights and num_images <= _SMALL else []
    if num_workers > 1 and total >= _LARGE:
        options.append(synchronized)
    if num_images >= _LARGE:
        options.append(plain)
    if has_weights and frozen not in options:
        options.append(frozen)
    return Advice(place, situation, (*options, group))


def _count(num_images: int, num_workers: int) -> str:
    images = "1 image" if num_images == 1 else f"{num_images} images"
    return f"{images} on each of {num_workers} workers" if num_workers > 1 else images


def _begins_with_weights(facts: Facts) -> bool:
    """Whether a training would begin with weights; a checkpoint that says its iteration is what came of one."""
    return facts.weights is not None and bool(facts.weights.source) and facts.weights.iteration is None


# Error of ResNet-50 by population statistics, by normalization batch size.
_ERRORS = {2: 32.5, 4: 26.4, 8: 24.3, 16: 23.5, 32: 23.4, 64: 23.2, 128: 23.4, 256: 23.6, 512: 23.7, 1024: 23.7}


def _read_table(size: int) -> str:
    """The row of the nearest normalization batch size at or below this one."""
    nearest = max((row for row in _ERRORS if row <= size), default=min(_ERRORS))
    return f"{_ERRORS[nearest]} % error at {nearest} images"


# ---- data and steps


def _advise_on_data(facts: Facts) -> Iterator[Advice]:
    training = facts.training
    is_by_batch = any(norm.is_by_mini_batch for norm in facts.norms)
    if training is not None and training.accumulation > 1 and is_by_batch:
        nothing = Option(
            "GroupNorm or FrozenBN",
            "",
            "mmcv#1869, #2074: accumulation with BN lost 8 %",
            "micro-batches are normalized one by one: accumulating more of them does not help",
        )
        situation = f"gradients of {training.accumulation} micro-batches are added up"
        yield Advice("", situation, (nothing,))

    names = list(facts.domains)
    if len(names) > 1 and is_by_batch:
        apart = Option(
            "statistics and population per domain",
            "",
            "Wu and Johnson 2021, section 5",
            "where they are alike, shared ones have more data: see the distances",
        )
        yield Advice("", f"images of {len(names)} domains", (apart,))

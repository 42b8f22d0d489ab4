"""How much a norm normalizes together in training: samples and elements per channel, over all workers that share.

Micro-batches of an SGD step are never normalized together: images of a worker are those of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Call, Facts, ForwardFacts, NormFacts

__all__ = ["count_elements", "count_together", "count_workers", "divide_calls"]

_HEADS_OF_FOREGROUND = ("ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")


def count_together(facts: Facts, norm: NormFacts) -> int | None:
    """Samples (images, or RoIs at most) that are normalized together in training.

    Args:
        facts: the workers and images of the training are read, and what was run.
        norm: one of them.

    Returns:
        The samples of a group of a Ghost BN or of a deal, else those of all workers that share; None: not known, as
        that of a norm with statistics per domain, or no mini-batch normalizes.
    """
    if not norm.is_by_mini_batch or norm.record.statistics == "per_domain":
        return None

    samples = _count_samples(facts, norm)
    workers = count_workers(facts, norm)
    size = norm.record.group_size
    if size is not None:
        return size if samples is None else math.ceil(samples / math.ceil(samples / size))
    if samples is None or workers is None:
        return norm.record.batch_size
    return max(1, samples * workers // _count_deals(norm, workers))


def count_elements(facts: Facts, norm: NormFacts) -> tuple[int, int] | None:
    """Elements per channel of the smallest and of the largest mini-batch of a norm in training.

    Args:
        facts: as in `count_together`.
        norm: one of them.

    Returns:
        (least, most) over all that was run, N H W over the samples and workers that share; of made-up images for those
        of the training's size where a config says it. None: not known, or no mini-batch normalizes.
    """
    together = count_together(facts, norm)
    if together is None:
        return None

    real = [forward for forward in facts.forwards if not forward.is_noise and norm.path in forward.calls]
    numbers = []
    for forward in real or facts.forwards:
        scale = 1.0 if norm.sees_rois else _scale_positions(facts, forward)
        for calls in divide_calls(norm, forward):
            positions = sum(max(1, round(math.prod(call.size[2:]) * scale)) for call in calls)
            numbers.append(together * positions)
    return (min(numbers), max(numbers)) if numbers else None


def count_workers(facts: Facts, norm: NormFacts) -> int | None:
    """Workers that share a mini-batch of a norm; None: not known. Those of a node are taken for all."""
    workers = norm.record.workers
    if isinstance(workers, int):
        return workers
    if workers == "one":
        return 1
    return facts.training.num_workers if facts.training is not None else None


def divide_calls(norm: NormFacts, forward: ForwardFacts) -> Iterator[Sequence[Call]]:
    """The calls of each mini-batch of a norm in one forward: features that came in one call are one, if it shares."""
    group: list[Call] = []
    for call in forward.calls.get(norm.path, ()):
        is_together = call.is_joint and norm.record.statistics != "per_level"
        if group and not is_together:
            yield group
            group = []
        group.append(call)
    if group:
        yield group


def _count_deals(norm: NormFacts, workers: int) -> int:
    """Groups to which the samples of the workers that share are dealt out."""
    if norm.shuffle != "statistics":
        return 1
    return norm.num_groups or workers


def _count_samples(facts: Facts, norm: NormFacts) -> int | None:
    """Samples of one worker in a mini-batch, before they are cut into groups."""
    images = facts.training.images_per_worker if facts.training is not None else None
    rois = _count_rois(facts, norm)
    if rois is not None:
        return None if images is None else images * rois

    numbers = []
    for forward in facts.forwards:
        if forward.is_noise and norm.sees_rois:
            continue  # how many RoIs are found in noise says nothing
        sizes = [call.size[0] for call in forward.calls.get(norm.path, ())]
        if sizes and images is not None and forward.num_images:
            numbers.append(round(max(sizes) * images / forward.num_images))
        elif sizes and not forward.is_noise:
            numbers.append(max(sizes))

    if numbers:
        return max(1, *numbers)
    return None if norm.sees_rois else images


def _count_rois(facts: Facts, norm: NormFacts) -> int | None:
    """RoIs of an image in training, at most, as a config says."""
    number = facts.get_config("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE")
    if not norm.sees_rois or not isinstance(number, int):
        return None

    share = facts.get_config("MODEL.ROI_HEADS.POSITIVE_FRACTION")
    if norm.place in _HEADS_OF_FOREGROUND and isinstance(share, float):
        return max(1, int(number * share))
    return number


def _scale_positions(facts: Facts, forward: ForwardFacts) -> float:
    """Positions of a feature of the training's smallest images, for one of the forward's."""
    sizes = facts.get_config("INPUT.MIN_SIZE_TRAIN")
    smallest = min(sizes, default=0) if isinstance(sizes, (tuple, list)) else 0
    if not forward.is_noise or not forward.image_size or not smallest:
        return 1.0
    return smallest**2 / math.prod(forward.image_size)

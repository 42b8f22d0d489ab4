"""Sizes of the mini-batches of a training: samples, images and elements per channel, over workers that share.

Micro-batches of an SGD step are never normalized together: images of a worker are those of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bnext.diagnostics.facts import Call, Facts, ForwardFacts, NormFacts
from bnext.layers.sources import is_per_domain, is_per_level

__all__ = [
    "count_samples",
    "count_elements",
    "count_images_together",
    "count_together",
    "count_workers",
    "divide_calls",
    "has_many_samples",
]

_HEADS_OF_FOREGROUND = ("ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
_MANY = 4  # samples of an image from which on they are RoIs, frames or tokens; two or three are views of it


def count_together(facts: Facts, norm: NormFacts) -> int | None:
    """Samples (images, or RoIs at most) that are normalized together in training.

    Args:
        facts: the workers and images of the training are read, and what was run.
        norm: one of them.

    Returns:
        The samples of a group of a Ghost BN or of a deal, else those of all workers that share; None: not known, as
        that of a norm with statistics per domain, or no mini-batch normalizes.
    """
    if not _is_counted(norm):
        return None

    samples = count_samples(facts, norm)
    workers = count_workers(facts, norm)
    size = norm.record.group_size
    if size is not None:
        return size if samples is None else math.ceil(samples / math.ceil(samples / size))
    if samples is None or workers is None:
        return norm.record.batch_size
    return max(1, samples * workers // _count_deals(norm, workers))


def count_samples(facts: Facts, norm: NormFacts) -> int | None:
    """Samples of one worker that reach a norm together in training, before they are cut or dealt; None: not known."""
    images = _count_images(facts)
    rois = _count_rois(facts, norm)
    if rois is not None:
        return None if images is None else images * rois

    numbers = []
    for forward in facts.forwards:
        if forward.is_alone or (forward.is_noise and norm.sees_rois):
            continue  # how many RoIs are found in noise says nothing
        sizes = [call.size[0] for call in forward.calls.get(norm.path, ())]
        if sizes and images is not None and forward.num_images:
            numbers.append(round(max(sizes) * images / forward.num_images))
        elif sizes and not forward.is_noise:
            numbers.append(max(sizes))

    if numbers:
        return max(1, *numbers)
    return None if norm.sees_rois else images


def count_images_together(facts: Facts, norm: NormFacts) -> int | None:
    """Images whose samples are in one mini-batch of a norm in training; None: not known, or no mini-batch normalizes.

    The groups of a Ghost BN are samples in their order, so that one smaller than an image's samples is of one image.
    """
    images = _count_images(facts)
    if images is None or not _is_counted(norm):
        return None

    size = norm.record.group_size
    if size is not None:
        samples = count_samples(facts, norm)
        return None if samples is None else min(images, math.ceil(size * images / samples))

    is_moved = norm.shuffle == "features" and facts.training is not None
    workers = facts.training.num_workers if is_moved and facts.training else count_workers(facts, norm)
    return None if workers is None else images * workers


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

    forwards = [forward for forward in facts.forwards if norm.path in forward.calls and not forward.is_alone]
    real = [forward for forward in forwards if not forward.is_noise]
    largest = max((forward.num_images for forward in forwards), default=0)
    numbers = []
    for forward in real or forwards:
        scale = 1.0 if norm.sees_rois else _scale_positions(facts, forward)
        # The last batch of a data set may be smaller; the size of those of a config is the config's.
        share = forward.num_images / largest if facts.config is None and largest else 1.0
        samples = max(1, round(together * share))
        for calls in divide_calls(norm, forward):
            numbers.append(samples * sum(max(1, round(math.prod(call.size[2:]) * scale)) for call in calls))
    return (min(numbers), max(numbers)) if numbers else None


def has_many_samples(facts: Facts, norm: NormFacts) -> bool:
    """Whether a norm sees many samples of each image, as RoIs, which are then a batch of their own."""
    if norm.sees_rois is not None:
        return norm.sees_rois

    ratios = []
    for forward in facts.forwards:
        if not forward.is_noise and forward.num_images:
            ratios += [call.size[0] / forward.num_images for call in forward.calls.get(norm.path, ())]
    return max(ratios, default=0.0) >= _MANY


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
        is_together = call.is_joint and not is_per_level(norm.record.statistics)
        if group and not is_together:
            yield group
            group = []
        group.append(call)
    if group:
        yield group


def _is_counted(norm: NormFacts) -> bool:
    """Whether mini-batches normalize as the model is, and the training says how large they are."""
    return norm.is_training and norm.is_by_mini_batch and not is_per_domain(norm.record.statistics)


def _count_deals(norm: NormFacts, workers: int) -> int:
    """Groups to which the samples of the workers that share are dealt out."""
    if norm.shuffle != "statistics":
        return 1
    return norm.num_groups or workers


def _count_images(facts: Facts) -> int | None:
    """Images that a worker runs together."""
    training = facts.training
    if training is None or not training.images_per_worker:
        return None
    return training.images_per_worker + training.virtual_images


def _count_rois(facts: Facts, norm: NormFacts) -> int | None:
    """RoIs of an image in training, at most, as a config says."""
    number = facts.get_config("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE")
    if not norm.sees_rois or not isinstance(number, int) or number < 1:
        return None

    share = facts.get_config("MODEL.ROI_HEADS.POSITIVE_FRACTION")
    if norm.place in _HEADS_OF_FOREGROUND and isinstance(share, float):
        return max(1, int(number * share))
    return number


def _scale_positions(facts: Facts, forward: ForwardFacts) -> float:
    """Positions of a feature of the training's smallest images, for one of the forward's."""
    sizes = facts.get_config("INPUT.MIN_SIZE_TRAIN")
    smallest = min(sizes, default=0) if isinstance(sizes, (tuple, list)) else 0
    pixels = math.prod(forward.image_size) if forward.image_size else 0
    return smallest**2 / pixels if forward.is_noise and pixels and smallest else 1.0

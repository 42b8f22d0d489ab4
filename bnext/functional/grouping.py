"""The normalization batch of each sample: by level and domain, by size, by a random deal, and by groups from outside.

Plain Python on numbers of samples; the values of no tensor are looked at, and none is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from bnext.dispatch import is_ordinary

__all__ = [
    "Grouping",
    "Groups",
    "count_elements",
    "deal_samples",
    "divide_parts",
    "group_samples",
    "make_index",
    "number_groups",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _remembered(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with its last results: the same few arguments come again and again.

    Under a mode or a transform it is called anew: what is made there serves there alone. What is traced gets it plain.
    """
    cached = lru_cache(256)(function)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not is_ordinary():
            return function(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    return call


class Groups(NamedTuple):
    """Samples of a feature that are normalized together: those that were dealt to a group, the RoIs of an image.

    Args:
        numbers: [N], the group of each sample, 0 to G - 1, on the device of the feature.
        num_groups: G; some may be empty.
    """

    numbers: Tensor
    num_groups: int


class Grouping(NamedTuple):
    """Samples sorted into parts: those of one source in one mini-batch.

    Args:
        parts: for each feature the part of all its samples, or that of each sample: numbers or a tensor [N].
        mini_batches: for each part its mini-batch, 0 to B - 1.
        sources: for each part its source, 0 to S - 1.
    """

    parts: tuple[int | tuple[int, ...] | Tensor, ...]
    mini_batches: tuple[int, ...]
    sources: tuple[int, ...]


@_remembered
def number_groups(keys: tuple[Hashable, ...]) -> tuple[int, ...]:
    """For each key its number, 0 to G - 1, in the order in which they first come; equal keys have the same.

    Example:
        >>> number_groups(("p3", "p4", "p3"))
        (0, 1, 0)
    """
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


@_remembered
def group_samples(
    num_samples: tuple[int, ...],
    sources: tuple[int | tuple[int, ...], ...],
    mini_batches: tuple[int, ...],
    normalization_batch_size: int | None = None,
) -> Grouping:
    """Sort the samples of one or several features into mini-batches.

    Args:
        num_samples: of each feature.
        sources: for each feature the source of all its samples, or that of each sample; 0 to S - 1. A source is a
            level, a domain, or a domain at a level.
        mini_batches: for each source the mini-batch that its samples are in, S numbers.
        normalization_batch_size: at most so many samples of a feature are in one mini-batch; None:
            all of them. They are cut, in their order, into as few groups as that allows, whose sizes
            differ by at most one.

    Returns:
        The grouping. Without a normalization batch size its parts are all S sources in their order, also
        those that no sample has, so that workers agree on the number of parts.

    Example:
        >>> group_samples((5,), (0,), (0,), 2).parts  # groups of 2, 2 and 1
        ((0, 0, 1, 1, 2),)
    """
    if normalization_batch_size is None or not any(num_samples):
        return Grouping(sources, mini_batches, tuple(range(len(mini_batches))))

    keys = []  # of every sample of every feature
    for number, source in zip(num_samples, sources, strict=True):
        of_samples = (source,) * number if isinstance(source, int) else source
        keys.append(_cut_groups(of_samples, mini_batches, normalization_batch_size))

    part_keys = sorted({key for feature_keys in keys for key in feature_keys})
    batch_keys = sorted({key[1:] for key in part_keys})
    part_numbers = {key: number for number, key in enumerate(part_keys)}
    batch_numbers = {key: number for number, key in enumerate(batch_keys)}

    return Grouping(
        parts=tuple(tuple(part_numbers[key] for key in feature_keys) for feature_keys in keys),
        mini_batches=tuple(batch_numbers[key[1:]] for key in part_keys),
        sources=tuple(source for source, _, _ in part_keys),
    )


def _cut_groups(sources: Sequence[int], mini_batches: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """For each sample of a feature: its source, the mini-batch that it would be in, and its group there."""
    batches = [mini_batches[source] for source in sources]
    totals = {batch: batches.count(batch) for batch in set(batches)}
    seen = dict.fromkeys(totals, 0)

    keys = []
    for source, batch in zip(sources, batches, strict=True):
        num_groups = -(-totals[batch] // size)
        keys.append((source, batch, seen[batch] * num_groups // totals[batch]))
        seen[batch] += 1
    return keys


def divide_parts(grouping: Grouping, groups: Groups) -> Grouping:
    """Divide every part, and with it every mini-batch, by the groups of the samples.

    Args:
        grouping: of a single feature, without a normalization batch size.
        groups: of its samples.

    Returns:
        P G parts, G for each part that there was; also those that no sample has, so that workers agree on
        their number.
    """
    (part,), (numbers, num_groups) = grouping.parts, groups
    if isinstance(part, tuple):
        part = make_index(part, numbers.device)

    mini_batches: list[int] = []
    sources: list[int] = []
    for batch, source in zip(grouping.mini_batches, grouping.sources, strict=True):
        mini_batches += range(batch * num_groups, (batch + 1) * num_groups)
        sources += [source] * num_groups

    return Grouping((part * num_groups + numbers,), tuple(mini_batches), tuple(sources))


@_remembered
def make_index(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An index tensor [len(values)] on a device; copied to it the first time only, as a copy waits for the device.

    Do not write to it: it is kept for the next call, which may be on another stream.
    """
    with torch.inference_mode(False):  # it may serve in a graph later
        return torch.tensor(values, dtype=torch.long, device=device)


def count_elements(num_samples: Sequence[int], num_positions: Sequence[int], grouping: Grouping) -> list[int]:
    """Elements per channel of each mini-batch, as far as these features go.

    Args:
        num_samples, num_positions: of each feature: N, and H W.
        grouping: of these samples; its parts are numbers.
    """
    counts = [0] * (max(grouping.mini_batches) + 1)

    for number, positions, part in zip(num_samples, num_positions, grouping.parts, strict=True):
        if isinstance(part, int):
            counts[grouping.mini_batches[part]] += number * positions
        elif isinstance(part, tuple):
            for sample_part in part:
                counts[grouping.mini_batches[sample_part]] += positions

    return counts


def deal_samples(num_samples: Sequence[int], num_groups: int, seed: int) -> list[Tensor]:
    """Deal the samples of all workers out to groups at random; the sizes of the groups differ by at most one.

        group of sample i = permutation[i] mod G,  i over the samples of all workers in their order

    Args:
        num_samples: of each worker, N_r; some may be 0.
        num_groups: G, 1 or more; groups beyond the number of samples stay empty.
        seed: 0 to 2**63 - 1, of which torch takes the lower 32 bits; the same arguments give the same deal.

    Returns:
        For each worker the group of each of its samples, [N_r], 0 to G - 1, on the CPU.

    Example:
        >>> deal = torch.cat(deal_samples([3, 0, 4], 2, seed=1))
        >>> sorted(deal.bincount().tolist())
        [3, 4]
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    deal = torch.randperm(sum(num_samples), generator=generator, device="cpu") % num_groups
    return list(deal.split(list(num_samples)))

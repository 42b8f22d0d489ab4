"""Counts of what norms did, which no state dict holds: mini-batches left out, domains seen, fallbacks taken.

They count from the start of the process, or since a norm was copied. What is written down for a compiler or a
transform of torch, or computed on fake tensors, is not counted.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bnext.dispatch import is_ordinary, is_traced
from bnext.errors import list_few
from bnext.notices import tell_once

__all__ = [
    "NormCounts",
    "UnseenCount",
    "count_skipped",
    "counts_of",
    "describe_unseen",
    "not_counting_domains",
    "take_unseen_counts",
    "tell_skipped",
]

SKIPPED = (
    "%d mini-batches with inf or NaN were left out of running statistics so far, of %s. A training in mixed precision "
    "may begin so, until its loss scale is found; if their number goes on growing, look for the first of these norms."
)


_RULES = {
    "fallback": "taken for {taken!r}",
    "nearest": "nearest to {of_each}",
    "mixture": "normalized by the mixture of its domains",
    "mini_batch": "each normalized by its own statistics",
    "blend": "normalized by a blend of its domains and the image's own statistics",
    "stream": "normalized by the mixture of its domains as it followed their stream",
}
ALONE_IN_STREAM = "; of one image a stream follows that image alone, choose 'blend'"


class UnseenCount(NamedTuple):
    """Images at inference of a domain that a norm has not.

    Args:
        domain: their name; None: they had none.
        rule: that was applied to them, see `NormSpec.unseen`.
        taken: the domain that they were taken for; "": the rule takes no single one.
    """

    domain: str | None
    rule: str
    taken: str = ""


class NormCounts:
    """The counts of one norm, or of what one of its levels or domains owns.

    Attributes:
        num_mini_batches: that came to move running statistics.
        num_taken: that did, [] on their device; the others had inf or NaN. None: there was none yet.
        domains: domain -> samples in training, where the norm has domains.
        fallbacks: domain that was active, or None -> samples in training that were taken for the fallback domain.
        unseen: images at inference of domains that the norm has not.
    """

    def __init__(self) -> None:
        self.num_mini_batches = 0
        self.num_taken: Tensor | None = None
        self.domains: Counter[str] = Counter()
        self.fallbacks: Counter[str | None] = Counter()
        self.unseen: Counter[UnseenCount] = Counter()

    def count_mini_batch(self, is_taken: Tensor) -> None:
        """Count one; nothing is read from the device."""
        if not is_ordinary() or is_taken.is_meta:
            return

        if self.num_taken is None:
            with torch.inference_mode(False):  # it is added to outside of that mode, too
                self.num_taken = torch.zeros((), dtype=torch.int64, device=is_taken.device)
        elif self.num_taken.device != is_taken.device:
            self.num_taken = self.num_taken.to(is_taken.device)
        self.num_taken.add_(is_taken)
        self.num_mini_batches += 1


_counts: WeakKeyDictionary[nn.Module, NormCounts] = WeakKeyDictionary()
_ELSEWHERE = NormCounts()  # of what a compiler writes down, which counts nothing


def counts_of(module: nn.Module) -> NormCounts:
    """The counts of a norm or of a part of it."""
    if is_traced():
        return _ELSEWHERE
    counts = _counts.get(module)
    if counts is None:
        counts = _counts.setdefault(module, NormCounts())
    return counts


@contextlib.contextmanager
def not_counting_domains(norms: Iterable[nn.Module]) -> Iterator[None]:
    """In this scope, what norms see is no sample of a training: of domains, also those taken for the fallback one."""
    before = [(counts := counts_of(norm), counts.domains.copy(), counts.fallbacks.copy()) for norm in norms]
    try:
        yield
    finally:
        for counts, domains, fallbacks in before:
            counts.domains, counts.fallbacks = domains, fallbacks


def count_skipped(norms: Iterable[Any]) -> list[int]:
    """For each norm how many mini-batches were left out of its running statistics. It waits for the device, once.

    Args:
        norms: `BatchNorm2d`s of bnext.
    """
    counts: list[NormCounts] = []
    owners: list[int] = []
    norms = list(norms)
    for index, norm in enumerate(norms):
        for _, state in norm.populations():
            counts.append(counts_of(state))
            owners.append(index)

    taken = _read([count.num_taken for count in counts])
    skipped = [0] * len(norms)
    for owner, count, number in zip(owners, counts, taken, strict=True):
        skipped[owner] += count.num_mini_batches - number
    return skipped


def tell_skipped(model: nn.Module, skipped: Mapping[str, int]) -> None:
    """Say once of a model how many mini-batches were left out, if any were.

    Args:
        model: that the norms are of.
        skipped: path of a norm -> their number.
    """
    numbers = {path or "the norm": number for path, number in skipped.items() if number}
    if numbers:
        tell_once(logging.getLogger(__name__), model, SKIPPED, sum(numbers.values()), list_few(numbers))


def take_unseen_counts(model: nn.Module) -> Counter[UnseenCount]:
    """Images at inference of domains that a model has not, since this was asked last; they are then forgotten.

    Args:
        model: or a part of it. Of its norms, which may see RoIs of some images alone, the most that one has counted.

    Example:
        >>> sum(take_unseen_counts(nn.Sequential()).values())
        0
    """
    taken: Counter[UnseenCount] = Counter()
    for module in model.modules():
        counts = _counts.get(module)
        if counts is not None:
            taken |= counts.unseen
            counts.unseen = Counter()
    return taken


def describe_unseen(counts: Mapping[UnseenCount, int]) -> list[str]:
    """A line for each domain and rule: how many images, and what they were taken for.

    Example:
        >>> fog = {UnseenCount("fog", "nearest", "day"): 3, UnseenCount("fog", "nearest", "night"): 1}
        >>> describe_unseen(fog)
        ["4 images of the domain 'fog', which the model does not have: nearest to 'day' 3, 'night' 1"]
    """
    groups: dict[tuple[str | None, str], dict[str, int]] = {}
    for key, number in counts.items():
        of_group = groups.setdefault((key.domain, key.rule), {})
        of_group[key.taken] = of_group.get(key.taken, 0) + number

    lines = []
    for (domain, rule), taken in groups.items():
        total = sum(taken.values())
        noun = "image" if total == 1 else "images"
        subject = "without a domain" if domain is None else f"of the domain {domain!r}, which the model does not have"
        of_each = ", ".join(f"{name!r} {number}" for name, number in taken.items())
        words = _RULES[rule].format(of_each=of_each, taken=next(iter(taken)))
        if rule == "stream" and total == 1:
            words += ALONE_IN_STREAM
        lines.append(f"{total} {noun} {subject}: {words}")
    return lines


def _read(numbers: list[Tensor | None]) -> list[int]:
    present = [number for number in numbers if number is not None]
    if not present:
        return [0] * len(numbers)

    device = present[0].device
    values = iter(torch.stack([number.to(device) for number in present]).tolist())
    return [0 if number is None else int(next(values)) for number in numbers]

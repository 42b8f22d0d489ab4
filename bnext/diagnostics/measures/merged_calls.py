"""The moments of everything that a norm got in several forwards."""

from __future__ import annotations

from typing import Literal

import torch

from bnext.diagnostics.facts import Call, Facts
from bnext.functional import Moments, merge_moments

__all__ = ["merge_calls"]


def merge_calls(facts: Facts, normalized_by: Literal["population", "mini_batch"]) -> dict[str, Moments]:
    """Path -> moments over all samples of all its calls, as if they were one batch: count [], mean and var [C].

    Args:
        facts: with forwards; those of made-up images are passed over.
        normalized_by: of the forwards; see `ForwardFacts`.
    """
    calls: dict[str, list[Call]] = {}
    for forward in facts.forwards:
        if forward.normalized_by == normalized_by and not forward.is_noise:
            for path, of_norm in forward.calls.items():
                calls.setdefault(path, []).extend(of_norm)

    merged = {}
    for path, seen in calls.items():
        samples = [call.samples for call in seen if len(call.samples.count)]
        widths = {one.mean.shape[-1] for one in samples}
        if len(widths) == 1:
            merged[path] = merge_moments(Moments(*(torch.cat(fields) for fields in zip(*samples, strict=True))))
    return merged

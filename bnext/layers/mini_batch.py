"""Normalization by mini-batches in its phases, from what a worker has measured of its features.

Moments are merged over workers, each norm settles what normalizes, features are normalized, populations move. One norm
goes through them alone, several together. What a phase does of a single norm is in batch_norm.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bnext.distributed import all_reduce_sum, merge_moments_over_workers
from bnext.functional import Grouping, Moments, make_index, normalize_parts
from bnext.kernels import Part
from bnext.scope.call import NormCall

if TYPE_CHECKING:
    from bnext.layers.batch_norm import BatchNorm2d

__all__ = ["MeasuredCall", "PartsCall", "index_mini_batches", "merge_measured", "normalize_measured"]


class MeasuredCall(NamedTuple):
    """A call of a norm whose features were measured on this worker.

    Args:
        norm: that is called.
        features: tensors [N_l, C, H_l, W_l].
        grouping: of their samples.
        parts: those of the grouping, as numbers or tensors [N_l].
        moments: of the parts, on this worker alone, count [P], mean and var [P, C].
        names: of the sources that may occur.
        group: the workers that share the mini-batches; None: this one alone.
        call: what the call knows besides.
    """

    norm: BatchNorm2d
    features: list[Tensor]
    grouping: Grouping
    parts: list[Part]
    moments: Moments
    names: tuple[str, ...]
    group: Any
    call: NormCall

    @property
    def kind(self) -> Hashable:
        """Equal for calls that can be normalized together."""
        mean = self.moments.mean
        return self.group, self.norm.eps, mean.shape[1], mean.dtype, mean.device

    def list_part_names(self) -> list[str]:
        """The source of each part."""
        return [self.names[source] for source in self.grouping.sources]


class PartsCall(NamedTuple):
    """Arguments of `normalize_parts`, as one norm settles them.

    Args:
        features, parts, weight, bias, statistics: see there.
        mini_batches: for each part its mini-batch, as a number.
    """

    features: list[Tensor]
    parts: list[Part]
    weight: Tensor
    bias: Tensor
    statistics: Moments
    mini_batches: tuple[int, ...]


def normalize_measured(calls: Sequence[MeasuredCall]) -> list[list[Tensor]]:
    """Normalize the features of calls, and let the populations of their norms move.

    Args:
        calls: of one `kind`. With several workers they share one collective, and one in the backward pass.

    Returns:
        For each call tensors of the shapes, types and memory formats of its features.
    """
    group, eps = calls[0].group, calls[0].norm.eps
    every_moments = merge_measured(calls)
    settled = [call.norm.settle(call, moments) for call, moments in zip(calls, every_moments, strict=True)]

    joined = _join(settled)
    mini_batches = index_mini_batches(joined.mini_batches, joined.weight.device)
    reduce = partial(all_reduce_sum, group=group, where=f"backward of {_name_norms(calls)}") if group else None
    outputs = iter(normalize_parts(*joined[:4], eps, joined.statistics, mini_batches, reduce))

    for call, moments in zip(calls, every_moments, strict=True):
        call.norm.move_by_mini_batch(call, moments)
    return [[next(outputs) for _ in call.features] for call in calls]


def merge_measured(calls: Sequence[MeasuredCall]) -> list[Moments]:
    """For each call the moments of its parts over all workers of the group, [P]; one collective for all calls.

    A recorder of a call takes them down.
    """
    together = _concatenate([call.moments for call in calls])
    merged = merge_moments_over_workers(together, calls[0].group, _name_norms(calls))
    every_moments = _split(merged, [len(call.moments.count) for call in calls])

    for call, moments in zip(calls, every_moments, strict=True):
        call.norm.record(call.call.recorder, moments, call.names)
    return every_moments


def index_mini_batches(mini_batches: tuple[int, ...], device: torch.device) -> Tensor | None:
    """For each part its mini-batch, [P]; None: every part is one."""
    if mini_batches == tuple(range(len(mini_batches))):
        return None
    return make_index(mini_batches, device)


def _name_norms(calls: Sequence[MeasuredCall]) -> str:
    return " and ".join(call.norm.where for call in calls)


# ---- several calls as one, their parts one after another


def _join(calls: Sequence[PartsCall]) -> PartsCall:
    if len(calls) == 1:
        return calls[0]

    features: list[Tensor] = []
    parts: list[Part] = []
    mini_batches: list[int] = []
    num_parts = num_batches = 0
    for call in calls:
        features += call.features
        parts += [part + num_parts for part in call.parts]
        mini_batches += [batch + num_batches for batch in call.mini_batches]
        num_parts += len(call.mini_batches)
        num_batches += len(call.statistics.count)

    weight = torch.cat([call.weight for call in calls])
    bias = torch.cat([call.bias for call in calls])
    statistics = _concatenate([call.statistics for call in calls])
    return PartsCall(features, parts, weight, bias, statistics, tuple(mini_batches))


def _concatenate(moments: Sequence[Moments]) -> Moments:
    if len(moments) == 1:
        return moments[0]
    return Moments(*map(torch.cat, zip(*moments, strict=True)))


def _split(moments: Moments, sizes: Sequence[int]) -> list[Moments]:
    if len(sizes) == 1:
        return [moments]
    return [Moments(*fields) for fields in zip(*(field.split(list(sizes)) for field in moments), strict=True)]

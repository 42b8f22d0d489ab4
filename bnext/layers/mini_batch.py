"""Normalization by mini-batches in its phases, from what a worker has measured of its features.

Moments are merged over workers, the norm settles what normalizes, features are normalized, populations move. What each
phase does of a single norm is in batch_norm.py.
"""

from __future__ import annotations

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


def merge_measured(measured: MeasuredCall) -> Moments:
    """Moments of the parts over all workers of the group, [P]; one collective. A recorder takes them down."""
    moments = merge_moments_over_workers(measured.moments, measured.group, measured.norm.where)
    measured.norm.record(measured.call.recorder, moments, measured.names)
    return moments


def normalize_measured(measured: MeasuredCall) -> list[Tensor]:
    """Normalize the features of a call, and let its populations move; one collective, and one in the backward pass.

    Returns:
        Tensors of the shapes, types and memory formats of the features.
    """
    norm, group = measured.norm, measured.group
    moments = merge_measured(measured)
    settled = norm.settle(measured, moments)

    mini_batches = index_mini_batches(settled.mini_batches, moments.mean.device)
    reduce = partial(all_reduce_sum, group=group, where=f"backward of {norm.where}") if group else None
    outputs = normalize_parts(*settled[:4], norm.eps, settled.statistics, mini_batches, reduce)

    norm.move_by_mini_batch(measured, moments)
    return outputs


def index_mini_batches(mini_batches: tuple[int, ...], device: torch.device) -> Tensor | None:
    """For each part its mini-batch, [P]; None: every part is one."""
    if mini_batches == tuple(range(len(mini_batches))):
        return None
    return make_index(mini_batches, device)

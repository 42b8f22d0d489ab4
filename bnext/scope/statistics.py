"""When running statistics must not move: in a scope of the user's, and while activations are computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["answering", "frozen_statistics", "is_recomputing", "is_traced"]


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave all running statistics of a model as they are in this scope, also in training mode.

    For forwards that are no training: a validation loss, a warm-up or shape-finding forward, the
    discriminator on generated images. What normalizes stays what it was: the mini-batch in training mode.

    Args:
        model: any module; its norms may be torch's, bnext's, or others that have running statistics.

    Note:
        Batch norms that heed torch's `track_running_stats` do not move at all, and at the end of the scope every
        running statistic is put back bit by bit, whatever wrote to it: a subclass with a forward of its own, the
        broadcast of DistributedDataParallel, a checkpoint. Scopes of one model nest; they must not overlap otherwise.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with frozen_statistics(norm):
        ...     output = norm(torch.randn(2, 3, 4, 4))
        >>> int(norm.num_batches_tracked)
        0
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    holders = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    before = [{name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)} for module in holders]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracks in zip(norms, tracked, strict=True):
            norm.track_running_stats = tracks
        for module, values in zip(holders, before, strict=True):
            for name, buffer in module.named_buffers(recurse=False):
                # Through .data: a changed version would forbid the backward pass of what ran in the scope.
                buffer.data.copy_(values[name])


@contextlib.contextmanager
def answering(norms: Iterable[Any], **answers: object) -> Iterator[None]:
    """In this scope the specs of norms of bnext have other answers, such as inference="mini_batch".

    Args:
        norms: `BatchNorm2d`s of bnext; their specs are put back afterwards, also after an exception.
        answers: fields of `NormSpec` that may be replaced.
    """
    before = [(norm, norm.spec) for norm in norms]
    try:
        for norm, spec in before:
            norm.spec = spec.replace(**answers)
        yield
    finally:
        for norm, spec in before:
            norm.spec = spec


def is_recomputing() -> bool:
    """Whether this forward runs within a backward pass: activation checkpointing computes activations again."""
    return not is_traced() and torch._C._current_graph_task_id() != -1


def is_traced() -> bool:
    """Whether this forward is being written down, by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]

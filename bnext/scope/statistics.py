"""Scopes in which norms compute otherwise: statistics that do not move, specs with other answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedBuffer

from bnext.scope.model import keeping_buffers, restoring
from bnext.scope.record import Scope

__all__ = ["answering", "as_in_training", "frozen_statistics"]


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
        broadcast of DistributedDataParallel, a checkpoint, a training of the same model in another thread. A copy that
        is made in the scope is not frozen.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm2d(3)
        >>> with frozen_statistics(norm):
        ...     output = norm(torch.randn(2, 3, 4, 4))
        >>> int(norm.num_batches_tracked)
        0
    """
    norms = frozenset(module for module in model.modules() if isinstance(module, _BatchNorm))
    holders = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    unborn = [norm for norm in norms if isinstance(norm.running_mean, UninitializedBuffer)]  # lazy ones

    try:
        with keeping_buffers(holders), Scope(frozen=norms), _tracking_nothing(norms.difference(unborn)):
            yield
    finally:
        for norm in unborn:
            if not isinstance(norm.running_mean, UninitializedBuffer):
                norm.reset_running_stats()


@contextlib.contextmanager
def _tracking_nothing(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Norms that know no record, as torch's, track nothing while they are called, and only then."""
    others = {norm for norm in norms if not getattr(norm, "heeds_record", False)}
    before: dict[nn.Module, list[bool]] = {norm: [] for norm in others}

    def begin(module: nn.Module, args: Any) -> None:
        if module in others and module.track_running_stats:
            before[module].append(True)
            module.track_running_stats = False  # type: ignore[assignment]

    def end(module: nn.Module, args: Any, output: Any) -> None:
        if module in others and before[module]:
            module.track_running_stats = before[module].pop()  # type: ignore[assignment]

    # Hooks of all modules: those of a norm would stay in its copies.
    handles = []
    if others:
        handles = [
            torch_module.register_module_forward_pre_hook(begin),
            torch_module.register_module_forward_hook(end, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, values in before.items():
            if values:  # of a call that was broken off
                norm.track_running_stats = values[0]  # type: ignore[assignment]


@contextlib.contextmanager
def as_in_training(model: nn.Module, *, by_population: bool) -> Iterator[None]:
    """Training mode in this scope, but without dropout, pictures and moving statistics.

    Args:
        model: any module.
        by_population: batch norms are as at inference.
    """
    with restoring(model), frozen_statistics(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _DropoutNd) or (by_population and isinstance(module, _BatchNorm)):
                module.training = False
            if getattr(module, "vis_period", 0):
                module.vis_period = 0  # type: ignore[assignment]
        yield


def answering(norms: Iterable[Any], **answers: object) -> Scope:
    """A scope in which specs of norms of bnext have other answers, such as inference="mini_batch".

    Args:
        norms: `BatchNorm2d`s of bnext.
        answers: fields of `NormSpec` that may be replaced.

    Raises:
        ConfigError: the answers contradict the others of a norm.
    """
    return Scope(specs={norm: norm.spec.replace(**answers) for norm in norms})

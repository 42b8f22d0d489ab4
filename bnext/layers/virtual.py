"""Virtual BN: additional samples that enlarge every mini-batch and are run forward only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.scope.statistics import frozen_statistics

__all__ = ["virtual_samples"]


@contextlib.contextmanager
def virtual_samples(
    model: nn.Module, data: Any, *, forward: Callable[[nn.Module, Any], object] | None = None
) -> Iterator[None]:
    """Enlarge the mini-batches of a model's norms, in this scope, by samples that are run forward only.

        moments of a mini-batch = Chan's merge of its own and those of the virtual samples at the same norm

    The virtual samples go through the model once, without gradient, normalized by themselves. In training
    they enlarge the normalization batch beyond what SGD can hold; with inference="mini_batch" they make
    mini-batch statistics of a single image usable at test time.

    Args:
        model: with norms of bnext; those that are normalized by population statistics are not concerned.
        data: the virtual samples, as the model takes them.
        forward: called as forward(model, data); default model(data).

    Raises:
        StatisticsError: no norm of the model uses its mini-batch in the present mode, the samples reached none,
            or reached one twice.

    Note:
        The backward pass must lie in the scope, too, where activation checkpointing computes activations again.
        Running statistics do not move while the virtual samples run; they then take in the enlarged
        mini-batches. Norms over several workers share the virtual samples as well: every worker brings some.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4))
        >>> with virtual_samples(model, torch.randn(16, 3, 8, 8)):
        ...     loss = model(torch.randn(2, 3, 8, 8)).square().mean()
        ...     loss.backward()

    Source:
        Salimans et al., *Improved Techniques for Training GANs*, 2016, section 3.5.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d) and module.uses_mini_batch]
    if not norms:
        raise StatisticsError(
            f"virtual_samples must be given a model with a norm of bnext that uses its mini-batch; got none "
            f"({type(model).__name__}, {'training' if model.training else 'evaluation'} mode). "
            f"Convert the norms with convert_norm, or set inference='mini_batch'."
        )
    before = [norm.virtual for norm in norms]
    try:
        recorded = _record(model, data, forward, norms)
        for norm, moments in zip(norms, recorded, strict=True):
            norm.virtual = moments or None
        yield
    finally:
        for norm, own in zip(norms, before, strict=True):
            norm.virtual = own


def _record(model: nn.Module, data: Any, forward: Any, norms: list[BatchNorm2d]) -> list[Any]:
    """What every norm sees of the virtual samples."""
    try:
        for norm in norms:
            norm.virtual, norm.recording = None, {}
        with torch.no_grad(), frozen_statistics(model):
            model(data) if forward is None else forward(model, data)
        recorded = [norm.recording for norm in norms]
    finally:
        for norm in norms:
            norm.recording = None
    if not any(recorded):
        raise StatisticsError(
            f"virtual samples must reach a norm that uses its mini-batch; got none ({type(model).__name__}). "
            f"Pass forward=, if the model is not called as model(data)."
        )
    return recorded

"""Virtual BN: additional samples that enlarge every mini-batch and are run forward only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bnext.errors import Refusal, StatisticsError
from bnext.functional import Moments
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.scope.record import Scope
from bnext.scope.statistics import frozen_statistics

__all__ = ["virtual_samples"]

NO_MINI_BATCH_NORM = Refusal(
    StatisticsError,
    "virtual_samples",
    "be given a model with a norm of bnext that uses its mini-batch",
    "Convert the norms with convert_norm, or set inference='mini_batch'.",
)
REACHED_NONE = Refusal(
    StatisticsError,
    "virtual samples",
    "reach a norm that uses its mini-batch",
    "Pass forward=, if the model is not called as model(data).",
)


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
    norms = [norm for norm in find_bnext_norms(model).values() if norm.uses_mini_batch]
    if not norms:
        raise NO_MINI_BATCH_NORM.of(
            "none", f"{type(model).__name__}, {('training' if model.training else 'evaluation')} mode"
        )

    moments = _run_forward(model, data, forward, norms)
    with Scope(virtual={norm: moments[norm] or None for norm in norms}):
        yield


def _run_forward(
    model: nn.Module, data: Any, forward: Callable[[nn.Module, Any], object] | None, norms: list[BatchNorm2d]
) -> dict[BatchNorm2d, dict[str, Moments]]:
    """Moments, by domain, of what every norm sees of the virtual samples."""
    recorders: dict[BatchNorm2d, dict[str, Moments]] = {norm: {} for norm in norms}
    scope = Scope(recorders=recorders, virtual=dict.fromkeys(norms))

    with torch.no_grad(), frozen_statistics(model), scope:
        model(data) if forward is None else forward(model, data)

    if not any(recorders.values()):
        raise REACHED_NONE.of("none", type(model).__name__)
    return recorders

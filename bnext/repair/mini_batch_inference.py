"""Norms of any kind that normalize by mini-batches at inference, in a scope."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.scope.statistics import answering
from bnext.statistics.observe import select_norms

__all__ = ["normalizing_evaluation_by_mini_batch"]


@contextlib.contextmanager
def normalizing_evaluation_by_mini_batch(model: nn.Module) -> Iterator[None]:
    """In this scope all norms that have population statistics, torch's too, leave them aside in evaluation mode.

    Args:
        model: of any kind; frozen norms stay as they are.

    Raises:
        StatisticsError: there is no such norm; in a forward, one of torch's gets a single element per channel.
    """
    norms = select_norms(model)
    own = [norm for _, norm in norms if isinstance(norm, BatchNorm2d)]
    others = {path: norm for path, norm in norms if not isinstance(norm, BatchNorm2d)}
    foreign = [(norm, norm.running_mean, norm.running_var) for norm in others.values()]
    hooks = [norm.register_forward_pre_hook(partial(_check_elements, path)) for path, norm in others.items()]
    try:
        for norm, *_ in foreign:
            norm.running_mean = norm.running_var = None  # so torch takes those of the mini-batch
        with answering(own, inference="mini_batch"):
            yield
    finally:
        for norm, mean, var in foreign:
            norm.running_mean, norm.running_var = mean, var
        for hook in hooks:
            hook.remove()


def _check_elements(path: str, norm: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Torch's complaint, with the layer."""
    if inputs[0].numel() == inputs[0].shape[1]:
        raise StatisticsError(
            f"a mini-batch must hold more than 1 element per channel at inference too; got 1 ({path}). Use larger "
            f"images, or population statistics."
        )

"""Mini-batch statistics at inference, for a scope."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.scope.model import setting
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
    ours = [norm for norm in norms.values() if isinstance(norm, BatchNorm2d)]
    foreign = {path: norm for path, norm in norms.items() if not isinstance(norm, BatchNorm2d)}

    hooks = [norm.register_forward_pre_hook(partial(_check_elements, path)) for path, norm in foreign.items()]
    try:
        # Without them torch takes those of the mini-batch.
        with setting(foreign.values(), running_mean=None, running_var=None), answering(ours, inference="mini_batch"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_elements(path: str, norm: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Torch's complaint, with the layer."""
    if inputs[0].numel() == inputs[0].shape[1]:
        rule = "hold more than 1 element per channel at inference too"
        remedy = "Use larger images, or population statistics."
        raise StatisticsError.of("a mini-batch", rule, got=1, where=path, remedy=remedy)

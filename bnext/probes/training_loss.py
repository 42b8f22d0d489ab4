"""The loss of a batch as the training has it, which every probe starts from; and the checks of their arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnext.errors import Refusal, StatisticsError
from bnext.layers.counts import not_counting_domains
from bnext.layers.walk import find_bnext_norms
from bnext.losses import name_losses, storing_events
from bnext.scope.model import drawing_from, restoring
from bnext.scope.statistics import as_in_training
from bnext.statistics.arguments import check_data
from bnext.statistics.data_pass import Forward, explain_batch

__all__ = ["compute_loss", "list_trained", "looking_at_training", "number_batches", "run_batch"]

_NO_BATCH = Refusal(StatisticsError, "batches", "hold at least one batch", "Pass a list of batches, or a loader.")
_LAZY = Refusal(
    StatisticsError,
    "model",
    "have parameters that have a shape",
    "Run one batch through the model before it is looked at.",
)
_NO_GRADIENT = Refusal(
    StatisticsError,
    "The loss",
    "depend on parameters that are trained",
    "Give the model parameters with requires_grad=True, and a forward without torch.no_grad() and detach().",
)


@contextlib.contextmanager
def looking_at_training(model: nn.Module) -> Iterator[None]:
    """Training mode and mini-batch statistics in this scope, without dropout; nothing is remembered or counted.

    Raises:
        StatisticsError: a lazy module has no parameters yet; it could not be put back.
    """
    if any(map(is_lazy, model.parameters())):
        raise _LAZY.of("a lazy module", type(model).__name__)
    with as_in_training(model, by_population=False), not_counting_domains(find_bnext_norms(model).values()):
        yield


def number_batches(batches: Iterable[Any], where: str) -> Iterator[tuple[int, Any]]:
    """The batches with their numbers, from 0.

    Raises:
        StatisticsError: it is no list or loader of batches, or there is none in it.
    """
    check_data(batches, where, "batches")
    number = -1
    for number, batch in enumerate(batches):
        yield number, batch
    if number < 0:
        raise _NO_BATCH.of("none", where)


def list_trained(model: nn.Module, where: str) -> dict[str, nn.Parameter]:
    """Path -> parameter that is trained.

    Raises:
        StatisticsError: there is none.
    """
    named = {name: value for name, value in model.named_parameters() if value.requires_grad and not is_lazy(value)}
    if not named:
        raise _NO_GRADIENT.of("none", where)
    return named


def run_batch(
    model: nn.Module, batch: Any, forward: Forward | None, seed: int, where: str, *, restores: bool = True
) -> Any:
    """Output of a model for a batch, in the mode in which it is.

    Args:
        forward: called as forward(model, batch); None: model(batch).
        seed: of what is drawn meanwhile, such as RoIs.
        where: the probe.
        restores: whether the model is bitwise as it was; else it has learned what a step of a training teaches it.
    """
    scope = restoring(model, seed=seed) if restores else drawing_from(model, seed)
    with scope, storing_events():
        if forward is not None:
            return forward(model, batch)
        try:
            return model(batch)
        except (TypeError, AttributeError) as error:
            raise explain_batch(batch, error, where) from error


def compute_loss(
    model: nn.Module, batch: Any, forward: Forward | None, seed: int, where: str, *, restores: bool = True
) -> Tensor:
    """The sum of a model's losses for a batch, as `run_batch`, with its graph.

    Raises:
        StatisticsError: there are no losses, or no parameter has an influence on them.
    """
    losses = name_losses(run_batch(model, batch, forward, seed, where, restores=restores), where)
    total = torch.stack([loss.reshape(()) for loss in losses.values()]).sum()
    if torch.is_grad_enabled() and not total.requires_grad:
        raise _NO_GRADIENT.of("a constant", where)
    return total

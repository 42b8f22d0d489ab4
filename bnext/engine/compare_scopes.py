"""Scopes of a comparison: norms that normalize by mini-batches at inference, and failures that end one kind alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from detectron2.utils import comm
from torch import Tensor, nn

from bnext.engine.without_trace import restoring_attributes
from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.scopes import answering
from bnext.layers.shuffled import shares_work
from bnext.statistics.observe import select_norms

__all__ = ["FailingLast", "normalizing_evaluation_by_mini_batch", "try_measuring"]

_FAILURES = (ValueError, FloatingPointError)  # ours; of detectron2's proposals, if boxes are not finite


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


class FailingLast(nn.Module):
    """A model that after a failure detects nothing: the worker comes to the end of the evaluation like the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.failure = model, None
        self.training = model.training

    def forward(self, batch: Any) -> Any:
        try:
            return [] if self.failure is not None else self.model(batch)
        except _FAILURES as error:
            if comm.get_world_size() == 1 or not _can_go_on(self.model):
                raise
            self.failure = error
            return []


def try_measuring(model: nn.Module, measure: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What is measured; or, if a worker finds that it cannot be, why. A collective."""
    found: dict[str, Any] = {}
    reason = ""
    try:
        found = measure()
    except _FAILURES as error:
        if not _can_go_on(model):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    reasons = [other for other in comm.all_gather(reason) if other]
    return found, reasons[0] if reasons else ""


def _can_go_on(model: nn.Module) -> bool:
    """Whether no other worker can wait for this one in a layer."""
    with restoring_attributes(model):
        return not shares_work(model.train())

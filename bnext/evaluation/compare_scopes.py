"""Scopes of a comparison: norms that normalize by mini-batches at inference, and failures that end one kind alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.utils import comm
from torch import nn

from bnext.evaluation.without_trace import restoring_attributes
from bnext.layers.shuffled import shares_work

__all__ = ["FailingLast", "try_measuring"]

_FAILURES = (ValueError, FloatingPointError)  # ours; of detectron2's proposals, if boxes are not finite


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

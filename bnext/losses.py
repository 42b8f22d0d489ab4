"""Losses as a model returns them in training mode: by name, or one; and what detectron2's models want around them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from bnext.errors import StatisticsError

__all__ = ["name_losses", "storing_events"]


def name_losses(output: Any, where: str) -> dict[str, Tensor]:
    """The losses that a model returned, by name; one alone is "loss".

    Args:
        output: of the model in training mode.
        where: the function that asked for it.

    Raises:
        StatisticsError: it is no loss of one element, and no mapping of names to such.
    """
    losses: Mapping[str, Any] = output if isinstance(output, Mapping) else {"loss": output}
    if not losses or not all(isinstance(value, Tensor) and value.numel() == 1 for value in losses.values()):
        raise StatisticsError.of(
            "model",
            "return a dictionary of losses, or one, in training mode",
            got=type(output).__name__,
            where=where,
            remedy="Pass forward=, which gives them for a batch.",
        )
    return dict(losses)


def storing_events() -> AbstractContextManager[Any]:
    """A scope that takes what detectron2's models report in training mode, and drops it; else they fail.

    Nothing happens in it where detectron2 is not loaded: then no model is of it.
    """
    events = sys.modules.get("detectron2.utils.events")
    return contextlib.nullcontext() if events is None else events.EventStorage()

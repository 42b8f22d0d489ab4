"""Torch's activation checkpoints around the code that runs: is it a forward, or is one computed again?

A checkpoint is torch's own object of one call of `torch.utils.checkpoint`: the context of its autograd function, or
the frame of the form without reentrance. It lives as long as the graph that may need it, and so do notes on it. Torch
tells nobody which it is; it is found on the call stack.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from bnext.dispatch import is_traced

__all__ = ["NO_GRAPH_TASK", "Checkpoint", "Notes", "find_checkpoints", "find_graph_task", "is_recomputing"]

_FORWARD = torch_checkpoint.CheckpointFunction.forward.__code__
_BACKWARD = torch_checkpoint.CheckpointFunction.backward.__code__
NO_GRAPH_TASK = -1  # of torch, outside of every backward pass
_NOTES = "_bnext_notes"
# Those of saved tensors, which the form without reentrance sets; what torch does not tell must be looked for.
_find_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: "unknown")


class Notes:
    """Ours on one checkpoint, until its graph is gone.

    Attributes:
        calls: module -> what its calls in the forward knew, in their order.
        number_made: (module, backward pass) -> how many of them that pass has made again.
    """

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[Any]] = {}
        self.number_made: dict[tuple[nn.Module, int], int] = {}


class Checkpoint(NamedTuple):
    """One call of torch.utils.checkpoint in which code runs.

    Args:
        notes: of ours.
        is_recomputed: its function is called by a backward pass; else by the forward.
    """

    notes: Notes
    is_recomputed: bool


def find_checkpoints() -> list[Checkpoint]:
    """The checkpoints in which this code runs, the innermost first, up to the first that is computed again."""
    found: list[Checkpoint] = []
    if torch.is_grad_enabled() and find_graph_task() == NO_GRAPH_TASK and _find_hooks(True) is None:
        return found  # neither kind is like that; looking at the stack takes longer

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(torch_checkpoint):
            found += _read_frame(frame)
            if found and found[-1].is_recomputed:
                break
        frame = frame.f_back
    return found


def _read_frame(frame: FrameType) -> list[Checkpoint]:
    """The checkpoint that a function of torch's module runs, if it runs one."""
    names = frame.f_locals
    if frame.f_code is _BACKWARD:
        return [Checkpoint(_notes_on(names["ctx"]), is_recomputed=True)]
    if frame.f_code is _FORWARD:
        return [Checkpoint(_notes_on(names["ctx"]), is_recomputed=False)]

    if frame.f_code.co_name == "unpack_hook" and "frame" in names:
        return [Checkpoint(_notes_on(names["frame"]), is_recomputed=True)]
    generator = getattr(names.get("gen"), "gi_frame", None)
    if generator is not None and "new_frame" in generator.f_locals:
        return [Checkpoint(_notes_on(generator.f_locals["new_frame"]), is_recomputed=False)]
    return []


def _notes_on(checkpoint: Any) -> Notes:
    notes: Notes = vars(checkpoint).setdefault(_NOTES, Notes())
    return notes


def find_graph_task() -> int:
    """The number of the backward pass that runs in this thread; -1: none, or the forward is being written down."""
    return NO_GRAPH_TASK if is_traced() else torch._C._current_graph_task_id()


def is_recomputing() -> bool:
    """Whether this forward runs within a backward pass: activation checkpointing computes activations again."""
    return find_graph_task() != NO_GRAPH_TASK

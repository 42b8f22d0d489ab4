"""The one record of what a call of a norm knows besides its tensors, and the scopes that add to it.

A scope changes nothing of a model: what it says lies in a context variable, belongs to its thread, and is gone with
the scope, whatever was copied or pickled in it. A new thing that a call is to know is a new field of `CallRecord`,
such as the index of a call within a forward.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn

from bnext.functional import Groups, Moments

__all__ = ["CallRecord", "Scope", "close_scopes", "find_graph_task", "get_record", "is_recomputing", "is_traced"]

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_NO_TASK = -1  # torch's number outside of every backward pass


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """What a call of a norm knows besides its tensors.

    Args:
        domain: of all samples, or of each sample; None: nobody has said.
        groups: norm -> groups of its samples, each of which is a mini-batch.
        virtual: norm -> moments, by domain, of additional samples that enlarge its mini-batches.
        recorders: norm -> what takes down the moments of its call, by domain.
        specs: norm -> the `NormSpec` in force instead of its own.
        frozen: norms whose running statistics do not move.
        is_carried: it is the record of the forward that is computed again, and whole.
    """

    domain: str | tuple[str, ...] | None = None
    groups: Mapping[nn.Module, Groups | None] = dataclasses.field(default_factory=dict)
    virtual: Mapping[nn.Module, Mapping[str, Moments] | None] = dataclasses.field(default_factory=dict)
    recorders: Mapping[nn.Module, dict[str, Moments] | None] = dataclasses.field(default_factory=dict)
    specs: Mapping[nn.Module, Any] = dataclasses.field(default_factory=dict)
    frozen: frozenset[nn.Module] = frozenset()
    is_carried: bool = False

    def extend(self, changes: Mapping[str, Any]) -> CallRecord:
        """The record with what an inner scope says: mappings and sets grow, a domain is replaced."""
        values = {}
        for name, value in changes.items():
            before = getattr(self, name)
            if isinstance(before, Mapping):
                value = {**before, **value}
            elif isinstance(before, frozenset):
                value = before | value
            values[name] = value
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(eq=False)
class _Entry:
    """One opening of a scope.

    Args:
        scope: that was opened.
        changes: fields of `CallRecord`.
        task: the backward pass in which it was opened; outside of one -1.
        frame: of the generator around whose `yield` it stands, if it does.
        paused: generators with an open scope that were suspended when this one was opened: it is none of theirs.
        is_open: until it is closed, by whichever thread.
    """

    scope: Scope
    changes: Mapping[str, Any]
    task: int
    frame: FrameType | None
    paused: tuple[FrameType, ...]
    is_open: bool = True

    def is_visible(self, task: int) -> bool:
        """Whether code that runs now, in this backward pass, lies in the scope."""
        # A backward pass computes activations of some forward again: scopes around the backward pass are none of its.
        is_of_task = task in (_NO_TASK, self.task)
        return self.is_open and is_of_task and not any(_is_running(frame) for frame in self.paused)


class _Stack:
    """The scopes that a thread has opened, the innermost last, and the record that they make together."""

    def __init__(self, entries: tuple[_Entry, ...] = ()) -> None:
        self.entries = entries
        self.record = _fold(entries)

    def is_whole(self, task: int) -> bool:
        """Whether all of its scopes are visible."""
        return all(entry.is_visible(task) for entry in self.entries)


def _fold(entries: tuple[_Entry, ...]) -> CallRecord:
    record = CallRecord()
    for entry in entries:
        record = record.extend(entry.changes)
    return record


_NO_SCOPE = _Stack()
_stack: ContextVar[_Stack] = ContextVar("bnext_scopes", default=_NO_SCOPE)


def get_record() -> CallRecord:
    """The record of a call that is made now.

    While a backward pass computes activations again, it holds what was opened for that alone: see
    `bnext.scope.call`.
    """
    stack, task = _stack.get(), find_graph_task()
    if stack.is_whole(task):
        return stack.record

    return _fold(tuple(entry for entry in stack.entries if entry.is_visible(task)))


class Scope:
    """In it, calls know something more: `with Scope(domain="night"): ...`.

    It may be opened again, also by several threads; each opening has its own end. Scopes that do not nest, such as
    those of two generators, end each for itself, and each generator sees its own.

    Args:
        owner: see `close_scopes`.
        changes: fields of `CallRecord`.
    """

    def __init__(self, owner: object = None, **changes: Any) -> None:
        self.owner = owner
        self._changes = changes
        self._entries: list[_Entry] = []

    def __enter__(self) -> None:
        entries = _stack.get().entries
        frames = {entry.frame: None for entry in entries if entry.frame is not None}
        paused = tuple(frame for frame in frames if not _is_running(frame))

        entry = _Entry(self, self._changes, find_graph_task(), _find_generator(), paused)
        self._entries.append(entry)
        _stack.set(_Stack((*entries, entry)))

    def __exit__(self, *_: object) -> None:
        here = [entry for entry in _stack.get().entries if entry.scope is self]
        entry = (here or self._entries)[-1]

        entry.is_open = False
        self._entries.remove(entry)
        _stack.set(_Stack(tuple(other for other in _stack.get().entries if other.is_open)))


def close_scopes(owner: object) -> None:
    """Close what an owner has opened in this thread: around the calls of a module, for example, from its hooks."""
    for entry in _stack.get().entries:
        if entry.scope.owner is owner:
            entry.scope.__exit__()


def _find_generator() -> FrameType | None:
    """The generator of the caller in which a scope is opened; None where that is no generator."""
    if is_traced():
        return None

    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return frame if frame is not None and frame.f_code.co_flags & _GENERATOR else None


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name == "contextlib" or name.startswith("bnext.")


def _is_running(frame: FrameType) -> bool:
    """Whether a generator's frame is being executed, and not suspended at a `yield`, or over."""
    return frame.f_back is not None


def find_graph_task() -> int:
    """The number of the backward pass that runs in this thread; -1: none, or the forward is being written down."""
    return _NO_TASK if is_traced() else torch._C._current_graph_task_id()


def is_recomputing() -> bool:
    """Whether this forward runs within a backward pass: activation checkpointing computes activations again."""
    return find_graph_task() != _NO_TASK


def is_traced() -> bool:
    """Whether this forward is being written down, by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]

"""The one record of what a call of a norm knows besides its tensors, and the scopes that add to it.

A scope changes nothing of a model: what it says lies in a context variable, belongs to its thread, and is gone with
the scope, whatever was copied or pickled in it. A new thing that a call is to know is a new field of `CallRecord`,
such as the index of a call within a forward.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

from bnext.dispatch import is_traced
from bnext.functional import Groups, Moments
from bnext.scope.recomputation import NO_GRAPH_TASK, find_graph_task

__all__ = ["CallRecord", "Scope", "close_scopes", "get_record"]

_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_PAUSING = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR | _COROUTINE  # flags of what may stop at a `yield`
_MODULE_CALL = nn.Module._call_impl.__code__


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """The record: what a call of a norm knows besides its tensors.

    Args:
        domain: of all samples, or of each sample; None: nobody has said.
        groups: norm -> groups of its samples, each of which is a mini-batch.
        virtual: norm -> moments, by domain, of additional samples that enlarge its mini-batches.
        recorders: norm -> what takes down the moments of its call, by domain.
        specs: norm -> the `NormSpec` in force instead of its own.
        frozen: norms whose running statistics do not move.
        level: of the features that a head gets now; None: nobody has said.
        calls: norm -> the calls of the model's forward in which it is, where nobody names the levels.
        observed: further norms, of any class, whose forward is to be known.
        wanted: norms whose statistics are still being estimated: what others alone need may be left out. Empty: nobody
            has said.
        images: what the norms of one forward know of its images of unseen domains; see `bnext.layers.unseen`.
    """

    domain: str | tuple[str, ...] | None = None
    groups: Mapping[nn.Module, Groups | None] = dataclasses.field(default_factory=dict)
    virtual: Mapping[nn.Module, Mapping[str, Moments] | None] = dataclasses.field(default_factory=dict)
    recorders: Mapping[nn.Module, dict[str, Moments] | None] = dataclasses.field(default_factory=dict)
    specs: Mapping[nn.Module, Any] = dataclasses.field(default_factory=dict)
    frozen: frozenset[nn.Module] = frozenset()
    level: str | None = None
    calls: Mapping[nn.Module, Any] = dataclasses.field(default_factory=dict)
    observed: frozenset[nn.Module] = frozenset()
    wanted: frozenset[nn.Module] = frozenset()
    images: Any = None

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
        generators: in which it was opened, as they ran; their `yield` may lie in it.
        paused: generators with an open scope that were suspended when this one was opened; while one of them runs, the
            code is that generator's and does not see this scope.
        module_call: the scope ends with it at the latest; None: with its `with` block.
        is_open: until it is closed, by whichever thread.
    """

    scope: Scope
    changes: Mapping[str, Any]
    task: int
    generators: tuple[FrameType, ...]
    paused: tuple[FrameType, ...]
    module_call: FrameType | None
    is_open: bool = True

    def is_visible(self, task: int) -> bool:
        """Whether code that runs now, in this backward pass, lies in the scope."""
        # A backward pass computes activations of some forward again: scopes around the backward pass are none of its.
        is_of_task = task in (NO_GRAPH_TASK, self.task)
        return not self.is_over and is_of_task and not any(_is_running(frame) for frame in self.paused)

    @property
    def is_over(self) -> bool:
        """Whether it was closed, or the call of its module was broken off without closing it."""
        return not self.is_open or not (self.module_call is None or _is_called(self.module_call))

    def close(self) -> None:
        """End it, in whichever thread."""
        self.is_open = False
        self.scope._entries.remove(self)
        _stack.set(_Stack(tuple(other for other in _stack.get().entries if not other.is_over)))


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

    While a backward pass computes activations again, it holds what was opened in that pass alone; what the forward
    knew is in `bnext.scope.call`.
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
        owner: what opens it in a hook of a module, whose call it lasts: see `close_scopes`. None: it is a `with` block.
        changes: fields of `CallRecord`.
    """

    def __init__(self, owner: object = None, **changes: Any) -> None:
        self.owner = owner
        self._changes = changes
        self._entries: list[_Entry] = []

    def __enter__(self) -> None:
        entries = tuple(entry for entry in _stack.get().entries if not entry.is_over)
        frames = dict.fromkeys(frame for entry in entries for frame in entry.generators)
        paused = tuple(frame for frame in frames if not _is_running(frame))
        module_call = None if self.owner is None else _find_module_call()

        entry = _Entry(self, self._changes, find_graph_task(), _find_generators(), paused, module_call)
        self._entries.append(entry)
        _stack.set(_Stack((*entries, entry)))

    def __exit__(self, *_: object) -> None:
        here = [entry for entry in _stack.get().entries if entry.scope is self]
        (here or self._entries)[-1].close()  # not here: a thread ends what another one has opened


def close_scopes(owner: object) -> None:
    """Close what an owner has opened in the call of a module that runs now."""
    module_call = _find_module_call()
    for entry in reversed(_stack.get().entries):
        if entry.scope.owner is owner and entry.module_call is module_call:
            entry.close()


def _find_generators() -> tuple[FrameType, ...]:
    """The generators and coroutines that run, the innermost first; those of a context manager of ours are none."""
    return tuple(frame for frame in _list_frames() if frame.f_code.co_flags & _PAUSING and not _is_ours(frame))


def _find_module_call() -> FrameType | None:
    """The innermost call of a module that runs."""
    return next((frame for frame in _list_frames() if frame.f_code is _MODULE_CALL), None)


def _list_frames() -> Iterator[FrameType]:
    """The call stack; empty where the forward is being written down."""
    frame = None if is_traced() else sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return name == "contextlib" or name.startswith("bnext.")


def _is_called(frame: FrameType) -> bool:
    """Whether a call is on the stack; one that has ended keeps the frame that called it, for tracebacks."""
    return is_traced() or any(other is frame for other in _list_frames())


def _is_running(frame: FrameType) -> bool:
    """Whether a generator's frame is being executed, and not suspended at a `yield`, or over."""
    return frame.f_back is not None

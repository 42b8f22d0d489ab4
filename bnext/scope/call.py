"""One call of one norm: its part of the record, and in a recomputation that of its own forward.

Activation checkpointing calls a norm twice, in the forward and, on a GPU in another thread, in the backward pass, when
other scopes may be open than in the forward. So what a call knew is noted on torch's checkpoint; a recomputation makes
the same calls in the same order, and reads them there. Of another library's checkpointing nothing is known: a norm for
which a scope was ever open is refused there, unless the scope is opened within the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bnext.dispatch import is_exported_to_onnx, is_traced
from bnext.errors import Refusal, StatisticsError
from bnext.functional import Groups, Moments
from bnext.scope.recomputation import NO_GRAPH_TASK, Notes, find_checkpoints, find_graph_task, is_recomputing
from bnext.scope.record import get_record

__all__ = ["NormCall", "read_call"]

UNKNOWN_FORWARD = Refusal(
    StatisticsError,
    "activation checkpointing",
    "tell which forward it computes again, as the scopes of that are gone",
    "Open {words} within the function that is computed again, or use torch.utils.checkpoint.",
)
OTHER_CALLS = Refusal(
    StatisticsError,
    "a function that is computed again",
    "call its norms as often as in the forward",
    "Let it depend on its arguments alone.",
)


class NormCall(NamedTuple):
    """One call of one norm: what it knows besides its tensors.

    Args:
        spec: the `NormSpec` in force.
        domain, groups, virtual: see `CallRecord`.
        recorder: takes down the moments of the call; None: nobody does.
        moves: whether running statistics may move.
        level: of the features, for a norm that gets one level after the other; see `bnext.scope.forward`.
        images: see `CallRecord`.
    """

    spec: Any
    domain: str | tuple[str, ...] | None = None
    groups: Groups | None = None
    virtual: Mapping[str, Moments] | None = None
    recorder: dict[str, Moments] | None = None
    moves: bool = True
    level: str | None = None
    images: Any = None


# Fields that a scope around a checkpoint may fill, and what opens them.
_SCOPES = {"domain": "use_domain", "groups": "use_groups", "virtual": "virtual_samples", "level": "use_level"}
# Norm -> those fields that any forward of it has filled: one that never had a scope cannot have lost one.
_fields_ever_filled: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def read_call(norm: nn.Module, spec: Any, where: str, level: str | None = None) -> NormCall:
    """The call of a norm that is made now.

    Args:
        norm: that is called.
        spec: its own.
        where: its place, for the error.
        level: see `NormCall`; a recomputation has that of its own forward.

    Raises:
        StatisticsError: activations are computed again, and what their forward knew is not known.
    """
    record = get_record()
    call = NormCall(
        spec=record.specs.get(norm, spec),
        domain=record.domain,
        groups=record.groups.get(norm),
        virtual=record.virtual.get(norm),
        recorder=record.recorders.get(norm),
        moves=norm not in record.frozen,
        level=level,
        images=record.images,
    )
    if is_traced():
        return call._replace(moves=call.moves and not is_exported_to_onnx())
    if torch.is_inference_mode_enabled():
        return call

    checkpoints = find_checkpoints()
    again = next((checkpoint.notes for checkpoint in checkpoints if checkpoint.is_recomputed), None)
    if again is not None and norm in again.calls:
        call = _recall(norm, again, where)
    elif again is not None or is_recomputing():
        call = _check_not_lost(norm, call, where)
    else:
        _note_fields(norm, call)

    for checkpoint in checkpoints:
        if not checkpoint.is_recomputed:  # it is going to be
            checkpoint.notes.calls.setdefault(norm, []).append(call)
    return call


def _recall(norm: nn.Module, notes: Notes, where: str) -> NormCall:
    """The call of the forward; each backward pass over a graph that is retained makes all calls once more."""
    calls: list[NormCall] = notes.calls[norm]
    task = find_graph_task()
    number = notes.number_made.get((norm, task), 0)
    notes.number_made[norm, task] = number + 1

    if task == NO_GRAPH_TASK:  # somebody looks at saved tensors, as often as he likes
        number %= len(calls)
    if number >= len(calls):
        raise OTHER_CALLS.of(f"call {number + 1} where the forward had {len(calls)}", where)
    return calls[number]._replace(recorder=None, moves=False)


def _note_fields(norm: nn.Module, call: NormCall) -> None:
    fields = {field for field in _SCOPES if getattr(call, field) is not None}
    if not call.spec.domains:
        fields.discard("domain")
    if fields:
        _fields_ever_filled.setdefault(norm, set()).update(fields)


def _check_not_lost(norm: nn.Module, call: NormCall, where: str) -> NormCall:
    """A recomputation of somebody else's knows what its function opens itself, and nothing of the scopes around it."""
    lost = [field for field in sorted(_fields_ever_filled.get(norm, ())) if getattr(call, field) is None]
    if lost:
        raise UNKNOWN_FORWARD.of(f"a call without {lost[0]}", where, words=_SCOPES[lost[0]])
    return call._replace(moves=False)

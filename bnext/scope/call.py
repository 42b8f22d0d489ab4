"""One call of one norm: its part of the record, and in a recomputation that of its own forward.

Activation checkpointing calls a norm twice, in the forward and, on a GPU in another thread, in the backward pass, when
other scopes may be open than in the forward. So a norm remembers in what its last forwards agreed; where two forwards
that differ wait for their backward passes, nobody can tell which of them is computed again, and it is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bnext.errors import Refusal, StatisticsError
from bnext.functional import Groups, Moments
from bnext.scope.record import Scope, get_record, is_recomputing, is_traced

__all__ = ["NormCall", "carrying_record", "forget_calls", "forgetting_calls", "read_call"]

UNKNOWN_FORWARD = Refusal(
    StatisticsError,
    "activation checkpointing",
    "know which forward it computes again, where several come before a backward pass",
    "Let it carry the record: checkpoint(function, *args, use_reentrant=False, context_fn=bnext.carrying_record); or "
    "go backward before the next forward.",
)


class NormCall(NamedTuple):
    """What one call of one norm knows besides its tensors.

    Args:
        spec: the `NormSpec` in force.
        domain, groups, virtual: see `CallRecord`.
        recorder: takes down the moments of the call; None: nobody does.
        moves: whether running statistics may move.
    """

    spec: Any
    domain: str | tuple[str, ...] | None = None
    groups: Groups | None = None
    virtual: Mapping[str, Moments] | None = None
    recorder: dict[str, Moments] | None = None
    moves: bool = True


# Fields in which a recomputation must be its forward, and their words.
_OF_FORWARD = {"spec": "specs", "domain": "domains", "groups": "groups", "virtual": "virtual samples"}


class _Remembered:
    """What the forwards of one norm knew whose backward passes may come.

    Attributes:
        call: the first of them.
        differing: fields in which another one had another value.
        number: of forwards that were not computed again yet.
    """

    def __init__(self, call: NormCall) -> None:
        self.call = call
        self.differing: set[str] = set()
        self.number = 0

    def add(self, call: NormCall) -> None:
        """Remember one more forward."""
        if self.number == 0:
            self.call, self.differing = call, set()

        self.differing |= {field for field in _OF_FORWARD if not _is_same(field, call, self.call)}
        self.number += 1


_remembered: WeakKeyDictionary[nn.Module, _Remembered] = WeakKeyDictionary()


def read_call(norm: nn.Module, spec: object, where: str) -> NormCall:
    """What a call of a norm that is made now knows.

    Args:
        norm: that is called.
        spec: its own.
        where: its place, for the error.

    Raises:
        StatisticsError: activations are computed again, and forwards that knew different things wait for that.

    Note:
        With retain_graph=True, a second backward pass of a graph counts as one of the latest forward.
    """
    record = get_record()
    call = NormCall(
        spec=record.specs.get(norm, spec),
        domain=record.domain,
        groups=record.groups.get(norm),
        virtual=record.virtual.get(norm),
        recorder=record.recorders.get(norm),
        moves=norm not in record.frozen and not is_recomputing(),
    )
    if is_traced() or record.is_carried:
        return call
    if is_recomputing():
        return _recall(norm, call, where)

    # Reentrant checkpointing runs the forward without gradients, and yet it has a backward pass.
    may_come_again = norm.training or torch.is_grad_enabled()
    if may_come_again and call.recorder is None:
        _remembered.setdefault(norm, _Remembered(call)).add(call)
    return call


def _recall(norm: nn.Module, call: NormCall, where: str) -> NormCall:
    """The forward that is computed again; what was opened within the recomputation holds."""
    remembered = _remembered.get(norm, _Remembered(call))
    remembered.number = max(remembered.number - 1, 0)

    of_forward = {}
    for field, words in _OF_FORWARD.items():
        if field != "spec" and getattr(call, field) is not None:
            continue  # opened here
        if field in remembered.differing:
            raise UNKNOWN_FORWARD.of(f"forwards of different {words}", where)
        of_forward[field] = getattr(remembered.call, field)
    return call._replace(**of_forward)


def forget_calls(norm: nn.Module) -> None:
    """Expect no backward pass of the forwards so far: the mode is set anew."""
    if norm in _remembered:
        _remembered[norm].number = 0


@contextlib.contextmanager
def forgetting_calls(model: nn.Module) -> Iterator[None]:
    """Forget at the end of this scope the forwards in it: none of them has a backward pass afterwards."""
    before = {norm: copy.copy(_remembered[norm]) for norm in model.modules() if norm in _remembered}
    try:
        yield
    finally:
        for norm in model.modules():
            _remembered.pop(norm, None)
        _remembered.update(before)


def carrying_record() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Scopes for torch's activation checkpointing, with which a recomputation has the record of its own forward.

    Returns:
        The scope of the forward, which adds nothing, and that of the recomputation.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> from bnext import BatchNorm2d, use_domain
        >>> norm, features = BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> with use_domain("night"):
        ...     output = checkpoint(norm, features, use_reentrant=False, context_fn=carrying_record)
        >>> output.sum().backward()
    """
    record = get_record()
    changes = {field: getattr(record, field) for field in vars(record)}
    return contextlib.nullcontext(), Scope(**{**changes, "is_carried": True})


def _is_same(field: str, one: NormCall, other: NormCall) -> bool:
    """The same names or spec, or the very tensors."""
    value, expected = getattr(one, field), getattr(other, field)
    return value is expected or (field in ("spec", "domain") and value == expected)

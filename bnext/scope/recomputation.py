"""Activations that a backward pass computes again: each call gets the record of its own forward, or is refused.

Activation checkpointing calls a norm twice, in the forward and, on a GPU in another thread, in the backward pass, when
other scopes may be open than in the forward. So a norm remembers in what its last forwards agreed; where two forwards
that differ wait for their backward passes, nobody can tell which of them is computed again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bnext.errors import StatisticsError
from bnext.scope.record import Scope, get_record, is_recomputing, is_traced

__all__ = ["carrying_record", "forget_calls", "forgetting_calls", "in_own_record"]


class _Remembered:
    """What the forwards of one norm knew whose backward passes may come.

    Attributes:
        call: field of the record -> its value for the norm, in the first of them.
        differing: fields in which another one had another value.
        number: of forwards that were not computed again yet.
    """

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}
        self.differing: set[str] = set()
        self.number = 0

    def add(self, call: dict[str, Any]) -> None:
        """Remember one more forward."""
        if self.number == 0:
            self.call, self.differing = call, set()

        self.differing |= {field for field in call if not _is_same(field, call[field], self.call[field])}
        self.number += 1


_remembered: WeakKeyDictionary[nn.Module, _Remembered] = WeakKeyDictionary()


def in_own_record(norm: nn.Module, spec: object, where: str) -> AbstractContextManager[object]:
    """The scope of one call of a norm, in which the record is that of its forward.

    Args:
        norm: that is called.
        spec: in force in this call.
        where: its place, for the error.

    Raises:
        StatisticsError: activations are computed again, and forwards that knew different things wait for that.

    Note:
        With retain_graph=True, a second backward pass of a graph counts as one of the latest forward.
    """
    if is_traced():
        return contextlib.nullcontext()

    record = get_record()
    call = {
        "domain": record.domain,
        "groups": record.groups.get(norm),
        "virtual": record.virtual.get(norm),
        "specs": spec,
    }
    if is_recomputing():
        return contextlib.nullcontext() if record.is_carried else Scope(**_recall(norm, call, where))

    # Reentrant checkpointing runs the forward without gradients, and yet it has a backward pass.
    may_come_again = norm.training or torch.is_grad_enabled()
    if may_come_again and record.recorders.get(norm) is None:
        _remembered.setdefault(norm, _Remembered()).add(call)
    return contextlib.nullcontext()


def _recall(norm: nn.Module, call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the record of the forward that is computed again; what was opened within the recomputation holds."""
    remembered = _remembered.get(norm, _Remembered())
    remembered.number = max(remembered.number - 1, 0)

    changes = {}
    for field, value in remembered.call.items():
        if field != "specs" and call[field] is not None:
            continue  # opened here

        if field in remembered.differing:
            raise StatisticsError.of(
                "activation checkpointing",
                "know which forward it computes again, where several come before a backward pass",
                got=f"forwards of different {_WORDS[field]}",
                where=where,
                remedy=_REMEDY,
            )
        changes[field] = value if field == "domain" else {norm: value}
    return changes


_WORDS = {"domain": "domains", "groups": "groups", "virtual": "virtual samples", "specs": "specs"}
_REMEDY = (
    "Let it carry the record: checkpoint(function, *args, use_reentrant=False, context_fn=bnext.carrying_record); or "
    "go backward before the next forward."
)


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


def _is_same(field: str, one: object, other: object) -> bool:
    """The same names or spec, or the very tensors."""
    return one is other or (field in ("domain", "specs") and one == other)

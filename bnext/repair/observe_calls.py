"""Calls of the norms of a model within one forward, and the sizes of their features: seen, not read."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnext.scope.forward import Size
from bnext.scope.model import restoring
from bnext.scope.record import Scope, get_record

__all__ = ["NUM_OBSERVED", "ObservedCalls", "observe_calls", "peek"]

NUM_OBSERVED = 3  # batches that show how norms are called
_SEED = 0  # of what the model draws meanwhile


class ObservedCalls:
    """Calls of one norm.

    Attributes:
        forwards: [H, W] of each call, for every forward that has called it.
        levels: names that the caller gave the levels, in the order in which they came first; empty: it gave none.
        is_outside: whether a call was in no forward of the model's entry.
    """

    def __init__(self) -> None:
        self.forwards: list[list[Size]] = []
        self.levels: dict[str, None] = {}
        self.is_outside = False
        self._forward: object = None  # the last one

    def add(self, forward: object, level: str | None, feature: Tensor) -> None:
        """A call.

        Args:
            forward: in which it is.
            level: the name that its caller gave it.
            feature: [N, C, H, W].
        """
        if forward is not self._forward:
            self.forwards.append([])
            self._forward = forward
        self.forwards[-1].append(tuple(feature.shape[2:]))
        if level is not None:
            self.levels[level] = None

    @property
    def is_repeated(self) -> bool:
        """Whether it was called more than once in a forward."""
        return any(len(sizes) > 1 for sizes in self.forwards)

    @property
    def sees_sizes(self) -> bool:
        """Whether features of one forward were of different sizes, as those of levels are."""
        return any(len(set(sizes)) > 1 for sizes in self.forwards)


def observe_calls(
    model: nn.Module,
    batches: Iterable[Any],
    norms: Mapping[str, nn.Module],
    run: Callable[[nn.Module, Any], object],
) -> dict[str, ObservedCalls]:
    """Run a model in evaluation mode and see how its norms are called; it is as it was afterwards.

    Args:
        model: whose forwards were told by `count_levels`.
        batches: some.
        norms: path -> norm of any class.
        run: called as run(model, batch).

    Returns:
        Path -> its calls, for the norms that were called.
    """
    observed: dict[str, ObservedCalls] = {}
    batch_now: list[object] = []  # a token of the batch, for calls that are in no forward

    def see(path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
        feature = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(feature, Tensor):
            return  # levels by name, all in one call

        record, calls = get_record(), observed.setdefault(path, ObservedCalls())
        forward = record.calls.get(norm)
        calls.is_outside |= forward is None and record.level is None
        calls.add(batch_now[-1] if forward is None else forward, record.level, feature)

    with contextlib.ExitStack() as scopes:
        scopes.enter_context(torch.no_grad())
        scopes.enter_context(restoring(model, seed=_SEED))
        scopes.enter_context(Scope(observed=frozenset(norms.values())))
        for path, norm in norms.items():
            scopes.enter_context(norm.register_forward_pre_hook(partial(see, path), with_kwargs=True))

        model.eval()
        for batch in batches:
            batch_now.append(object())
            run(model, batch)
    return observed


def peek(data: Iterable[Any], number: int) -> tuple[list[Any], Iterable[Any]]:
    """The first batches of data, and the data with these in it again.

    Args:
        data: a loader or a list is gone through anew; of an iterator the batches are kept.
        number: of batches at most.
    """
    batches: Iterator[Any] = iter(data)
    first = list(itertools.islice(batches, number))
    return first, itertools.chain(first, batches) if batches is data else data

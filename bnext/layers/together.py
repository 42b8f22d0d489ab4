"""Norms that are called at once, so that what each asks other workers travels in one message."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from bnext.errors import ConfigError, Refusal
from bnext.layers.mini_batch import MeasuredCall, normalize_measured

if TYPE_CHECKING:
    from bnext.layers.level_norm import LevelBatchNorm2d

__all__ = ["Together", "normalize_together"]

OTHER_NUMBER = Refusal(
    ConfigError, "features", "be one mapping for each norm", "Give the levels of each norm, in order."
)

Levels = Mapping[str, Tensor]


def normalize_together(norms: Sequence[LevelBatchNorm2d], features: Sequence[Levels]) -> list[dict[str, Tensor]]:
    """Call norms, each with its features; outputs, gradients and statistics are as of one call after the other.

    Norms that share mini-batches with the same workers, by as many channels, have one collective in all instead of one
    each, forward and backward. Such are norms of equal depth in the towers of a head.

    Args:
        norms: distinct ones.
        features: for each norm what it is called with, see `LevelBatchNorm2d.forward`.

    Returns:
        For each norm its output.

    Raises:
        ConfigError: there are more norms than features, or fewer.

    Note:
        Each norm is called as a module, with its hooks, the second one within the call of the first. What normalizes
        and over whom is each norm's own matter; those that differ in it have collectives of their own. Norms that share
        one have one backward pass: a loss that leaves out one of them gives it, and what is before it, gradients of 0,
        where alone it would have none; losses that are differentiated one by one must retain the graph.
    """
    return Together(norms, features).call_all()


class Together:
    """Calls of several norms, of which each waits, measured, until the others are measured too.

    Args:
        norms, features: see `normalize_together`.
    """

    def __init__(self, norms: Sequence[LevelBatchNorm2d], features: Sequence[Levels]) -> None:
        if len(norms) != len(features):
            raise OTHER_NUMBER.of(f"{len(features)} for {len(norms)} norms", "normalize_together")

        self._to_call = list(zip(norms, features, strict=True))
        self._num_called = 0
        self._outputs: dict[int, dict[str, Tensor]] = {}
        self._measured: list[MeasuredCall] = []
        self._normalized: list[list[Tensor]] = []

    def call_all(self) -> list[dict[str, Tensor]]:
        """Call the norms; their outputs."""
        self._call_others()
        return [self._outputs[number] for number in range(len(self._to_call))]

    def normalize(self, measured: MeasuredCall) -> list[Tensor]:
        """The normalized features of a call, once all are measured; for the norm that is called."""
        number = len(self._measured)
        self._measured.append(measured)
        self._call_others()

        if len(self._normalized) <= number:
            self._normalize_measured()
        return self._normalized[number]

    def _call_others(self) -> None:
        while self._num_called < len(self._to_call):
            number = self._num_called
            self._num_called += 1
            norm, features = self._to_call[number]
            self._outputs[number] = norm(features, together=self)

    def _normalize_measured(self) -> None:
        """Normalize what waits, calls of one kind together."""
        numbers: dict[Hashable, list[int]] = {}
        for number, call in enumerate(self._measured):
            numbers.setdefault(call.kind, []).append(number)

        normalized: dict[int, list[Tensor]] = {}
        for of_kind in numbers.values():
            outputs = normalize_measured([self._measured[number] for number in of_kind])
            normalized.update(zip(of_kind, outputs, strict=True))
        self._normalized = [normalized[number] for number in range(len(self._measured))]

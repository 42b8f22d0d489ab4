"""A check: one number that a device must keep below a limit, or above; and a run of many: none stops another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from bnext import kernels

__all__ = ["Check", "Outcome", "run_checks"]


@dataclass(frozen=True)
class Check:
    """One thing that norms must show.

    Args:
        part: of the whole, a word or two: "parity", "waits", "speed".
        name: within its part.
        measure: called with the device, gives the number.
        limit: at most so much; with `is_goal` at least so much.
        is_goal: whether it is wanted and not demanded: a speed-up.
    """

    part: str
    name: str
    measure: Callable[[torch.device], float]
    limit: float
    is_goal: bool = False

    def by(self, kind: kernels.Kind) -> Check:
        """The same with another kind of kernels, see `bnext.kernels.use_kernels`."""
        return replace(self, part=f"{self.part}, {kind}", measure=partial(_measure_by, kind, self.measure))

    def run(self, device: torch.device) -> Outcome:
        """Measure; what goes wrong is the outcome, too. Convolutions keep all their digits meanwhile."""
        start = time.perf_counter()
        value, failure = None, ""
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                value = self.measure(device)
        except Exception as error:  # a device may refuse in any way
            failure = f"{type(error).__name__}: {str(error).strip()[:300]}"

        is_passed = value is not None and (value >= self.limit if self.is_goal else value <= self.limit)  # NaN is not
        seconds = time.perf_counter() - start
        return Outcome(self.part, self.name, value, self.limit, self.is_goal, True, is_passed, failure, seconds)


def _measure_by(kind: kernels.Kind, measure: Callable[[torch.device], float], device: torch.device) -> float:
    with kernels.use_kernels(kind):
        return measure(device)


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Args:
        part, name, limit, is_goal: see `Check`.
        value: the number; None: something went wrong, or it was not run.
        is_run: whether there was time for it.
        is_passed: whether it keeps the limit.
        failure: what went wrong, or why it was not run; "": nothing.
        seconds: that it took.
    """

    part: str
    name: str
    value: float | None
    limit: float
    is_goal: bool
    is_run: bool
    is_passed: bool
    failure: str
    seconds: float

    @property
    def is_wrong(self) -> bool:
        """Whether a demand is not met, or whatever it was has failed; a goal may be missed."""
        has_failed = self.value is None
        return self.is_run and not self.is_passed and (has_failed or not self.is_goal)


def run_checks(checks: Iterable[Check], device: torch.device, seconds: float) -> Iterator[Outcome]:
    """Outcomes of checks one after the other; those that would begin too late are not run.

    Args:
        checks: in the order of their weight.
        device: that they are of.
        seconds: after which none begins.
    """
    deadline = time.perf_counter() + seconds
    for check in checks:
        if time.perf_counter() < deadline:
            yield check.run(device)
        else:
            late = f"not run: {seconds:g} seconds were over"
            yield Outcome(check.part, check.name, None, check.limit, check.is_goal, False, False, late, 0.0)

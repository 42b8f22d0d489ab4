"""Numbers of several seeds: their mean and standard deviation, and differences with theirs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Spread", "compare", "summarize"]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds.

    Args:
        mean: NaN where a number is missing or not finite.
        deviation: with n - 1; NaN for a single number.
        number: n.

    Example:
        >>> print(summarize([1.0, 2.0, 3.0])), print(summarize([2.0])), print(summarize([]))
        2.0 ± 1.0
        2.0
        -
        (None, None, None)
    """

    mean: float
    deviation: float
    number: int

    @property
    def is_beyond(self) -> bool:
        """Whether a mean difference is at least two spreads from zero, over three seeds or more."""
        return self.number >= 3 and abs(self.mean) >= 2 * self.deviation

    def show(self, digits: int = 1, sign: str = "") -> str:
        """As in a table: mean ± deviation, the mean alone where there is one number, or "-".

        Args:
            digits: behind the point.
            sign: "+" for a difference.
        """
        if not math.isfinite(self.mean):
            return "-"
        mean = f"{self.mean:{sign}.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"

    def __str__(self) -> str:
        return self.show()


def summarize(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of numbers, one for each seed; None and NaN are missing."""
    numbers = [math.nan if value is None else float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        return Spread(math.nan, math.nan, len(numbers))
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return Spread(statistics.fmean(numbers), deviation, len(numbers))


def compare(one: Sequence[float | None], other: Sequence[float | None]) -> Spread:
    """Differences one - other of numbers of the same seeds.

    Raises:
        ValueError: there are not as many of both.

    Example:
        >>> difference = compare([30.1, 31.2, 29.9], [25.0, 26.2, 24.7])
        >>> difference.show(sign="+"), difference.is_beyond
        ('+5.1 ± 0.1', True)
    """
    pairs = zip(one, other, strict=True)
    return summarize([None if first is None or second is None else first - second for first, second in pairs])

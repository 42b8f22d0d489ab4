"""Numbers as they are written by people and programs: of Python or NumPy, whatever their size."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["is_count", "is_number"]


def is_number(value: object) -> bool:
    """Whether it is a finite number; words and truth values are none, nor is what no float can hold.

    Example:
        >>> [is_number(value) for value in (1, 2.5, True, "1", float("nan"), 10**400)]
        [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: object, low: int = 0) -> bool:
    """Whether it is a whole number of `low` or more, by its type as well; truth values are none.

    Example:
        >>> [is_count(value) for value in (0, 2.0, True, -1)]
        [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low

"""Whether arguments of a re-estimation are in their range and of their type; all are checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bnext.distributed import count_images, resolve_group
from bnext.distributed.collectives import all_gather_objects
from bnext.errors import StatisticsError

__all__ = ["check_data", "check_fits_population", "check_numbers"]

_REAL = (int, float)
# Argument -> types, whether a number is in range, rule, remedy.
_RANGES: dict[str, tuple[Any, Callable[[Any], bool], str, str]] = {
    "num_batches": (int, lambda n: n >= 1, "be 1 or more", "Use some 4,000 images (TEST.PRECISE_BN.NUM_ITER)."),
    "num_samples": (int, lambda n: n >= 1, "be 1 or more", "Use 1,000 to 10,000."),
    "population_size": (int, lambda n: n >= 1, "be 1 or more, or None", "Give the number of images of the set."),
    "tolerance": (_REAL, lambda x: 0 < x < math.inf, "be a number above 0, or None", "Use 0.01 for 1 %."),
    "momentum": (_REAL, lambda x: 0 < x <= 1, "be a number above 0 and at most 1", "Use 0.1."),
    "bound": (_REAL, lambda x: x >= 1, "be a number of 1 or more", "Use 10, or math.inf for no bound."),
    "seed": (int, lambda n: 0 <= n < 2**64, "be an integer of 0 or more, below 2**64, or None", "Use 0."),
    "source_samples": (_REAL, lambda x: 0 <= x < math.inf, "be a number of 0 or more", "Use 0 to replace statistics."),
}


def check_numbers(where: str, **values: object) -> None:
    """Raise StatisticsError unless each of these arguments is a number in its range.

    Args:
        where: the function that they are of.
        values: argument -> value; one that may be None and is so is left out by the caller.
    """
    for name, value in values.items():
        types, is_in_range, rule, remedy = _RANGES[name]
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not (is_number and is_in_range(value)):
            raise StatisticsError.of(name, rule, got=repr(value), where=where, remedy=remedy)


def check_data(data: object, where: str, name: str = "data", *, many_passes: bool = False) -> None:
    """Raise StatisticsError unless `data` gives batches; more than once, if they are gone through in many passes."""
    kind = type(data).__name__
    is_iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")

    if not is_iterable or isinstance(data, (Tensor, Mapping, str)):
        rule, remedy = "be a loader or a list of batches", "A single batch is written [batch]."
        raise StatisticsError.of(name, rule, got=kind, where=where, remedy=remedy)
    if many_passes and hasattr(data, "__next__"):
        rule = "be a list or a loader that can be gone through again for estimator='layer_by_layer'"
        got, remedy = f"an iterator ({kind})", "Make a list of its batches."
        raise StatisticsError.of(name, rule, got=got, where=where, remedy=remedy)


def check_fits_population(data: Any, population_size: int, where: str) -> None:
    """Raise StatisticsError if the data of a worker hold more images than there are in all. A collective.

    Known are those of a list, and how many a loader with a batch size holds at least; others are not checked.
    """
    number = max(all_gather_objects(_count_at_least(data), resolve_group("all"), where))

    if number > population_size:
        rule, got = "be the number of all images in `data`, which gives each once", f"{population_size} for {number}"
        remedy = "Correct it; if images come again on purpose, pass a generator of their batches."
        raise StatisticsError.of("population_size", rule, got=got, where=where, remedy=remedy)


def _count_at_least(data: Any) -> int:
    if isinstance(data, (list, tuple)):
        return sum(map(count_images, data))

    batch_size = getattr(data, "batch_size", None)
    if not isinstance(batch_size, int):
        return 0
    try:
        return (len(data) - 1) * batch_size + 1  # the last batch may be a short one
    except TypeError:
        return 0  # of no known length

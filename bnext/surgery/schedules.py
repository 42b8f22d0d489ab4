"""Change the norms of a model during its training: the momentum, the limits of renorm, values over iterations.

Plain functions, for any training loop; `bnext.engine.norm_schedules` calls them from hooks. How norms
are frozen is in `bnext.surgery.freezing`; which statistics they compute (their spec) is chosen when they are built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from bnext.errors import ConfigError, Refusal
from bnext.layers.walk import find_bnext_norms, find_norms
from bnext.surgery.freezing import NO_NORM

__all__ = [
    "RENORM_D_MAX_POINTS",
    "RENORM_R_MAX_POINTS",
    "check_points",
    "interpolate",
    "set_momentum",
    "set_renorm_limits",
]

Points = Sequence[Sequence[float]]

NO_PAIRS = Refusal(
    ConfigError, "{name}", "be one or more (iteration, value) pairs", "Write them as [[5000, 1.0], [40000, 3.0]]."
)
NO_NUMBERS = Refusal(ConfigError, "{name}", "hold finite numbers", "Correct it.")
NOT_SORTED = Refusal(
    ConfigError, "{name}", "have iterations that increase from 0 or more", "Sort the points, one for each iteration."
)
OUT_OF_RANGE = Refusal(ConfigError, "{name}", "be {rule}", "Correct the value.")

# The limits of Batch Renormalization over the iterations: none for 5k, then relaxed to 3 at 40k and to 5 at 25k.
# Ioffe, *Batch Renormalization*, 2017, training of Inception-v3.
RENORM_R_MAX_POINTS = ((5_000, 1.0), (40_000, 3.0))
RENORM_D_MAX_POINTS = ((5_000, 0.0), (25_000, 5.0))


def interpolate(points: Points, iteration: float) -> float:
    """A value that changes linearly between points, and is constant before the first and after the last.

    Args:
        points: see `check_points`.
        iteration: from 0.

    Example:
        >>> interpolate([(0, 1.0), (10, 3.0)], 5)
        2.0
    """
    pairs = check_points(points)
    if iteration <= pairs[0][0]:
        return pairs[0][1]

    for (start, before), (end, after) in zip(pairs, pairs[1:], strict=False):
        if iteration <= end:
            return before + (after - before) * ((iteration - start) / (end - start))

    return pairs[-1][1]


def check_points(
    points: Any, name: str = "points", quantity: str | None = None, where: str = "interpolate"
) -> list[tuple[float, float]]:
    """The points of a schedule as pairs of floats.

    Args:
        points: one or more (iteration, value); iterations are 0 or more and increase.
        name, where: for the message.
        quantity: "momentum", "r_max" or "d_max", whose range the values keep; None: any finite number.

    Raises:
        ConfigError: they are not.
    """
    is_list = isinstance(points, (list, tuple)) and len(points) > 0
    if not is_list or not all(isinstance(point, (list, tuple)) and len(point) == 2 for point in points):
        raise NO_PAIRS.of(repr(points), where, name=name)

    for point in points:
        if not all(_is_number(number) for number in point):
            raise NO_NUMBERS.of(repr(point), where, name=name)
        if quantity is not None:
            _check_value(quantity, point[1], name, where)

    iterations = [iteration for iteration, _ in points]
    if iterations[0] < 0 or iterations != sorted(set(iterations)):
        raise NOT_SORTED.of(iterations, where, name=name)
    return [(float(iteration), float(value)) for iteration, value in points]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_value(quantity: str, value: Any, name: str, where: str) -> None:
    if quantity == "momentum":
        rule, is_right = "above 0 and at most 1", _is_number(value) and 0 < value <= 1
    else:
        least = 1 if quantity == "r_max" else 0
        rule, is_right = f"{least} or more", _is_number(value) and value >= least

    if not is_right:
        raise OUT_OF_RANGE.of(repr(value), where, name=name, rule=rule)


def set_momentum(model: nn.Module, momentum: float) -> tuple[str, ...]:
    """Set the weight of the new value in the moving averages of all batch norms.

    Args:
        model: its norms may be bnext's, torch's, or subclasses of torch's. Those that keep a cumulative average
            are left alone.
        momentum: torch's sense; above 0, at most 1.

    Returns:
        Paths of the norms that have a moving average.

    Raises:
        ConfigError: the value is out of range, or no norm has a moving average.
    """
    _check_value("momentum", momentum, "momentum", "set_momentum")
    norms = {path: norm for path, norm in find_norms(model).items() if norm.momentum is not None}
    if not norms:
        raise NO_NORM.of("none", "set_momentum", kind="a moving average")

    for norm in norms.values():
        norm.momentum = momentum
    return tuple(norms)


def set_renorm_limits(model: nn.Module, r_max: float | None = None, d_max: float | None = None) -> tuple[str, ...]:
    """Set the limits of the corrections of Batch Renormalization.

    Args:
        model: with norms whose spec has training="renorm".
        r_max: 1 or more; None: as it is.
        d_max: 0 or more; None: as it is.

    Returns:
        Paths of the norms with renorm.

    Raises:
        ConfigError: a value is out of range, or no norm has renorm.

    Source:
        Ioffe, *Batch Renormalization*, 2017; its schedule is RENORM_R_MAX_POINTS and RENORM_D_MAX_POINTS.
    """
    limits = {name: value for name, value in (("r_max", r_max), ("d_max", d_max)) if value is not None}
    for name, value in limits.items():
        _check_value(name, value, name, "set_renorm_limits")
    norms = {path: norm for path, norm in find_bnext_norms(model).items() if norm.spec.training == "renorm"}
    if not norms:
        raise NO_NORM.of("none", "set_renorm_limits", kind="training='renorm'")

    for norm in norms.values():
        for name, value in limits.items():
            setattr(norm, name, float(value))
    return tuple(norms)

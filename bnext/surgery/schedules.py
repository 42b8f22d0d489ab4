"""Change the norms of a model during its training: the momentum, the limits of renorm, values over iterations.

Plain functions, for any training loop; `bnext.engine.norm_schedules` calls them from hooks. How norms
are frozen is in `bnext.surgery.freezing`; which statistics they compute (their spec) is chosen when they are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.surgery.freezing import Selection, find_batch_norms, say_no_norm

__all__ = [
    "RENORM_D_MAX_POINTS",
    "RENORM_R_MAX_POINTS",
    "check_points",
    "interpolate",
    "set_momentum",
    "set_renorm_limits",
]

Points = Sequence[Sequence[float]]
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "momentum": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "r_max": (lambda value: 1 <= value < math.inf, "1 or more"),
    "d_max": (lambda value: 0 <= value < math.inf, "0 or more"),
}

# The limits of Batch Renormalization over the iterations: none for 5k, then relaxed to 3 at 40k and to 5 at 25k.
# Ioffe, *Batch Renormalization*, 2017, training of Inception-v3.
RENORM_R_MAX_POINTS = ((5_000, 1.0), (40_000, 3.0))
RENORM_D_MAX_POINTS = ((5_000, 0.0), (25_000, 5.0))


def interpolate(points: Points, iteration: float) -> float:
    """A value that changes linearly between points, and is constant before the first and after the last.

    Args:
        points: (iteration, value) pairs, the iterations increasing; see `check_points`.
        iteration: from 0.

    Raises:
        ConfigError: the points are not such pairs.

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
        raise ConfigError(
            f"{name} must be one or more (iteration, value) pairs; got {points!r} ({where}). Write them as "
            f"[[5000, 1.0], [40000, 3.0]]."
        )
    for number in (number for point in points for number in point):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ConfigError(f"{name} must hold finite numbers; got {number!r} in {points!r} ({where}). Correct it.")
    iterations = [point[0] for point in points]
    if iterations[0] < 0 or any(b <= a for a, b in zip(iterations, iterations[1:], strict=False)):
        raise ConfigError(
            f"{name} must have iterations that increase from 0 or more; got {iterations} ({where}). Sort the points, "
            f"one for each iteration."
        )
    for _, value in points if quantity else ():
        _check_value(quantity, value, name, where)
    return [(float(iteration), float(value)) for iteration, value in points]


def _check_value(quantity: str | None, value: float, name: str, where: str) -> None:
    is_right, rule = _RANGES[quantity or ""]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not is_right(value):
        raise ConfigError(f"{name} must be {rule}; got {value!r} ({where}). Correct the value.")


def set_momentum(model: nn.Module, momentum: float, select: Selection | None = None) -> tuple[str, ...]:
    """Set the weight of the new value in the moving averages of all batch norms.

    Args:
        model: its norms may be bnext's, torch's, or subclasses of torch's. Those that keep a cumulative average
            are left alone.
        momentum: torch's sense; above 0, at most 1.
        select: as in `freeze_norms`.

    Returns:
        Paths of the norms that have a moving average.

    Raises:
        ConfigError: the value is out of range, or no norm has a moving average.
    """
    _check_value("momentum", momentum, "momentum", "set_momentum")
    norms: list[tuple[str, Any]] = [(path, n) for path, n in find_batch_norms(model, select) if n.momentum is not None]
    if not norms:
        raise say_no_norm("a moving average", "set_momentum")
    for _, norm in norms:
        norm.momentum = momentum
    return tuple(path for path, _ in norms)


def set_renorm_limits(
    model: nn.Module, r_max: float | None = None, d_max: float | None = None, select: Selection | None = None
) -> tuple[str, ...]:
    """Set the limits of the corrections of Batch Renormalization.

    Args:
        model: with norms whose spec has training="renorm".
        r_max: 1 or more; None: as it is.
        d_max: 0 or more; None: as it is.
        select: as in `freeze_norms`.

    Returns:
        Paths of the norms with renorm.

    Raises:
        ConfigError: a value is out of range, or no norm has renorm.

    Source:
        Ioffe, *Batch Renormalization*, 2017; its schedule is RENORM_R_MAX_POINTS and RENORM_D_MAX_POINTS.
    """
    for name, value in (("r_max", r_max), ("d_max", d_max)):
        if value is not None:
            _check_value(name, value, name, "set_renorm_limits")
    norms: list[tuple[str, Any]] = [(path, n) for path, n in find_batch_norms(model, select) if _has_renorm(n)]
    if not norms:
        raise say_no_norm("training='renorm'", "set_renorm_limits")
    for _, norm in norms:
        norm.r_max = norm.r_max if r_max is None else float(r_max)
        norm.d_max = norm.d_max if d_max is None else float(d_max)
    return tuple(path for path, _ in norms)


def _has_renorm(layer: Any) -> bool:
    return isinstance(layer, BatchNorm2d) and layer.spec.training == "renorm"

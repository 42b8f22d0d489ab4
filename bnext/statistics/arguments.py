"""Whether arguments of a re-estimation are in their range and of their type; all are checked before any work."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from bnext.errors import StatisticsError, check_choice

__all__ = ["check_data", "check_how", "check_limits", "check_momentum", "check_source_samples"]


def check_limits(num_batches: object, num_samples: object, tolerance: object, where: str) -> None:
    """Raise StatisticsError unless each is None, or a whole number of 1 or more, or for the last a number above 0."""
    remedies = {
        "num_batches": (num_batches, "Use some 4,000 images (TEST.PRECISE_BN.NUM_ITER in a config)."),
        "num_samples": (num_samples, "Use 1,000 to 10,000."),
    }
    for name, (value, remedy) in remedies.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise StatisticsError(f"{name} must be 1 or more; got {value!r} ({where}). {remedy} None does not limit.")
    if tolerance is not None and not (_is_number(tolerance) and 0 < tolerance < math.inf):  # type: ignore[operator]
        raise StatisticsError(
            f"tolerance must be a number above 0, or None; got {tolerance!r} ({where}). Use 0.01 for 1 %."
        )


def check_momentum(value: object, where: str, or_none: str = "") -> None:
    """Raise StatisticsError unless `value` is a number above 0 and at most 1."""
    if not (_is_number(value) and 0 < value <= 1):  # type: ignore[operator]
        raise StatisticsError(
            f"momentum must be a number above 0 and at most 1{or_none}; got {value!r} ({where}). Use 0.1."
        )


def check_source_samples(value: object, where: str) -> None:
    """Raise StatisticsError unless `value` is a finite number of 0 or more."""
    if not (_is_number(value) and 0 <= value < math.inf):  # type: ignore[operator]
        raise StatisticsError(
            f"source_samples must be a number of 0 or more; got {value!r} ({where}). Use 0 to replace the statistics."
        )


def check_how(estimator: object, domain: object, state_file: object, where: str, allowed: Any) -> None:
    """Raise unless these are what a re-estimation knows.

    Raises:
        ConfigError: `estimator` is none of those allowed.
        StatisticsError: `domain` is no name or function, `state_file` no path, or of an estimator that keeps none.
    """
    check_choice("estimator", estimator, get_args(allowed), where=where)
    if domain is not None and not isinstance(domain, str) and not callable(domain):
        raise StatisticsError(
            f"domain must be the name of a domain, or a function that is called with a batch; got {domain!r} "
            f"({where}). For the domains of a batch's images use domain=lambda batch: [...]."
        )
    if state_file is None:
        return
    if not isinstance(state_file, (str, os.PathLike)):
        raise StatisticsError(f"state_file must be a path, or None; got {state_file!r} ({where}). Name a file.")
    if estimator == "layer_by_layer":
        raise StatisticsError(
            f"state_file must be None for estimator='layer_by_layer'; got {os.fspath(state_file)!r} ({where}). "
            f"Leave it out: an interrupted run of many passes begins anew."
        )


def check_data(data: object, estimator: object, where: str, name: str = "data") -> None:
    """Raise StatisticsError unless `data` gives batches, as often as the estimator goes through them."""
    is_iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if not is_iterable or isinstance(data, (Tensor, Mapping, str)):
        raise StatisticsError(
            f"{name} must be a loader or a list of batches; got {type(data).__name__} ({where}). A single batch is "
            f"written [batch]."
        )
    if estimator == "layer_by_layer" and hasattr(data, "__next__"):
        raise StatisticsError(
            "data must be a list or a loader that can be gone through again for estimator='layer_by_layer'; got an "
            f"iterator ({type(data).__name__}; {where}). Make a list of its batches."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

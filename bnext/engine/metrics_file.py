"""The lines of metrics.json: JSON that every parser takes."""

from __future__ import annotations

import json
import os
from collections import defaultdict

from detectron2.utils.events import JSONWriter, get_event_storage

from bnext.files import drop_nan

__all__ = ["MetricsWriter", "list_latest"]


def list_latest(after: int, window: int) -> dict[int, dict[str, float]]:
    """Iteration -> name -> the last value of each metric that came after an iteration.

    Args:
        after: the iteration.
        window: iterations over which smoothed metrics are medians.
    """
    lines: dict[int, dict[str, float]] = defaultdict(dict)
    for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(window).items():
        if iteration > after:
            lines[iteration][name] = value
    return lines


class MetricsWriter(JSONWriter):
    """Detectron2's, with null for what is no number: a size without objects has no AP, a diverged model no loss.

    Python's json writes NaN, which is no JSON: other programs refuse the line.
    """

    _last_write: int

    def write(self) -> None:
        lines = list_latest(self._last_write, self._window_size)
        for iteration, metrics in lines.items():
            values = drop_nan({**metrics, "iteration": iteration})
            self._file_handle.write(json.dumps(values, sort_keys=True, allow_nan=False) + "\n")
        self._last_write = max(lines, default=self._last_write)

        self._file_handle.flush()
        if hasattr(self._file_handle, "fileno"):  # not of every address
            os.fsync(self._file_handle.fileno())

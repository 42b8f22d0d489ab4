"""What an interrupted run has left beside its output, so that the same request can go on."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.utils import comm

__all__ = ["KeptRun"]


class KeptRun:
    """The files OUTPUT.<request>.<number>.state of one request, of which the latest one counts.

    Args:
        output: the file that the request is to write.
        weights: its input; the same name with another content is another request.
        request: everything else that must be the same for a run that goes on, as text.
    """

    def __init__(self, output: str, weights: str, request: str) -> None:
        status = os.stat(weights) if os.path.isfile(weights) else None
        content = (status.st_size, status.st_mtime_ns) if status else weights
        self._output = Path(output)
        self._key = hashlib.sha256(repr((request, content)).encode()).hexdigest()[:12]

    def find(self, key: str | None = None) -> dict[Path, int]:
        """Files of this request, or of those that match `key`, and their numbers; never those of another output."""
        own = re.compile(rf"{re.escape(self._output.name)}\.(?:{key or self._key})\.(\d+)\.state(\.\d+)?(\.partial)?")
        found = {path: own.fullmatch(path.name) for path in sorted(self._output.parent.iterdir())}
        return {path: int(match[1]) for path, match in found.items() if match}

    def begin(self, resume: bool) -> tuple[Path, Callable[[], None]]:
        """Where this run is to be kept, and what to call as soon as it has something to keep. A collective.

        Args:
            resume: go on with the latest one. Otherwise files of earlier runs stay until this one has begun.
        """
        last = max(self.find().values(), default=0)
        if resume and last == 0 and comm.is_main_process():
            logging.getLogger(__name__).info("--resume: no interrupted run of this request; it begins anew.")
        number = comm.all_gather(max(last, 1) if resume else last + 1)[0]
        replaced = [] if resume or not comm.is_main_process() else list(self.find("[0-9a-f]{12}"))
        path = self._output.with_name(f"{self._output.name}.{self._key}.{number}.state")
        return path, partial(_remove, replaced)


def _remove(paths: list[Path]) -> None:
    if paths:
        names = ", ".join(path.name for path in paths)
        logging.getLogger(__name__).info("Begun anew, without --resume: %s of an earlier run removed.", names)
    for path in paths:
        path.unlink(missing_ok=True)

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

from bnext.files import find_local_file

__all__ = ["KeptRun"]


class KeptRun:
    """The files OUTPUT.<request>.<number>.state of one request, of which the latest one counts.

    Each worker has one, with the one before it (.previous), and while it writes (.partial) another.

    Args:
        output: the file that the request is to write.
        weights: its input; the same name with another content is another request.
        request: everything else that must be the same for a run that goes on, as text.
    """

    def __init__(self, output: str, weights: str, request: str) -> None:
        file = find_local_file(weights)
        status = os.stat(file) if file is not None and os.path.isfile(file) else None
        content = (status.st_size, status.st_mtime_ns) if status else weights
        self._output = Path(output)
        self._key = hashlib.sha256(repr((request, content)).encode()).hexdigest()[:12]

    def find(self, key: str | None = None) -> dict[Path, int]:
        """Files of this request, or of those that match `key`, and their numbers; never those of another output."""
        name = rf"{re.escape(self._output.name)}\.(?:{key or self._key})"
        own = re.compile(rf"{name}\.(\d+)\.state(\.\d+)?(\.previous|\.partial)?")
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

    def remove(self) -> None:
        """The output is there: everything that was kept of this request goes."""
        for path in self.find():
            path.unlink(missing_ok=True)

    def remove_halves(self) -> None:
        """What workers that were ended from outside have half written, of the output too."""
        written = [self._output, self._output.with_suffix(".json"), *self.find()]
        for path in written:
            path.with_name(f"{path.name}.partial").unlink(missing_ok=True)
        for path in self.find():
            if path.suffix == ".partial":
                path.unlink(missing_ok=True)


def _remove(paths: list[Path]) -> None:
    if paths:
        names = ", ".join(path.name for path in paths)
        logging.getLogger(__name__).info("Begun anew, without --resume: %s of an earlier run removed.", names)
    for path in paths:
        path.unlink(missing_ok=True)

"""Standard streams and log files that are closed, full or cut off: the rest is dropped, which is said once.

A run that took days is not to end because the terminal that it was started from is gone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Any, TextIO

__all__ = ["guard_log_files", "guard_streams"]

_NAMES = {1: "standard output", 2: "standard error stream"}
_LOGGERS = ("detectron2", "fvcore", "bnext")


def guard_streams() -> None:
    """Let nothing fail in this process because a standard stream cannot be written, or not in its encoding."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which the next file would have had

    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif _is_standard(stream, descriptor):
            setattr(sys, name, _guard(stream, descriptor))


def _is_standard(stream: Any, descriptor: int) -> bool:
    """Whether it is the one that Python opened, and not a guard or what somebody has put in its place."""
    if type(stream) is not io.TextIOWrapper or isinstance(getattr(stream.buffer, "raw", None), _ForgivingFile):
        return False
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _guard(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    try:
        stream.flush()
    except OSError as error:
        _drop(descriptor, error)
        stream.flush()

    buffer = io.BufferedWriter(_ForgivingFile(descriptor))
    return io.TextIOWrapper(
        buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering or descriptor == 2
    )


class _ForgivingFile(io.FileIO):
    """A standard stream whose writes succeed, whatever becomes of them."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _drop(self.fileno(), error)
            return len(memoryview(data).cast("B"))


def _drop(descriptor: int, error: OSError, name: str = "") -> None:
    """Lead a file into nothing from here on, also what else is buffered for it, and say so."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)

    other: TextIO = sys.stdout if descriptor == 2 else sys.stderr
    name = name or f"the {_NAMES[descriptor]}"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        other.write(f"{name} cannot be written ({error.strerror}): the rest is left out of it.\n")
        other.flush()


def guard_log_files() -> None:
    """The same for the log files of Detectron2's loggers, once these are set up; it may be called again."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            stream = getattr(handler, "stream", None)
            path = getattr(stream, "name", None)  # a number or "<stdout>" for what is no log file
            if isinstance(stream, io.TextIOWrapper) and isinstance(path, str) and not path.startswith("<"):
                stream.reconfigure(errors="backslashreplace")
                handler.handleError = _FaultOfLog(handler)  # type: ignore[method-assign]


class _FaultOfLog:
    """The answer to a line that a log file cannot take; logging's own is a traceback for each."""

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler

    def __call__(self, record: logging.LogRecord) -> None:
        error, stream = sys.exc_info()[1], getattr(self._handler, "stream", None)
        if isinstance(error, OSError) and stream is not None:
            _drop(stream.fileno(), error, stream.name)
        else:
            logging.Handler.handleError(self._handler, record)

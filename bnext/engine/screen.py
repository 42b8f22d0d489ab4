"""The screen shows of a log what a person reads; log.txt has all of it.

Warnings and errors are always shown. BNEXT_VERBOSE=1 in the environment shows everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from termcolor import colored

from bnext.engine.streams import guard_log_files
from bnext.progress import AboveBars

__all__ = ["ENDED", "VERBOSE", "is_console", "is_verbose", "only_in_file", "set_up_logging"]

VERBOSE = "BNEXT_VERBOSE"
ENDED = "The training ends: "  # how the line of the log begins for what a person can mend
_DATE = "%m/%d %H:%M:%S"
_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # of terminals, for colours say
_PROGRESS = "Inference done"
_SECONDS_OF_PROGRESS = 60.0  # between such lines

# Loggers -> how messages begin that go to log.txt alone; "": all of them.
_IN_FILE = {
    "detectron2.checkpoint": ("Following weights matched", "Renaming", "Remapping"),
    "detectron2.data": ("",),  # bnext says it in one line
    "detectron2.engine.defaults": ("Model:",),
    "detectron2.engine.hooks": ("Total training time",),
    "detectron2.evaluation": ("",),  # one table of bnext's, and the bar
    "fvcore.common.checkpoint": ("Loading ",),
}


def is_verbose() -> bool:
    """Whether everything is shown."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def set_up_logging(output: str | None = None) -> None:
    """Log to the screen what a person reads and, on every worker, all of it to a file.

    Args:
        output: folder of log.txt; None: no file.

    Note:
        It may be called again; a process has one handler for the screen, that of the last call.
    """
    folder = (output,) if output else ()
    for name in ({"name": "fvcore"}, {}, {"name": "bnext"}):  # as detectron2's default_setup does, which adds no more
        _arrange(setup_logger(*folder, distributed_rank=comm.get_rank(), **name))
    guard_log_files()

    builder = logging.getLogger("torch.utils.cpp_extension")  # detectron2's table of the environment imports it
    if _is_about_builds not in builder.filters:
        builder.addFilter(_is_about_builds)


def _is_about_builds(record: logging.LogRecord) -> bool:
    """Whether a line is another than the one on machines without CUDA, where nothing is built: that is for the file."""
    message = record.getMessage()
    if not message.startswith("No CUDA runtime is found"):
        return True
    logging.getLogger(__name__).debug("%s: %s", record.name, message)
    return False


def _arrange(logger: logging.Logger) -> None:
    """Give the handlers of detectron2's `setup_logger` the form that is wanted."""
    ours = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
    consoles = [handler for handler in ours if is_console(handler)]
    for earlier in consoles[:-1]:
        logger.removeHandler(earlier)

    for handler in ours:
        if handler not in consoles:
            handler.setFormatter(_Plain("[%(asctime)s] %(name)s %(levelname)s: %(message)s", _DATE))
    for handler in consoles[-1:]:
        if _SCREEN not in handler.filters:
            handler.addFilter(_SCREEN)
        if not isinstance(handler.stream, AboveBars):
            handler.setStream(AboveBars(handler.stream))
        handler.setFormatter(_Screen(has_colors=handler.stream.isatty()))


def is_console(handler: logging.Handler) -> bool:
    """Whether a handler writes to the screen; log.txt has a StreamHandler of detectron2's, too."""
    stream = getattr(handler, "stream", None)
    if isinstance(stream, AboveBars):
        return True
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


@contextlib.contextmanager
def only_in_file(name: str) -> Iterator[None]:
    """Within the block what this logger says, but for warnings, is not shown on the screen."""
    _SCREEN.silent.append(name)
    try:
        yield
    finally:
        _SCREEN.silent.remove(name)


class _WorthShowing(logging.Filter):
    """Whether a record is for the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: list[str] = []
        self._last_progress = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        name = _name_logger(record)
        if name == "detectron2.engine.train_loop" and record.getMessage().startswith(ENDED):
            return is_verbose()  # the command's last line says it
        if record.levelno >= logging.WARNING or is_verbose():
            return True
        if record.levelno < logging.INFO or name in self.silent:
            return False

        message = record.getMessage()
        if name == "detectron2.evaluation.evaluator":
            if message.startswith("Start inference"):
                self._last_progress = time.monotonic()
            return message.startswith(_PROGRESS) and self._is_due()
        for parent, beginnings in _IN_FILE.items():
            if name == parent or name.startswith(f"{parent}."):
                return not message.startswith(beginnings)
        return True

    def _is_due(self) -> bool:
        """Whether a sign of life is, where no bar is one."""
        now = time.monotonic()
        if sys.stderr.isatty() or now - self._last_progress < _SECONDS_OF_PROGRESS:
            return False
        self._last_progress = now
        return True


_SCREEN = _WorthShowing()


def _name_logger(record: logging.LogRecord) -> str:
    """The logger of a record; detectron2's own formatter shortens it for all handlers that come after."""
    return f"detectron2{record.name[2:]}" if record.name.split(".")[0] == "d2" else record.name


class _Plain(logging.Formatter):
    """Lines without a terminal's codes, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        return _CODES.sub("", super().format(record))


class _Screen(logging.Formatter):
    """Detectron2's form of a line; colours where the stream is a terminal."""

    def __init__(self, *, has_colors: bool) -> None:
        super().__init__(datefmt=_DATE)
        self._has_colors = has_colors

    def format(self, record: logging.LogRecord) -> str:
        name = re.sub(r"^detectron2\b", "d2", record.name)
        head = f"[{self.formatTime(record, self.datefmt)} {name}]:"
        level = record.levelname if record.levelno >= logging.WARNING else ""

        text = super().format(record)
        if not self._has_colors:
            return _CODES.sub("", " ".join(part for part in (head, level, text) if part))
        return " ".join(part for part in (_color(head, "green"), level and _color(level, "red"), text) if part)


def _color(text: str, color: Any) -> str:
    return colored(text, color)
